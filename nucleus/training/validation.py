"""What a network makes of labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import tee
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import Heads, LossOptions
from nucleus.data.images import LabelImage
from nucleus.data.reader import LabelledImage
from nucleus.lazy import tf
from nucleus.metrics.scores import ImageScores, ScoreSums, score_labels
from nucleus.model.architecture import ModelConfig
from nucleus.model.heads import logits_of, maps_of
from nucleus.model.instances import label_nuclei
from nucleus.model.losses import image_losses
from nucleus.model.tiling import TiledNetwork
from nucleus.training.distributed import Workers

__all__ = [
    "RANKED_IMAGES",
    "ImageRanking",
    "PredictedImage",
    "RankedImage",
    "predict_images",
    "score_image",
    "score_images",
]


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


def predict_images(
    network: TiledNetwork, images: Iterable[LabelledImage], config: ModelConfig, loss: LossOptions
) -> Iterator[PredictedImage]:
    """Predict labelled images, and compare with the truth; one at a time, in their order."""
    samples, again = tee(images)
    for sample, values in zip(samples, network.images(sample.image for sample in again), strict=True):
        labels = label_nuclei(maps_of(values, config.heads), config.instances)
        yield PredictedImage(sample, labels, score_image(values, labels, sample.labels, config, loss))


def score_images(predicted: Iterable[PredictedImage], workers: Workers) -> ScoreSums:
    """Add up the scores of this worker's images and those of all others, in float64; each gets the same."""
    sums = ScoreSums()
    for image in predicted:
        sums.add(image.sample.kind, image.scores)
    return ScoreSums(workers.sum(sums.array))


def score_image(
    values: NDArray[np.float32],
    predicted: NDArray[np.int32],
    truth: LabelImage,
    config: ModelConfig,
    loss: LossOptions,
) -> ImageScores:
    """Compare a prediction with the truth.

    Args:
        values: H x W x channels, from the network.
        predicted: H x W, made from them.
        truth: H x W.
        config: The network.
        loss: The training loss, taken over the whole image.
    """
    return score_labels(truth, predicted, _image_loss(values, truth, config.heads, loss))


def _image_loss(values: NDArray[np.float32], labels: LabelImage, heads: Heads, options: LossOptions) -> float:
    truth = tf.constant(labels[np.newaxis].astype(np.int32))
    return float(image_losses(logits_of(values[np.newaxis], heads), truth, heads, options)[0])


RANKED_IMAGES = 12
"""Number of the best images, and of the worst ones, that a run keeps."""
_IOU_WEIGHT = 1e-3
"""Weight of the mask's IoU in the ranking: it decides between images of equal mAP, such as 0 or 1."""


@dataclass(frozen=True)
class RankedImage:
    """One of the best or worst images of a split."""

    group: Literal["best", "worst"]
    predicted: PredictedImage


class ImageRanking:
    """A ranking of a split's images over all workers; keeps only those that may be among the best or worst.

    Args:
        names: Names of all images of the split, over all workers, in the same order on each.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._quality = np.zeros(len(self._numbers))
        self._kept: dict[int, PredictedImage] = {}

    def observe(self, images: Iterable[PredictedImage]) -> Iterator[PredictedImage]:
        """Yield this worker's images unchanged, and rank them on the way."""
        for image in images:
            number = self._numbers[image.sample.name]
            self._quality[number] = image.scores.nuclei.mean_ap + _IOU_WEIGHT * image.scores.pixels.iou
            self._kept[number] = image
            in_order = sorted(self._kept, key=lambda number: self._quality[number])
            for middle in in_order[RANKED_IMAGES:-RANKED_IMAGES]:
                del self._kept[middle]
            yield image

    def ranked(self, workers: Workers) -> list[RankedImage]:
        """Return this worker's part of the best (best first) and worst (worst first) images over all workers.

        Every worker must call it.
        """
        quality = workers.sum(self._quality)
        in_order = np.argsort(quality, kind="stable")
        worst = in_order[: min(RANKED_IMAGES, -(-len(in_order) // 2))]
        best = in_order[len(worst) :][-RANKED_IMAGES:]
        groups: dict[Literal["best", "worst"], Any] = {"best": best[::-1], "worst": worst}
        return [
            RankedImage(group, self._kept[int(number)])
            for group, numbers in groups.items()
            for number in numbers
            if int(number) in self._kept
        ]
