"""Callbacks of a training run, signals to it, and example images that show how the network learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import nucleus
from nucleus.lazy import keras
from nucleus.progress import Advance, no_progress

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from nucleus.config.recipe import Recipe
    from nucleus.data.cache import ShardCache
    from nucleus.data.dataset import Dataset
    from nucleus.data.reader import LabelledImage
    from nucleus.model.architecture import ModelConfig
    from nucleus.predict.evaluation import PredictedImage
    from nucleus.training.checkpoint import History, Progress
    from nucleus.training.validation import RankedImage

__all__ = [
    "AugmentedImage",
    "Callback",
    "CallbackList",
    "Signal",
    "Signals",
    "TrainingResult",
    "Watch",
    "augmented_examples",
    "example_images",
]


_EXAMPLES = 4
"""Number of images that are shown."""


@dataclass(frozen=True)
class AugmentedImage:
    """A training image, and a crop of it after augmentation.

    Attributes:
        sample: The image before augmentation, with its labels.
        image: The augmented crop, crop x crop x 3, uint8.
        labels: Labels of the crop, crop x crop, uint16.
    """

    sample: LabelledImage
    image: NDArray[np.uint8]
    labels: NDArray[np.uint16]


@dataclass(frozen=True)
class TrainingResult:
    """The result of a finished run on one worker; the same on all workers except for `examples` and `seconds`.

    Attributes:
        model: The network with the best weights.
        config: Configuration of the network, with the tuned thresholds.
        progress: Progress at the end of the run, with the history.
        metrics: Scores on `val` and `test`: split, then `all` or kind of image, then metric; None is undefined.
        examples: A few of this worker's test images.
        seconds: Seconds that this worker spent outside the epochs, by part of the run.
        workers: Number of workers.
    """

    model: keras.Model
    config: ModelConfig
    progress: Progress
    metrics: dict[str, dict[str, dict[str, float | None]]]
    examples: list[LabelledImage]
    seconds: dict[str, float]
    workers: int


class Callback:
    """Base class of callbacks. Every method does nothing; override those that you need.

    In a worker, the trainer calls all methods except `on_warning`, `progress` and `on_close`. The calls and their order
    are the same on every worker, except for `on_predictions` and `on_examples`, which are called only on the first.

    In the driver, `on_stage`, `on_warning` and `progress` are called for the driver's work, and `on_stage`,
    `on_steps_end` and `on_epoch_end` also for events that the first worker sends.

    Epochs count from 1 (`epoch`, and `metrics["epoch"]`); `epochs_done` is a number of epochs.
    """

    def on_stage(self, text: str) -> None:
        """Called when a new part of the work begins, with a text that says which."""

    def on_warning(self, text: str) -> None:
        """Called with a message that needs a person's attention."""

    def progress(
        self,
        title: str,  # noqa: ARG002
        unit: Literal["items", "bytes"] = "items",  # noqa: ARG002
    ) -> AbstractContextManager[Advance]:
        """Return a context manager that yields a function `advance(done, total)` for the progress of a task."""
        return nullcontext(no_progress)

    def on_resume(self, history: History, where: str) -> None:
        """Called when the run resumes from a checkpoint.

        Args:
            history: Metrics of each finished epoch.
            where: Text with epoch, step and number of workers.
        """

    def on_steps_end(
        self, epoch: int, epochs: int, done: int, total: int, loss: float, images_per_second: float
    ) -> None:
        """Called after one or more steps.

        Args:
            epoch: Epoch, from 1.
            epochs: Number of epochs in the recipe.
            done: Number of finished steps of the epoch.
            total: Number of steps per epoch.
            loss: Mean loss of the epoch so far, estimated from this worker's losses.
            images_per_second: Speed in the epoch so far, over all workers.
        """

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        """Called at the end of an epoch, with its metrics over all workers."""

    def on_predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        """Called with predictions for a few validation images.

        Args:
            epochs_done: Number of finished epochs; 0 is before training, None is at the end, with the best weights.
            images: Images with true and predicted labels.
        """

    def on_ranked_images(self, images: Sequence[RankedImage]) -> None:
        """Called with this worker's part of the best and worst test images."""

    def on_examples(self, images: Sequence[AugmentedImage]) -> None:
        """Called with a few training images, before and after augmentation."""

    def on_checkpoint(self, history: History, save: Callable[[Path], None]) -> None:
        """Called when a checkpoint is due.

        Args:
            history: Metrics of each finished epoch.
            save: Writes the checkpoint into an empty folder.
        """

    def on_train_end(self, result: TrainingResult, save: Callable[[Path], None]) -> None:
        """Called when the run has finished, with its result, and with `save` as in `on_checkpoint`."""

    def on_close(self, *, failed: bool) -> None:
        """Called last. `failed` is whether an error ended the run; a run that was asked to stop did not fail."""


