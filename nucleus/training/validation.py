"""Validation over all workers: sums of scores, and the best and worst images."""

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


RANKED_IMAGES = 12
"""Number of best images, and of worst images, that a run keeps."""
_IOU_WEIGHT = 1e-3
"""Weight of the mask's IoU in the ranking, which decides between images of equal mAP, such as 0 or 1."""


def score_images(predicted: Iterable[PredictedImage], workers: Workers) -> ScoreSums:
    """Return the sums of the scores over the images of all workers, in float64; the same on each worker."""
    sums = ScoreSums()
    for image in predicted:
        sums.add(image.sample.kind, image.scores)
    return ScoreSums(workers.sum(sums.array))


@dataclass(frozen=True)
class RankedImage:
    """One of the best or worst images of a split.

    Attributes:
        group: `best` or `worst`.
        predicted: The image, with its prediction and scores.
    """

    group: Literal["best", "worst"]
    predicted: PredictedImage


class ImageRanking:
    """Ranking of a split's images over all workers. Keeps only images that may be among the best or worst.

    Args:
        names: Names of all images of the split, in the same order on each worker.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._quality = np.zeros(len(self._numbers))
        self._kept: dict[int, PredictedImage] = {}

    def observe(self, images: Iterable[PredictedImage]) -> Iterator[PredictedImage]:
        """Rank this worker's images; yield them unchanged."""
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
