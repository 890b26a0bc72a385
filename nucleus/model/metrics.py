"""Metrics of the nucleus mask, from pixel counts that can be summed over images, tiles and workers.

Per image and then averaged (`iou`, `dice`, `accuracy`; what papers and Kaggle report), and pooled over all pixels
(`pooled_iou`, ...). With TP, FP, FN, TN pixels of nuclei and ground:
IoU (Jaccard) = TP / (TP + FP + FN); Dice = 2 TP / (2 TP + FP + FN); accuracy = (TP + TN) / all.
An image with neither true nor predicted nuclei has IoU and Dice 1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nucleus.data.kinds import Kind

__all__ = ["PixelCounts", "ScoreSums", "count_pixels"]


@dataclass(frozen=True)
class PixelCounts:
    """Pixels of one image by truth and prediction."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    @property
    def iou(self) -> float:
        """Intersection over union."""
        union = self.true_positive + self.false_positive + self.false_negative
        return self.true_positive / union if union else 1.0

    @property
    def dice(self) -> float:
        """Dice coefficient, also called F1 of the pixels."""
        total = 2 * self.true_positive + self.false_positive + self.false_negative
        return 2 * self.true_positive / total if total else 1.0

    @property
    def accuracy(self) -> float:
        """Fraction of the pixels that are right."""
        right = self.true_positive + self.true_negative
        return right / (right + self.false_positive + self.false_negative)


def count_pixels(truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> PixelCounts:
    """Count the pixels of one image; both masks H x W."""
    both = int(np.count_nonzero(truth & predicted))
    in_truth, in_predicted = int(np.count_nonzero(truth)), int(np.count_nonzero(predicted))
    return PixelCounts(both, in_predicted - both, in_truth - both, truth.size - in_truth - in_predicted + both)


_KINDS = list(Kind)
_COLUMNS = ("images", "loss", "iou", "dice", "accuracy", "tp", "fp", "fn", "tn")


class ScoreSums:
    """Sums over images, by kind of image, as one array: adding the arrays of all workers gives the sums of all.

    Attributes:
        array: kinds x 9, float64: images, sums of loss, IoU, Dice and accuracy, and pixel counts.
    """

    def __init__(self, array: NDArray[np.float64] | None = None) -> None:
        self.array = np.zeros((len(_KINDS), len(_COLUMNS))) if array is None else array

    def add(self, kind: Kind, counts: PixelCounts, loss: float) -> None:
        """Add one image."""
        pixels = (counts.true_positive, counts.false_positive, counts.false_negative, counts.true_negative)
        self.array[_KINDS.index(kind)] += (1, loss, counts.iou, counts.dice, counts.accuracy, *pixels)

    @property
    def images(self) -> int:
        """How many images were added."""
        return int(self.array[:, 0].sum())

    def scores(self, kind: Kind | None = None) -> dict[str, float]:
        """The metrics over all images, or those of one kind; empty if there are none."""
        row = self.array.sum(axis=0) if kind is None else self.array[_KINDS.index(kind)]
        count = row[0]
        if not count:
            return {}
        pooled = PixelCounts(*(int(value) for value in row[5:]))
        return {
            **{name: float(row[i] / count) for i, name in enumerate(_COLUMNS[1:5], start=1)},
            "pooled_iou": pooled.iou,
            "pooled_dice": pooled.dice,
            "pooled_accuracy": pooled.accuracy,
        }

    def report(self) -> dict[str, dict[str, float]]:
        """The metrics over all images under `all`, and those of each kind that there is."""
        by_kind = {kind.value: {"images": self.array[i, 0], **self.scores(kind)} for i, kind in enumerate(_KINDS)}
        return {
            "all": {"images": float(self.images), **self.scores()},
            **{kind: scores for kind, scores in by_kind.items() if scores["images"]},
        }
