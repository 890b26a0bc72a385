"""Metrics of the nucleus mask, from pixel counts.

With TP, FP, FN, TN pixels of nuclei and ground: IoU (Jaccard) = TP / (TP + FP + FN); Dice = 2 TP / (2 TP + FP + FN);
accuracy = (TP + TN) / all. An image with neither true nor predicted nuclei has IoU and Dice 1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["PixelCounts", "count_pixels"]


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
