"""Metrics of nuclei: which predicted label is which true one.

A true and a predicted label match at a threshold t if their IoU is at least t; t from 0.5 up, so that a label has one
partner at most (two candidates can only be the halves of one label, both at exactly 0.5, and then one of them counts).
With TP matches, FP predicted labels without one and FN true labels without one:

- AP = TP / (TP + FP + FN). StarDist and Cellpose call it accuracy or average precision; it is not COCO's.
- F1 = 2 TP / (2 TP + FP + FN).
- PQ = sum of the matches' IoU / (TP + FP / 2 + FN / 2) (Kirillov et al. 2019, https://arxiv.org/abs/1801.00868).
- mAP = mean of AP over t = 0.50, 0.55, ..., 0.95 (Data Science Bowl 2018).

An image with neither true nor predicted nuclei scores 1 in each.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["THRESHOLDS", "MatchCounts", "match_nuclei", "pair_overlaps"]

THRESHOLDS = tuple(i / 100 for i in range(50, 100, 5))
"""The thresholds of mAP."""


@dataclass(frozen=True)
class MatchCounts:
    """Matches at each threshold.

    Attributes:
        true_nuclei: Labels in the truth.
        predicted_nuclei: Labels in the prediction.
        matches: TP at each of `THRESHOLDS`, int64.
        matched_iou: Sum of the matches' IoU at each of `THRESHOLDS`, float64.
    """

    true_nuclei: int
    predicted_nuclei: int
    matches: NDArray[np.int64]
    matched_iou: NDArray[np.float64]

    @property
    def ap(self) -> NDArray[np.float64]:
        """AP at each threshold."""
        return _ratio(self.matches, self.true_nuclei + self.predicted_nuclei - self.matches)

    @property
    def f1(self) -> NDArray[np.float64]:
        """F1 at each threshold."""
        return _ratio(2.0 * self.matches, self._total)

    @property
    def pq(self) -> NDArray[np.float64]:
        """PQ at each threshold."""
        return _ratio(2.0 * self.matched_iou, self._total)

    @property
    def mean_ap(self) -> float:
        """The mean of AP over the thresholds."""
        return float(self.ap.mean())

    @property
    def _total(self) -> NDArray[np.int64]:
        return np.full(len(THRESHOLDS), self.true_nuclei + self.predicted_nuclei)


def match_nuclei(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> MatchCounts:
    """Match the labels of one image; both H x W, 0 background, any positive integers for nuclei."""
    true_labels, true_areas = _areas(truth)
    predicted_labels, predicted_areas = _areas(predicted)
    rows, columns, overlaps = pair_overlaps(truth, predicted)
    rows = np.searchsorted(true_labels, rows)
    columns = np.searchsorted(predicted_labels, columns)
    iou = overlaps / (true_areas[rows] + predicted_areas[columns] - overlaps)
    best = _one_to_one(rows, columns, iou)
    reached = best[:, np.newaxis] >= np.array(THRESHOLDS)
    return MatchCounts(
        true_nuclei=len(true_labels),
        predicted_nuclei=len(predicted_labels),
        matches=reached.sum(axis=0),
        matched_iou=(best[:, np.newaxis] * reached).sum(axis=0),
    )


def pair_overlaps(
    first: NDArray[np.integer], second: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of labels that share pixels, background left out: labels of the first, of the second, shared pixels."""
    inside = (first > 0) & (second > 0)
    a, b = first[inside].astype(np.int64), second[inside].astype(np.int64)
    width = int(b.max(initial=0)) + 1
    codes, counts = np.unique(a * width + b, return_counts=True)
    return codes // width, codes % width, counts


def _areas(labels: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The labels that occur, in order, and their areas."""
    areas = np.bincount(labels.ravel())
    areas[:1] = 0
    found = np.flatnonzero(areas)
    return found, areas[found]


def _one_to_one(rows: NDArray[np.int64], columns: NDArray[np.int64], iou: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of the matches at the lowest threshold; of several partners (all at exactly 0.5) one stays."""
    possible = iou >= THRESHOLDS[0]
    rows, columns, iou = rows[possible], columns[possible], iou[possible]
    _, first = np.unique(rows, return_index=True)
    columns, iou = columns[first], iou[first]
    _, first = np.unique(columns, return_index=True)
    return np.asarray(iou[first], np.float64)


def _ratio(part: NDArray[np.number], whole: NDArray[np.number]) -> NDArray[np.float64]:
    """part / whole, 1 where there is nothing to find and nothing was found."""
    return np.asarray(np.divide(part, whole, out=np.ones(len(THRESHOLDS)), where=whole > 0))
