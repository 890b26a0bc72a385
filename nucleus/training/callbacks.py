"""Callbacks of a training run, signals to it, and the example images that show how it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import nucleus
from nucleus.lazy import keras, tf
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


@dataclass(frozen=True)
class AugmentedImage:
    """A training image, and a crop of it after augmentation.

    Attributes:
        sample: The image.
        image: crop x crop x 3, uint8.
        labels: crop x crop, int32.
    """

    sample: LabelledImage
    image: NDArray[np.uint8]
    labels: NDArray[np.int32]


@dataclass(frozen=True)
class TrainingResult:
    """The result of a finished run on one worker; all workers have the same, except for `examples` and `seconds`.

    Attributes:
        model: The network with the best weights.
        config: Its configuration, with the tuned thresholds.
        progress: The progress at the end, with the history.
        metrics: Scores on `val` and `test`: split, then `all` or kind of image, then metric.
        examples: A few of this worker's test images.
        seconds: Seconds that this worker spent outside the epochs, by part of the run.
        workers: Number of workers.
    """

    model: keras.Model
    config: ModelConfig
    progress: Progress
    metrics: dict[str, dict[str, dict[str, float]]]
    examples: list[LabelledImage]
    seconds: dict[str, float]
    workers: int


class Callback:
    """What happens beside training while a run goes on. Every method does nothing; override what you need.

    In a worker, the trainer calls all methods except `on_warning`, `progress` and `on_close`. Every worker makes the
    same calls in the same order, except for `on_predictions` and `on_examples`, which only the first worker makes.

    In the driver, a callback receives `on_stage`, `on_warning` and `progress` of the driver's own work, and what the
    first worker sends: `on_stage`, `on_steps_end` and `on_epoch_end`.

    Epochs count from 0 (`epoch`, and `metrics["epoch"]`); `epochs_done` is a number of epochs.
    """

    def on_stage(self, text: str) -> None:
        """A new part of the work begins."""

    def on_warning(self, text: str) -> None:
        """Something needs a person's attention."""

    def progress(
        self,
        title: str,  # noqa: ARG002
        unit: Literal["items", "bytes"] = "items",  # noqa: ARG002
    ) -> AbstractContextManager[Advance]:
        """Return a context manager that gives a function `advance(done, total)` for the progress of some work."""
        return nullcontext(no_progress)

    def on_resume(self, history: History, where: str) -> None:
        """The run resumes from a checkpoint: `history` until then, and epoch, step and workers in words."""

    def on_steps_end(
        self, epoch: int, epochs: int, done: int, total: int, loss: float, images_per_second: float
    ) -> None:
        """`done` of `total` steps of an epoch are done, with this mean loss and speed, estimated by this worker."""

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        """An epoch is done; its metrics over all workers."""

    def on_predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        """Predictions for a few validation images after so many epochs; None: by the best weights, at the end."""

    def on_ranked_images(self, images: Sequence[RankedImage]) -> None:
        """This worker's part of the best and worst test images."""

    def on_examples(self, images: Sequence[AugmentedImage]) -> None:
        """A few training images, before and after augmentation."""

    def on_checkpoint(self, history: History, save: Callable[[Path], None]) -> None:
        """A checkpoint is due: `save` writes it into an empty folder."""

    def on_train_end(self, result: TrainingResult, save: Callable[[Path], None]) -> None:
        """The run has finished: its result, and `save` as in `on_checkpoint` for the last checkpoint."""

    def on_close(self, *, failed: bool) -> None:
        """No more calls follow. `failed`: an error ended the run; a run that was asked to stop did not fail."""


class CallbackList(Callback):
    """Several callbacks as one: each call goes to every member, in order.

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
        """Close every member, also after one of them has raised an error, which is raised at the end."""
        with ExitStack() as stack:
            for member in reversed(self._members):  # the stack calls the last one first
                stack.callback(member.on_close, failed=failed)


class Signal(Enum):
    """What a run must do between two steps; the value is the reason in words."""

    CONTINUE = "no signal"
    SAVE = "a checkpoint is due"
    SAVE_BEFORE_LOSS = "a machine will be lost"
    STOP = "a stop was requested"


class Signals:
    """Signals from outside to a running job, which the trainer checks between steps. This class never gives one."""

    def pending(self) -> bool:
        """Return whether all workers must call `read` after the next step; one worker that says so is enough.

        Called before each step, so it must be cheap and must not wait.
        """
        return False

    def read(self) -> Signal:
        """Return the signal, which is the same on every worker; every worker must call it."""
        return Signal.CONTINUE

    def saved(self) -> None:
        """Note that a checkpoint is saved now."""


class Watch:
    """Predictions for a few images before training, after 1, 2, 4, 8, ... validations and at the end.

    The prediction before training is made at the first validation, with a copy of the first weights: the graph for
    prediction is built then anyway, and the first step does not have to wait for it.

    Args:
        model: The network.
        predict: Predicts the images with the model's current weights.
        on_predictions: Called with the epochs done (None at the end) and the predictions.
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
        """Predict if it is time, with the weights that the `count`-th validation (from 1) has scored."""
        if count == 1 and self._first is not None:
            with self._weights(self._first):
                self._on_predictions(0, self._predict())
        self._first = None
        if count & (count - 1) == 0:
            self._on_predictions(epochs_done, self._predict())

    def at_end(self) -> None:
        """Predict with the best weights, which the model must have now."""
        self._on_predictions(None, self._predict())

    @contextmanager
    def _weights(self, values: list[NDArray[Any]]) -> Iterator[None]:
        """Give the model other weights within the block."""
        own = [variable.numpy() for variable in self._model.weights]
        self._assign(values)
        try:
            yield
        finally:
            self._assign(own)

    def _assign(self, values: list[NDArray[Any]]) -> None:
        for variable, value in zip(self._model.weights, values, strict=True):
            variable.assign(value)


_EXAMPLES = 4


def example_images(dataset: Dataset, cache: ShardCache, split: str) -> list[LabelledImage]:
    """Return a few images of a split; always the same ones of the same dataset."""
    records = nucleus.data.example_records(dataset, split, cache, _EXAMPLES)
    return [_labelled_image(dataset, split, record) for record in records]


def augmented_examples(dataset: Dataset, cache: ShardCache, recipe: Recipe) -> list[AugmentedImage]:
    """Return a few training images, each with a crop of it that is augmented by the recipe."""
    found = []
    for number, record in enumerate(nucleus.data.example_records(dataset, "train", cache, _EXAMPLES)):
        seeds = tf.constant([recipe.seed, number], tf.int64)
        image, labels = nucleus.data.training_sample(
            tf.constant(record), seeds, recipe.input.crop, recipe.input.normalization, recipe.augment
        )
        found.append(AugmentedImage(_labelled_image(dataset, "train", record), image.numpy(), labels.numpy()))
    return found


def _labelled_image(dataset: Dataset, split: str, record: bytes) -> LabelledImage:
    name, image, labels = nucleus.data.decode_record(record)
    (kind,) = (sample.kind for sample in dataset.manifest.split_samples(split) if sample.name == name)
    return nucleus.data.LabelledImage(name, kind, image, labels)
