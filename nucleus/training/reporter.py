"""What a run tells while it goes on, and what it leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import keras
import numpy as np
from numpy.typing import NDArray

from nucleus.model.architecture import ModelConfig
from nucleus.training.demand import Demand
from nucleus.training.extremes import Extreme
from nucleus.training.predictions import LabelledImage, PredictedImage
from nucleus.training.state import History, Progress

__all__ = ["Augmented", "Finished", "Reporter"]


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
