"""Validation over all workers: the sums of their scores, and the best and worst images among all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nucleus.metrics.scores import ScoreSums
from nucleus.predict.evaluation import PredictedImage

if TYPE_CHECKING:
    from nucleus.training.distributed import Workers

__all__ = ["RANKED_IMAGES", "ImageRanking", "RankedImage", "score_images"]


def score_images(predicted: Iterable[PredictedImage], workers: Workers) -> ScoreSums:
    """Return the sums of the scores over the images of all workers, in float64; each worker gets the same."""
    sums = ScoreSums()
    for image in predicted:
        sums.add(image.sample.kind, image.scores)
    return ScoreSums(workers.sum(sums.array))


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
