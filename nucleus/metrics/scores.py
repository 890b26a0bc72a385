"""Scores of predicted images: metrics of the mask and of nuclei, and their sums over images and workers.

With TP, FP, FN, TN numbers of pixels: IoU (Jaccard) = TP / (TP + FP + FN), Dice =
2 TP / (2 TP + FP + FN), accuracy = (TP + TN) / all. An image with neither true nor predicted nuclei has IoU and Dice 1.

If no image has a true nucleus, nothing was there to be found: the scores of the images together are undefined (None),
however good the images look one by one. Numbers of nuclei, `count_error` and the loss are still known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nucleus.config.names import Kind
from nucleus.metrics.nuclei import (
    SIZES,
    THRESHOLDS,
    MatchCounts,
    Mistakes,
    SizeCounts,
    count_sizes,
    match_pairs,
    mistakes_in,
    pair_labels,
)
from nucleus.text import MISSING, UNDEFINED, count, score_text

__all__ = [
    "AP_NAMES",
    "HEADLINES",
    "MISTAKES",
    "SCORE_COLUMNS",
    "ImageScores",
    "Metrics",
    "PixelCounts",
    "ScoreSums",
    "Scores",
    "amount",
    "count_from_one",
    "count_pixels",
    "epoch_scores",
    "found_one_for_one",
    "score_cell",
    "score_cells",
    "score_labels",
]

HEADLINES = (
    ("ap_50", "AP.5"),
    ("ap_70", "AP.7"),
    ("ap_90", "AP.9"),
    ("map", "mAP"),
    ("iou", "IoU"),
    ("dice", "Dice"),
    ("accuracy", "accuracy"),
)
"""Keys and titles of the main scores, means over images."""
_OF_EPOCH = {"loss": "loss", "val_loss": "val loss", "val_map": "mAP", "val_iou": "IoU", "val_dice": "Dice"}
"""Keys and titles of the metrics in the line of an epoch."""
SCORE_COLUMNS = ("split", "kind", "images", *(title for _, title in HEADLINES))
"""Titles of the columns of `score_cells`."""
MISTAKES = {"nuclei_missed": "missed", "nuclei_extra": "extra", "nuclei_merged": "merged", "nuclei_split": "split"}
"""Keys and titles of the numbers of mistakes; see `nucleus.metrics.nuclei.Mistakes.counts`."""
AP_NAMES = tuple(f"ap_{round(100 * threshold)}" for threshold in THRESHOLDS)
"""Keys of AP at each of `THRESHOLDS`."""

Scores = Mapping[str, float | None]
"""Scores by metric; None is undefined."""
Metrics = Mapping[str, Mapping[str, Scores]]
"""Scores by split, then by `all` or kind of image, then by metric."""

_KINDS = list(Kind)
_MEANS = ("loss", "iou", "dice", "accuracy", "f1_50", "pq_50", "count_error")
_WITHOUT_NUCLEI = frozenset(
    ("loss", "count_error", "nuclei_true", "nuclei_predicted", *MISTAKES, *(f"nuclei_true_{size}" for size in SIZES))
)
"""Metrics that are defined for images without a nucleus."""
_PIXELS = 4
_NUCLEI = 2
_PARTS = (
    len(_MEANS), len(THRESHOLDS), _PIXELS, _NUCLEI, len(THRESHOLDS), len(THRESHOLDS), len(MISTAKES), len(SIZES),
    len(SIZES),
)  # fmt: skip
"""Widths of the groups of columns in the sums, after the number of images."""


@dataclass(frozen=True)
class PixelCounts:
    """Number of pixels of one image by truth and prediction."""

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
        """Dice coefficient, which is the F1 of the pixels."""
        total = 2 * self.true_positive + self.false_positive + self.false_negative
        return 2 * self.true_positive / total if total else 1.0

    @property
    def accuracy(self) -> float:
        """Fraction of correctly classified pixels."""
        right = self.true_positive + self.true_negative
        return right / (right + self.false_positive + self.false_negative)


def count_pixels(truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> PixelCounts:
    """Count the pixels of one image; both masks H x W."""
    both = int(np.count_nonzero(truth & predicted))
    in_truth, in_predicted = int(np.count_nonzero(truth)), int(np.count_nonzero(predicted))
    return PixelCounts(both, in_predicted - both, in_truth - both, truth.size - in_truth - in_predicted + both)


def score_cells(metrics: Metrics, digits: int = 4) -> list[tuple[str, ...]]:
    """Return the rows of a table of the main scores, one per split and kind of image that has images."""
    return [
        (
            split,
            kind,
            count(amount(scores, "images")) if "images" in scores else MISSING,
            *(score_cell(scores, key, digits) for key, _ in HEADLINES),
        )
        for split, by_kind in metrics.items()
        for kind, scores in by_kind.items()
        if scores.get("images", 1)
    ]


def score_cell(scores: Scores, key: str, digits: int = 4) -> str:
    """Return a score as text: `undefined` if no image has a nucleus, a dash if it was not computed."""
    value = scores.get(key)
    return UNDEFINED if key in scores and value is None else score_text(value, digits=digits)


def epoch_scores(metrics: Mapping[str, float]) -> str:
    """Return the main metrics of an epoch as text.

    >>> epoch_scores({"epoch": 3.0, "loss": 0.52, "val_map": 0.6})
    'loss 0.5200, mAP 0.6000'
    """
    return ", ".join(f"{title} {metrics[name]:.4f}" for name, title in _OF_EPOCH.items() if name in metrics)


def count_from_one(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the metrics of a run's epochs with `epoch` counted from 1.

    Versions before 0.3.0 counted from 0. A history always begins with the first epoch, which shows how it counts.

    >>> count_from_one([{"epoch": 0.0}, {"epoch": 1.0}])
    [{'epoch': 1.0}, {'epoch': 2.0}]
    """
    from_zero = bool(history) and history[0].get("epoch") == 0
    return [
        {**metrics, "epoch": metrics["epoch"] + 1} if from_zero and "epoch" in metrics else dict(metrics)
        for metrics in history
    ]


