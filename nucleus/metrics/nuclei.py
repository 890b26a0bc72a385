"""Metrics of nuclei: AP, F1, PQ, and the mistakes of a prediction, from matched labels.

A true and a predicted label match at a threshold t if their IoU is at least t. As t is at least 0.5, a label has at
most one match, except that the two halves of a label may both have an IoU of exactly 0.5; then one of them counts.
With TP matches, FP predicted labels without a match and FN true labels without a match:

- AP = TP / (TP + FP + FN). StarDist and Cellpose call it accuracy or average precision; it is not COCO's.
- F1 = 2 TP / (2 TP + FP + FN).
- PQ = sum of the matches' IoU / (TP + FP / 2 + FN / 2) (Kirillov et al. 2019, https://arxiv.org/abs/1801.00868).
- mAP = mean of AP over t = 0.50, 0.55, ..., 0.95 (Data Science Bowl 2018).

An image with neither true nor predicted nuclei has the score 1 in each metric. The mean over images of which none has a
true nucleus is undefined; see `nucleus.metrics.scores`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nucleus.errors import DataError

__all__ = [
    "SIZES",
    "SIZE_TITLES",
    "THRESHOLDS",
    "LabelPairs",
    "MatchCounts",
    "Mistakes",
    "SizeCounts",
    "count_sizes",
    "find_mistakes",
    "match_nuclei",
    "match_pairs",
    "matched_labels",
    "mistakes_in",
    "pair_labels",
]

THRESHOLDS = tuple(i / 100 for i in range(50, 100, 5))
"""IoU thresholds of mAP."""
SIZE_TITLES = {
    "under_12px": "under 12 px",
    "12_to_24px": "12 to 24 px",
    "24_to_48px": "24 to 48 px",
    "over_48px": "over 48 px",
}
"""Titles of the size classes of nuclei, by the diameter of the circle of the same area."""
SIZES = tuple(SIZE_TITLES)
_BOUNDS = np.array((12.0, 24.0, 48.0))
_MOST = 0.5
_LARGEST_LABEL = (1 << 27) - 1
"""Areas are kept in a table of labels: a GiB for the largest one."""


@dataclass(frozen=True)
class MatchCounts:
    """Matches at each threshold.

    Attributes:
        true_nuclei: Number of true labels.
        predicted_nuclei: Number of predicted labels.
        matches: TP at each of `THRESHOLDS`, int64.
        matched_iou: Sum of the IoU of the matches at each of `THRESHOLDS`, float64.
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
        """Mean of AP over the thresholds."""
        return float(self.ap.mean())

    @property
    def _total(self) -> NDArray[np.int64]:
        return np.full(len(THRESHOLDS), self.true_nuclei + self.predicted_nuclei)


@dataclass(frozen=True)
class LabelPairs:
    """Pairs of true and predicted labels that share pixels, without the background.

    Attributes:
        true_areas: Area of each true label, px, indexed by label; 0 for the background and for missing labels.
        predicted_areas: Area of each predicted label, likewise.
        true: True label of each pair.
        predicted: Predicted label of each pair.
        shared: Number of pixels that both labels of a pair cover.
    """

    true_areas: NDArray[np.int64]
    predicted_areas: NDArray[np.int64]
    true: NDArray[np.int64]
    predicted: NDArray[np.int64]
    shared: NDArray[np.int64]

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each pair."""
        union = self.true_areas[self.true] + self.predicted_areas[self.predicted] - self.shared
        return np.asarray(self.shared / union)


def match_nuclei(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> MatchCounts:
    """Match the labels of one image (see `pair_labels`), both H x W. Raises `DataError`."""
    return match_pairs(pair_labels(truth, predicted))


def match_pairs(pairs: LabelPairs) -> MatchCounts:
    """Match the labels of one image, given their pairs."""
    _, best = matched_labels(pairs)
    reached = best[:, np.newaxis] >= np.array(THRESHOLDS)
    return MatchCounts(
        true_nuclei=int(np.count_nonzero(pairs.true_areas)),
        predicted_nuclei=int(np.count_nonzero(pairs.predicted_areas)),
        matches=reached.sum(axis=0),
        matched_iou=(best[:, np.newaxis] * reached).sum(axis=0),
    )


def matched_labels(pairs: LabelPairs) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the true labels that have a match at the lowest threshold, and the IoU of each.

    If a label has several candidates (all at exactly 0.5), one of them is kept.
    """
    iou = pairs.iou
    possible = iou >= THRESHOLDS[0]
    rows, columns, iou = pairs.true[possible], pairs.predicted[possible], iou[possible]
    _, first = np.unique(rows, return_index=True)
    rows, columns, iou = rows[first], columns[first], iou[first]
    _, first = np.unique(columns, return_index=True)
    return rows[first], np.asarray(iou[first], np.float64)


