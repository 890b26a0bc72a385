"""What a network makes of labelled images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import LabelImage, RgbImage
from nucleus.data.kinds import Kind
from nucleus.metrics.scores import ImageScores

__all__ = ["LabelledImage", "PredictedImage"]


@dataclass(frozen=True)
class LabelledImage:
    """One image of a dataset in memory.

    Attributes:
        name: Its name in the dataset.
        kind: Its kind.
        image: H x W x 3, uint8.
        labels: H x W, uint16.
    """

    name: str
    kind: Kind
    image: RgbImage
    labels: LabelImage


@dataclass(frozen=True)
class PredictedImage:
    """A labelled image, and what a network makes of it.

    Attributes:
        sample: The image with its true labels.
        labels: H x W, the predicted labels, 0 background.
        scores: The prediction against the truth.
    """

    sample: LabelledImage
    labels: NDArray[np.int32]
    scores: ImageScores
