"""What a run can be asked between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import Recipe
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset
from nucleus.data.pipeline import training_sample
from nucleus.data.reader import LabelledImage, example_records
from nucleus.data.shards import decode_record
from nucleus.lazy import keras, tf
from nucleus.model.architecture import ModelConfig
from nucleus.predict.evaluation import PredictedImage
from nucleus.training.checkpoint import History, Progress
from nucleus.training.validation import Extreme

__all__ = ["Augmented", "Demand", "Finished", "Reporter", "Watch", "augmented_examples", "example_images"]


class Demand(Enum):
    """What a run is asked to do between two steps: to save a checkpoint for the reason given, or nothing."""

    GO_ON = "nothing"
    SAVE = "as it is time"
    SAVE_FROM_LOSS = "as a machine will be lost"
    STOP = "as it was asked to stop"


@dataclass(frozen=True)
class Augmented:
    """A training image, and a crop of it as the network saw such.

    Attributes:
        sample: The image.
        image: crop x crop x 3, uint8.
        labels: crop x crop, int32.
    """

    sample: LabelledImage
    image: NDArray[np.uint8]
    labels: NDArray[np.int32]


@dataclass(frozen=True)
class Finished:
    """What a run leaves on each worker, the same on all but for the examples and the seconds.

    Attributes:
        model: The network with the best weights.
        config: What it is.
        progress: The run's history.
        metrics: Scores on `val` and `test`: split, then `all` or kind of image, then metric.
        examples: A few of this worker's test images.
        seconds: That this worker spent on the parts of the run that are no epochs.
        workers: How many there are.
    """

    model: keras.Model
    config: ModelConfig
    progress: Progress
    metrics: dict[str, dict[str, dict[str, float]]]
    examples: list[LabelledImage]
    seconds: dict[str, float]
    workers: int


class Reporter(Protocol):
    """Where a worker's progress goes, and where demands come from.

    Every worker makes each call, in the same order; but for `attention`, which each answers for itself.
    """

    def attention(self) -> bool:
        """Whether all workers should look for a demand at the end of the next step."""

    def demand(self) -> Demand:
        """What is to be done; the same on every worker."""

    def stage(self, text: str) -> None:
        """Something other than an epoch begins."""

    def resumed(self, history: History, where: str) -> None:
        """The run goes on from a checkpoint."""

    def steps(self, epoch: int, done: int, total: int, loss: float, images_per_second: float) -> None:
        """Some steps of an epoch are done, with this mean loss so far, by this worker's images, and at this speed."""

    def epoch(self, metrics: dict[str, float]) -> None:
        """An epoch is done; its metrics are those over all workers."""

    def predictions(self, epochs_done: int | None, images: list[PredictedImage]) -> None:
        """A few validation images after so many epochs, or (None) at the end; told by the first worker alone."""

    def extremes(self, images: list[Extreme]) -> None:
        """Those of the best and the worst test images that are this worker's."""

    def examples(self, images: list[Augmented]) -> None:
        """A few training images, before and after augmentation; told by the first worker alone."""

    def checkpoint(self, history: History, save: Callable[[Path], None]) -> None:
        """Keep a checkpoint: on the first worker, `save` fills the folder it is given."""

    def finished(self, finished: Finished, save: Callable[[Path], None]) -> None:
        """Keep the model, and a last checkpoint by `save`."""


Predict = Callable[[], list[PredictedImage]]


class Watch:
    """Predicts a few images before training, after 1, 2, 4, 8, ... validations and at the end.

    The prediction before training is made up for at the first validation, from a copy of the first weights: the graph
    for prediction is built then anyway, and the first step need not wait for it.

    Args:
        model: The network.
        predict: Predicts the images with the model's weights.
        tell: Told of epochs done (None at the end) and predictions.
    """

    def __init__(
        self, model: keras.Model, predict: Predict, tell: Callable[[int | None, list[PredictedImage]], None]
    ) -> None:
        self._model = model
        self._first: list[NDArray[Any]] | None = [variable.numpy() for variable in model.weights]
        self._predict = predict
        self._tell = tell

    def validated(self, count: int, epochs_done: int) -> None:
        """A validation was the `count`-th, from 1; the model has the weights that it scored."""
        if count == 1 and self._first is not None:
            with self._weights(self._first):
                self._tell(0, self._predict())
        self._first = None
        if count & (count - 1) == 0:
            self._tell(epochs_done, self._predict())

    def ended(self) -> None:
        """The model has its best weights."""
        self._tell(None, self._predict())

    @contextmanager
    def _weights(self, values: list[NDArray[Any]]) -> Iterator[None]:
        """Give the model other weights meanwhile."""
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
    """A few images of a split; the same for the same dataset."""
    return [_image(dataset, split, record) for record in example_records(dataset, split, cache, _EXAMPLES)]


def augmented_examples(dataset: Dataset, cache: ShardCache, recipe: Recipe) -> list[Augmented]:
    """Training images, and for each a crop of it as the recipe changes crops."""
    found = []
    for number, record in enumerate(example_records(dataset, "train", cache, _EXAMPLES)):
        seeds = tf.constant([recipe.seed, number], tf.int64)
        image, labels = training_sample(
            tf.constant(record), seeds, recipe.input.crop, recipe.input.normalization, recipe.augment
        )
        found.append(Augmented(_image(dataset, "train", record), image.numpy(), labels.numpy()))
    return found


def _image(dataset: Dataset, split: str, record: bytes) -> LabelledImage:
    name, image, labels = decode_record(record)
    (kind,) = (sample.kind for sample in dataset.manifest.split_samples(split) if sample.name == name)
    return LabelledImage(name, kind, image, labels)