def amount(scores: Scores, key: str) -> float:
    """Return a number that is defined for any images, such as a count. Raises `KeyError` if it was not computed."""
    value = scores[key]
    if value is None:
        raise KeyError(key)
    return value


def found_one_for_one(scores: Scores) -> float | None:
    """Return the number of true nuclei neither missed, merged nor split; None if mistakes were not counted."""
    wrong = [scores.get(key) for key in MISTAKES if key != "nuclei_extra"]
    if None in wrong or "nuclei_true" not in scores:
        return None
    return amount(scores, "nuclei_true") - sum(number or 0 for number in wrong)


@dataclass(frozen=True)
class ImageScores:
    """Scores of one predicted image.

    Attributes:
        loss: Training loss over the whole image.
        pixels: Pixel counts of the mask.
        nuclei: Matches of the labels.
        mistakes: Mistakes in the labels.
        sizes: Number of true and of matched nuclei, by size.
    """

    loss: float
    pixels: PixelCounts
    nuclei: MatchCounts
    mistakes: Mistakes
    sizes: SizeCounts

    def means(self) -> tuple[float, ...]:
        """Return the values whose mean over images is reported, in the order of `_MEANS`."""
        pixels, nuclei = self.pixels, self.nuclei
        return (
            self.loss,
            pixels.iou,
            pixels.dice,
            pixels.accuracy,
            float(nuclei.f1[0]),
            float(nuclei.pq[0]),
            float(abs(nuclei.true_nuclei - nuclei.predicted_nuclei)),
        )


def score_labels(truth: NDArray[np.integer], predicted: NDArray[np.integer], loss: float) -> ImageScores:
    """Score the predicted labels of one image against the true ones; both H x W, 0 background. Raises `DataError`."""
    pairs = pair_labels(truth, predicted)
    return ImageScores(
        loss=loss,
        pixels=count_pixels(truth > 0, predicted > 0),
        nuclei=match_pairs(pairs),
        mistakes=mistakes_in(pairs),
        sizes=count_sizes(pairs),
    )