def pair_labels(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> LabelPairs:
    """Return the pairs of true and predicted labels of one image that share pixels.

    Args:
        truth: H x W, integers of any type (or bool, for a single nucleus): 0 background, positive numbers for nuclei.
        predicted: The same shape.

    Raises:
        DataError: The shapes differ, there are no pixels, or the numbers are no labels.
    """
    truth, predicted = _checked_labels(truth, "true"), _checked_labels(predicted, "predicted")
    if truth.shape != predicted.shape:
        raise DataError(
            f"Expected true and predicted labels of one image; found shapes {truth.shape} and {predicted.shape}. Score "
            "each prediction against the labels of its own image, at full resolution."
        )
    rows, columns = int(truth.max()) + 1, int(predicted.max()) + 1
    if rows * columns > truth.size:  # the labels have gaps: sorting the pixels is cheaper than such a large table
        return _pairs_by_sorting(truth, predicted)
    codes = np.multiply(truth, columns, dtype=np.int64)
    codes += predicted
    table = np.bincount(codes.ravel(), minlength=rows * columns).reshape(rows, columns)
    true_areas, predicted_areas = table.sum(axis=1), table.sum(axis=0)
    true_areas[0] = predicted_areas[0] = 0
    true, found = np.nonzero(table[1:, 1:])
    return LabelPairs(true_areas, predicted_areas, true + 1, found + 1, table[1:, 1:][true, found])


def _checked_labels(labels: NDArray[np.integer], which: str) -> NDArray[np.integer]:
    """Return labels in a type that sums with others are exact in. Raises `DataError` for what are no labels."""
    if labels.ndim != 2 or not labels.size or labels.dtype.kind not in "bui":
        raise DataError(
            f"Expected {which} labels H x W, of integers; found shape {labels.shape} of {labels.dtype}. Pass a label "
            "image: 0 is background, each nucleus has its own number."
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest > _LARGEST_LABEL:
        raise DataError(
            f"Expected {which} labels from 0 to {_LARGEST_LABEL:,}; found {lowest if lowest < 0 else highest}. Number "
            "them anew: skimage.segmentation.relabel_sequential(labels)."
        )
    return labels.astype(np.int64) if labels.dtype.kind == "u" and labels.dtype.itemsize == 8 else labels


def _pairs_by_sorting(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> LabelPairs:
    true_areas, predicted_areas = _areas(truth), _areas(predicted)
    inside = (truth > 0) & (predicted > 0)
    codes, shared = np.unique(
        truth[inside].astype(np.int64) * len(predicted_areas) + predicted[inside], return_counts=True
    )
    rows, columns = np.divmod(codes, len(predicted_areas))
    return LabelPairs(true_areas, predicted_areas, rows, columns, shared)


def _areas(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the area of each label, indexed by label; 0 for the background."""
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return areas


def _ratio(part: NDArray[np.number], whole: NDArray[np.number]) -> NDArray[np.float64]:
    """Return part / whole; 1 where there are neither true nor predicted nuclei."""
    return np.asarray(np.divide(part, whole, out=np.ones(len(THRESHOLDS)), where=whole > 0))


@dataclass(frozen=True)
class SizeCounts:
    """Number of true nuclei of one image by size.

    Attributes:
        true_nuclei: Number of true nuclei in each of `SIZES`, int64.
        matched: Number of true nuclei that a predicted one matches at IoU 0.5, in each of `SIZES`, int64.
    """

    true_nuclei: NDArray[np.int64]
    matched: NDArray[np.int64]


def count_sizes(pairs: LabelPairs) -> SizeCounts:
    """Count the true nuclei of one image and the matched ones, by size."""
    matched, _ = matched_labels(pairs)
    return SizeCounts(_by_size(pairs.true_areas[pairs.true_areas > 0]), _by_size(pairs.true_areas[matched]))


def _by_size(areas: NDArray[np.int64]) -> NDArray[np.int64]:
    diameters = np.sqrt(4 * areas / np.pi)
    return np.bincount(np.searchsorted(_BOUNDS, diameters), minlength=len(SIZES))


@dataclass(frozen=True)
class Mistakes:
    """Labels of one image by kind of mistake, at IoU 0.5.

    Attributes:
        missed: True labels without a match that are neither merged nor split.
        extra: Predicted labels without a match that are neither merged nor a part of a split label.
        merged: Predicted labels that cover most of two or more true labels.
        split: True labels that cover most of two or more predicted labels.
        in_merged: True labels that a merged label covers for the most part.
    """

    missed: frozenset[int]
    extra: frozenset[int]
    merged: frozenset[int]
    split: frozenset[int]
    in_merged: frozenset[int]

    @property
    def counts(self) -> dict[str, int]:
        """Number of nuclei by mistake: true nuclei `missed`, `merged` and `split`; predicted nuclei `extra`.

        Each true nucleus counts once: one that is both merged and split counts as merged.
        """
        return {
            "missed": len(self.missed),
            "extra": len(self.extra),
            "merged": len(self.in_merged),
            "split": len(self.split - self.in_merged),
        }

    def __str__(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in self.counts.items() if number) or "none"


def find_mistakes(truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> Mistakes:
    """Return the mistakes of a prediction (see `pair_labels`), both H x W. Raises `DataError`."""
    return mistakes_in(pair_labels(truth, predicted))


def mistakes_in(pairs: LabelPairs) -> Mistakes:
    """Return the mistakes of a prediction, given the pairs of labels."""
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
    """Return the labels that occur more than once."""
    found, counts = np.unique(labels, return_counts=True)
    return frozenset(found[counts > 1].tolist())