class CallbackList(Callback):
    """A list of callbacks as one callback: each call goes to every member, in order.

    Args:
        members: The callbacks.
    """

    def __init__(self, members: Iterable[Callback]) -> None:
        self._members = tuple(members)

    def on_stage(self, text: str) -> None:
        for member in self._members:
            member.on_stage(text)

    def on_warning(self, text: str) -> None:
        for member in self._members:
            member.on_warning(text)

    @contextmanager
    def progress(self, title: str, unit: Literal["items", "bytes"] = "items") -> Iterator[Advance]:
        with ExitStack() as stack:
            advances = [stack.enter_context(member.progress(title, unit)) for member in self._members]

            def advance(done: int, total: int) -> None:
                for each in advances:
                    each(done, total)

            yield advance

    def on_resume(self, history: History, where: str) -> None:
        for member in self._members:
            member.on_resume(history, where)

    def on_steps_end(
        self, epoch: int, epochs: int, done: int, total: int, loss: float, images_per_second: float
    ) -> None:
        for member in self._members:
            member.on_steps_end(epoch, epochs, done, total, loss, images_per_second)

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        for member in self._members:
            member.on_epoch_end(metrics)

    def on_predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        for member in self._members:
            member.on_predictions(epochs_done, images)

    def on_ranked_images(self, images: Sequence[RankedImage]) -> None:
        for member in self._members:
            member.on_ranked_images(images)

    def on_examples(self, images: Sequence[AugmentedImage]) -> None:
        for member in self._members:
            member.on_examples(images)

    def on_checkpoint(self, history: History, save: Callable[[Path], None]) -> None:
        for member in self._members:
            member.on_checkpoint(history, save)

    def on_train_end(self, result: TrainingResult, save: Callable[[Path], None]) -> None:
        for member in self._members:
            member.on_train_end(result, save)

    def on_close(self, *, failed: bool) -> None:
        """Close every member, even after one has raised an error, which is raised at the end."""
        with ExitStack() as stack:
            for member in reversed(self._members):  # the stack calls the last one first
                stack.callback(member.on_close, failed=failed)


class Signal(Enum):
    """What a run must do between two steps. The values are reasons for the user."""

    CONTINUE = "no signal"
    SAVE = "a checkpoint is due"
    SAVE_BEFORE_LOSS = "a machine will be lost"
    STOP = "a stop was requested"


class Signals:
    """External signals to a running job, which the trainer checks between steps. This base class never sends one."""

    def pending(self) -> bool:
        """Return whether all workers must call `read` after the next step; they do if any worker returns True.

        Called before each step, so it must be fast and must not block.
        """
        return False

    def read(self) -> Signal:
        """Return the signal, which is the same on every worker; every worker must call it."""
        return Signal.CONTINUE

    def saved(self) -> None:
        """Record that a checkpoint is saved now."""


class Watch:
    """Predictions for a few images before training, after 1, 2, 4, 8, ... validations and at the end.

    The prediction before training is made at the first validation, with a copy of the initial weights: the graph for
    prediction is built then anyway, so the first step need not wait for it.

    Args:
        model: The network.
        predict: Function that predicts the images with the model's current weights.
        on_predictions: Called with the number of finished epochs (None at the end) and the predictions.
    """

    def __init__(
        self,
        model: keras.Model,
        predict: Callable[[], list[PredictedImage]],
        on_predictions: Callable[[int | None, list[PredictedImage]], None],
    ) -> None:
        self._model = model
        self._first: list[NDArray[Any]] | None = [variable.numpy() for variable in model.weights]
        self._predict = predict
        self._on_predictions = on_predictions

    def after_validation(self, count: int, epochs_done: int) -> None:
        """Predict if it is time, with the current weights.

        Args:
            count: Number of validations so far, including the last.
            epochs_done: Number of finished epochs.
        """
        if count == 1 and self._first is not None:
            with self._weights(self._first):
                self._on_predictions(0, self._predict())
        self._first = None
        if count & (count - 1) == 0:
            self._on_predictions(epochs_done, self._predict())

    def at_end(self) -> None:
        """Predict with the best weights, which must be loaded in the model."""
        self._on_predictions(None, self._predict())

    @contextmanager
    def _weights(self, values: list[NDArray[Any]]) -> Iterator[None]:
        """Replace the weights of the model within the block."""
        own = [variable.numpy() for variable in self._model.weights]
        self._assign(values)
        try:
            yield
        finally:
            self._assign(own)

    def _assign(self, values: list[NDArray[Any]]) -> None:
        for variable, value in zip(self._model.weights, values, strict=True):
            variable.assign(value)


def example_images(dataset: Dataset, cache: ShardCache, split: str) -> list[LabelledImage]:
    """Return a few images of a split, always the same for a dataset version."""
    records = nucleus.data.example_records(dataset, split, cache, _EXAMPLES)
    return [_labelled_image(dataset, split, record) for record in records]


def augmented_examples(dataset: Dataset, cache: ShardCache, recipe: Recipe) -> list[AugmentedImage]:
    """Return a few training images, each with a crop that is augmented by the recipe."""
    found = []
    for number, record in enumerate(nucleus.data.example_records(dataset, "train", cache, _EXAMPLES)):
        key = (recipe.seed, number)
        crop = nucleus.data.training_sample(record, key, recipe.input.crop, recipe.input.normalization, recipe.augment)
        found.append(AugmentedImage(_labelled_image(dataset, "train", record), *crop))
    return found


def _labelled_image(dataset: Dataset, split: str, record: bytes) -> LabelledImage:
    name, image, labels = nucleus.data.decode_record(record)
    (kind,) = map(nucleus.config.Kind, dataset.manifest.split_samples(split).where("name", name).texts("kind"))
    return nucleus.data.LabelledImage(name, kind, image, labels)
