"""Validation over all workers: the sums of their scores, and the best and worst images among all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nucleus.metrics.scores import ScoreSums
from nucleus.predict.evaluation import PredictedImage
from nucleus.training.distributed import Workers

__all__ = ["EXTREMES", "Extreme", "Extremes", "score_images"]


def score_images(predicted: Iterable[PredictedImage], workers: Workers) -> ScoreSums:
    """Return the sums of the scores over the images of all workers, in float64; each worker gets the same."""
    sums = ScoreSums()
    for image in predicted:
        sums.add(image.sample.kind, image.scores)
    return ScoreSums(workers.sum(sums.array))


EXTREMES = 12
"""How many of the best, and of the worst, are kept."""
_IOU_WEIGHT = 1e-3
"""Of images with the same mAP, as where all is found or nothing, the IoU of the mask decides."""


@dataclass(frozen=True)
class Extreme:
    """One of the best or worst images."""

    group: Literal["best", "worst"]
    predicted: PredictedImage


class Extremes:
    """Looks at this worker's images as they pass, and keeps only those that may be among the best or worst of all.

    Args:
        names: Of all images of the split, over all workers, in one order.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._quality = np.zeros(len(self._numbers))
        self._kept: dict[int, PredictedImage] = {}

    def watching(self, images: Iterable[PredictedImage]) -> Iterator[PredictedImage]:
        """Hand the images on."""
        for image in images:
            number = self._numbers[image.sample.name]
            self._quality[number] = image.scores.nuclei.mean_ap + _IOU_WEIGHT * image.scores.pixels.iou
            self._kept[number] = image
            in_order = sorted(self._kept, key=lambda number: self._quality[number])
            for middle in in_order[EXTREMES:-EXTREMES]:
                del self._kept[middle]
            yield image

    def chosen(self, workers: Workers) -> list[Extreme]:
        """Those of the best and worst over all workers that are this worker's. Every worker must call it."""
        quality = workers.sum(self._quality)
        in_order = np.argsort(quality, kind="stable")
        worst = in_order[: min(EXTREMES, -(-len(in_order) // 2))]
        best = in_order[len(worst) :][-EXTREMES:]
        groups: dict[Literal["best", "worst"], Any] = {"best": best[::-1], "worst": worst}
        return [
            Extreme(group, self._kept[int(number)])
            for group, numbers in groups.items()
            for number in numbers
            if int(number) in self._kept
        ]
