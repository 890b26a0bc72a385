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

__all__ = ["THRESHOLDS", "LabelPairs", "MatchCounts", "match_nuclei", "match_pairs", "matched_labels", "pair_labels"]

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


@dataclass(frozen=True)
class LabelPairs:
    """Labels that share pixels, background left out.

    Attributes:
        true_areas: Of each true label from 0, 0 where it does not occur.
        predicted_areas: Of each predicted one.
        true: The true label of each pair.
        predicted: The predicted one.
        shared: Pixels that they share.
    """

    true_areas: NDArray[np.int64]
    predicted_areas: NDArray[np.int64]
    true: NDArray[np.int64]
    predicted: NDArray[np.int64]
    shared: NDArray[np.int64]

    @property
    def iou(self) -> NDArray[np.float64]:
        """Of each pair."""
        union = self.true_areas[self.true] + self.predicted_areas[self.predicted] - self.shared
        return np.asarray(self.shared / union)


def match_nuclei(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> MatchCounts:
    """Match the labels of one image; both H x W, 0 background, any positive integers for nuclei."""
    return match_pairs(pair_labels(truth, predicted))


def match_pairs(pairs: LabelPairs) -> MatchCounts:
    """The same from pairs that are known."""
    _, best = matched_labels(pairs)
    reached = best[:, np.newaxis] >= np.array(THRESHOLDS)
    return MatchCounts(
        true_nuclei=int(np.count_nonzero(pairs.true_areas)),
        predicted_nuclei=int(np.count_nonzero(pairs.predicted_areas)),
        matches=reached.sum(axis=0),
        matched_iou=(best[:, np.newaxis] * reached).sum(axis=0),
    )


def matched_labels(pairs: LabelPairs) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The true labels that have a match at the lowest threshold, and the IoU of each.

    Of several partners (all at exactly 0.5) one stays.
    """
    iou = pairs.iou
    possible = iou >= THRESHOLDS[0]
    rows, columns, iou = pairs.true[possible], pairs.predicted[possible], iou[possible]
    _, first = np.unique(rows, return_index=True)
    rows, columns, iou = rows[first], columns[first], iou[first]
    _, first = np.unique(columns, return_index=True)
    return rows[first], np.asarray(iou[first], np.float64)


def pair_labels(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> LabelPairs:
    """The pairs of true and predicted labels of one image that share pixels; both H x W, 0 background."""
    rows, columns = int(truth.max()) + 1, int(predicted.max()) + 1
    if rows * columns > truth.size:  # labels with gaps: sorting the pixels costs less than so large a table
        return _pairs_by_sorting(truth, predicted)
    codes = np.multiply(truth, columns, dtype=np.int64)
    codes += predicted
    table = np.bincount(codes.ravel(), minlength=rows * columns).reshape(rows, columns)
    true_areas, predicted_areas = table.sum(axis=1), table.sum(axis=0)
    true_areas[0] = predicted_areas[0] = 0
    true, found = np.nonzero(table[1:, 1:])
    return LabelPairs(true_areas, predicted_areas, true + 1, found + 1, table[1:, 1:][true, found])


def _pairs_by_sorting(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> LabelPairs:
    true_areas, predicted_areas = _areas(truth), _areas(predicted)
    inside = (truth > 0) & (predicted > 0)
    codes, shared = np.unique(
        truth[inside].astype(np.int64) * len(predicted_areas) + predicted[inside], return_counts=True
    )
    rows, columns = np.divmod(codes, len(predicted_areas))
    return LabelPairs(true_areas, predicted_areas, rows, columns, shared)


def _areas(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """The area of each label from 0, that of the background as 0."""
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return areas


def _ratio(part: NDArray[np.number], whole: NDArray[np.number]) -> NDArray[np.float64]:
    """part / whole, 1 where there is nothing to find and nothing was found."""
    return np.asarray(np.divide(part, whole, out=np.ones(len(THRESHOLDS)), where=whole > 0))
