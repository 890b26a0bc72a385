"""What is wrong with a prediction: nuclei missed, invented, merged or split."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nucleus.metrics.matching import THRESHOLDS, LabelPairs, pair_labels

__all__ = ["Mistakes", "find_mistakes", "mistakes_in"]

_MOST = 0.5


@dataclass(frozen=True)
class Mistakes:
    """Labels of one image by what happened to them, at IoU 0.5.

    Attributes:
        missed: True labels that no predicted one matches, and that are not merged or split.
        extra: Predicted labels that match no true one, and that are not merged or split.
        merged: Predicted labels that hold most of two or more true ones.
        split: True labels that hold most of two or more predicted ones.
        in_merged: True labels most of which a merged one holds.
    """

    missed: frozenset[int]
    extra: frozenset[int]
    merged: frozenset[int]
    split: frozenset[int]
    in_merged: frozenset[int]

    def __str__(self) -> str:
        parts = {"missed": self.missed, "extra": self.extra, "merged": self.merged, "split": self.split}
        return ", ".join(f"{len(labels)} {name}" for name, labels in parts.items() if labels) or "none"


def find_mistakes(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> Mistakes:
    """Compare the labels of one image; both H x W, 0 background."""
    return mistakes_in(pair_labels(truth, predicted))


def mistakes_in(pairs: LabelPairs) -> Mistakes:
    """The same from pairs that are known."""
    rows, columns = pairs.true, pairs.predicted
    matches = pairs.iou >= THRESHOLDS[0]
    inside = pairs.shared > _MOST * pairs.true_areas[rows]
    holds = pairs.shared > _MOST * pairs.predicted_areas[columns]
    merged, split = _twice(columns[inside]), _twice(rows[holds])
    in_merged = set(rows[inside & np.isin(columns, list(merged))].tolist())
    in_split = set(columns[holds & np.isin(rows, list(split))].tolist())
    true_labels, predicted_labels = (
        set(np.flatnonzero(areas).tolist()) for areas in (pairs.true_areas, pairs.predicted_areas)
    )
    return Mistakes(
        missed=frozenset(true_labels - set(rows[matches].tolist()) - in_merged - split),
        extra=frozenset(predicted_labels - set(columns[matches].tolist()) - in_split - merged),
        merged=merged,
        split=split,
        in_merged=frozenset(in_merged),
    )


def _twice(labels: NDArray[np.int64]) -> frozenset[int]:
    """Labels that occur more than once."""
    found, counts = np.unique(labels, return_counts=True)
    return frozenset(found[counts > 1].tolist())
