"""Metrics of the nucleus mask, from pixel counts.

With TP, FP, FN, TN pixels of nuclei and ground: IoU (Jaccard) = TP / (TP + FP + FN); Dice = 2 TP / (2 TP + FP + FN);
accuracy = (TP + TN) / all. An image with neither true nor predicted nuclei has IoU and Dice 1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import Kind
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

__all__ = ["AP_NAMES", "HEADLINES", "ImageScores", "PixelCounts", "ScoreSums", "count_pixels", "score_labels"]


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


HEADLINES = (
    ("ap_50", "AP.5"),
    ("ap_70", "AP.7"),
    ("ap_90", "AP.9"),
    ("map", "mAP"),
    ("iou", "IoU"),
    ("dice", "Dice"),
    ("accuracy", "accuracy"),
)
"""Keys of the scores, and their titles; means over images."""


_KINDS = list(Kind)
_MEANS = ("loss", "iou", "dice", "accuracy", "f1_50", "pq_50", "count_error")
AP_NAMES = tuple(f"ap_{round(100 * threshold)}" for threshold in THRESHOLDS)
_PIXELS = 4
_NUCLEI = 2
_MISTAKES = ("nuclei_missed", "nuclei_extra", "nuclei_merged", "nuclei_split")
_PARTS = (
    len(_MEANS), len(THRESHOLDS), _PIXELS, _NUCLEI, len(THRESHOLDS), len(THRESHOLDS), len(_MISTAKES), len(SIZES),
    len(SIZES),
)  # fmt: skip
"""Columns of the sums after the number of images."""


@dataclass(frozen=True)
class ImageScores:
    """What is known of one predicted image.

    Attributes:
        loss: The training loss of the whole image.
        pixels: Of the mask.
        nuclei: Of the labels.
        mistakes: What is wrong with the labels.
        sizes: True nuclei and those matched, by size.
    """

    loss: float
    pixels: PixelCounts
    nuclei: MatchCounts
    mistakes: Mistakes
    sizes: SizeCounts

    def means(self) -> tuple[float, ...]:
        """The values whose mean over images is reported, in the order of `_MEANS`."""
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

    def mistake_counts(self) -> tuple[int, ...]:
        """How many nuclei went wrong in each way, in the order of `_MISTAKES`; no true nucleus counts twice."""
        found = self.mistakes
        return len(found.missed), len(found.extra), len(found.in_merged), len(found.split - found.in_merged)


def score_labels(truth: NDArray[np.integer], predicted: NDArray[np.integer], loss: float) -> ImageScores:
    """Compare the labels of one image, H x W, 0 background, with the true ones."""
    pairs = pair_labels(truth, predicted)
    return ImageScores(
        loss=loss,
        pixels=count_pixels(truth > 0, predicted > 0),
        nuclei=match_pairs(pairs),
        mistakes=mistakes_in(pairs),
        sizes=count_sizes(pairs),
    )


class ScoreSums:
    """Sums over images, by kind of image, as one array: adding the arrays of all workers gives the sums of all.

    Attributes:
        array: kinds x columns, float64: images, sums of the means and of AP, pixel counts (TP, FP, FN, TN), true and
            predicted nuclei, matches and their IoU at each threshold, mistakes, and true and matched nuclei by size.
    """

    def __init__(self, array: NDArray[np.float64] | None = None) -> None:
        self.array = np.zeros((len(_KINDS), 1 + sum(_PARTS))) if array is None else array

    def add(self, kind: Kind, scores: ImageScores) -> None:
        """Add one image."""
        pixels, nuclei = scores.pixels, scores.nuclei
        self.array[_KINDS.index(kind)] += np.concatenate(
            [
                (1.0, *scores.means()),
                nuclei.ap,
                (pixels.true_positive, pixels.false_positive, pixels.false_negative, pixels.true_negative),
                (nuclei.true_nuclei, nuclei.predicted_nuclei),
                nuclei.matches,
                nuclei.matched_iou,
                scores.mistake_counts(),
                scores.sizes.true_nuclei,
                scores.sizes.matched,
            ]
        )

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
        means, ap, pixels, nuclei, matches, matched_iou, mistakes, sizes, found = np.split(
            row[1:], np.cumsum(_PARTS[:-1])
        )
        pooled = MatchCounts(int(nuclei[0]), int(nuclei[1]), matches.astype(np.int64), matched_iou)
        mask = PixelCounts(*(int(value) for value in pixels))
        return {
            **{name: float(value / count) for name, value in zip(_MEANS, means, strict=True)},
            **{name: float(value / count) for name, value in zip(AP_NAMES, ap, strict=True)},
            "map": float(ap.mean() / count),
            "nuclei_true": float(nuclei[0]),
            "nuclei_predicted": float(nuclei[1]),
            "pooled_iou": mask.iou,
            "pooled_dice": mask.dice,
            "pooled_accuracy": mask.accuracy,
            **{f"pooled_{name}": float(value) for name, value in zip(AP_NAMES, pooled.ap, strict=True)},
            "pooled_map": pooled.mean_ap,
            "pooled_f1_50": float(pooled.f1[0]),
            "pooled_pq_50": float(pooled.pq[0]),
            **{name: float(value) for name, value in zip(_MISTAKES, mistakes, strict=True)},
            **{f"nuclei_true_{size}": float(value) for size, value in zip(SIZES, sizes, strict=True)},
            **{f"recall_50_{size}": float(part / of) for size, part, of in zip(SIZES, found, sizes, strict=True) if of},
        }

    def report(self) -> dict[str, dict[str, float]]:
        """The metrics over all images under `all`, and those of each kind that there is."""
        by_kind = {kind.value: {"images": self.array[i, 0], **self.scores(kind)} for i, kind in enumerate(_KINDS)}
        return {
            "all": {"images": float(self.images), **self.scores()},
            **{kind: scores for kind, scores in by_kind.items() if scores["images"]},
        }