class ScoreSums:
    """Sums of scores over images, by kind of image, in one array; arrays of several workers can be added.

    Attributes:
        array: kinds x columns, float64: number of images, sums of the means and of AP, pixel counts (TP, FP, FN, TN),
            true and predicted nuclei, matches and their IoU at each threshold, mistakes, and true and matched nuclei
            by size.
    """

    def __init__(self, array: NDArray[np.float64] | None = None) -> None:
        self.array = np.zeros((len(_KINDS), 1 + sum(_PARTS))) if array is None else array

    def add(self, kind: Kind, scores: ImageScores) -> None:
        """Add the scores of one image."""
        pixels, nuclei = scores.pixels, scores.nuclei
        self.array[_KINDS.index(kind)] += np.concatenate(
            [
                (1.0, *scores.means()),
                nuclei.ap,
                (pixels.true_positive, pixels.false_positive, pixels.false_negative, pixels.true_negative),
                (nuclei.true_nuclei, nuclei.predicted_nuclei),
                nuclei.matches,
                nuclei.matched_iou,
                tuple(scores.mistakes.counts.values()),
                scores.sizes.true_nuclei,
                scores.sizes.matched,
            ]
        )

    @property
    def images(self) -> int:
        """Number of images added."""
        return int(self.array[:, 0].sum())

    def scores(self, kind: Kind | None = None) -> dict[str, float | None]:
        """Return the metrics over all images or over those of one kind; empty if there are none.

        If none of these images has a nucleus, all but the numbers of nuclei, `count_error` and the loss are None.
        """
        row = self.array.sum(axis=0) if kind is None else self.array[_KINDS.index(kind)]
        images = row[0]
        if not images:
            return {}
        means, ap, pixels, nuclei, matches, matched_iou, mistakes, sizes, found = np.split(
            row[1:], np.cumsum(_PARTS[:-1])
        )
        pooled = MatchCounts(int(nuclei[0]), int(nuclei[1]), matches.astype(np.int64), matched_iou)
        mask = PixelCounts(*(int(value) for value in pixels))
        found_scores: dict[str, float | None] = {
            **{name: float(value / images) for name, value in zip(_MEANS, means, strict=True)},
            **{name: float(value / images) for name, value in zip(AP_NAMES, ap, strict=True)},
            "map": float(ap.mean() / images),
            "nuclei_true": float(nuclei[0]),
            "nuclei_predicted": float(nuclei[1]),
            "pooled_iou": mask.iou,
            "pooled_dice": mask.dice,
            "pooled_accuracy": mask.accuracy,
            **{f"pooled_{name}": float(value) for name, value in zip(AP_NAMES, pooled.ap, strict=True)},
            "pooled_map": pooled.mean_ap,
            "pooled_f1_50": float(pooled.f1[0]),
            "pooled_pq_50": float(pooled.pq[0]),
            **{name: float(value) for name, value in zip(MISTAKES, mistakes, strict=True)},
            **{f"nuclei_true_{size}": float(value) for size, value in zip(SIZES, sizes, strict=True)},
            **{f"recall_50_{size}": float(part / of) for size, part, of in zip(SIZES, found, sizes, strict=True) if of},
        }
        if nuclei[0]:
            return found_scores
        return {name: value if name in _WITHOUT_NUCLEI else None for name, value in found_scores.items()}

    def report(self) -> dict[str, dict[str, float | None]]:
        """Return the metrics over all images, under `all`, and over those of each kind that occurs."""
        by_kind = {kind.value: {"images": self.array[i, 0], **self.scores(kind)} for i, kind in enumerate(_KINDS)}
        return {
            "all": {"images": float(self.images), **self.scores()},
            **{kind: scores for kind, scores in by_kind.items() if scores["images"]},
        }
