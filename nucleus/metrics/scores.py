"""Scores over many images, as sums that can be added over workers.

Each metric comes in two ways: the mean over images (`iou`, `map`, ...; what papers and Kaggle report), and pooled, that
is, from the counts of all images together (`pooled_iou`, `pooled_map`, ...; what StarDist's `matching_dataset`
reports). The metrics themselves are defined in `pixels` and `matching`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nucleus.data.kinds import Kind
from nucleus.metrics.matching import THRESHOLDS, MatchCounts
from nucleus.metrics.pixels import PixelCounts

__all__ = ["ImageScores", "ScoreSums"]

_KINDS = list(Kind)
_MEANS = ("loss", "iou", "dice", "accuracy", "f1_50", "pq_50", "count_error")
_AP = tuple(f"ap_{round(100 * threshold)}" for threshold in THRESHOLDS)
_PIXELS = 4
_NUCLEI = 2


@dataclass(frozen=True)
class ImageScores:
    """What is known of one predicted image.

    Attributes:
        loss: The training loss of the whole image.
        pixels: Of the mask.
        nuclei: Of the labels.
    """

    loss: float
    pixels: PixelCounts
    nuclei: MatchCounts

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


class ScoreSums:
    """Sums over images, by kind of image, as one array: adding the arrays of all workers gives the sums of all.

    Attributes:
        array: kinds x columns, float64: images, sums of the means and of AP, pixel counts (TP, FP, FN, TN), true and
            predicted nuclei, and matches and their IoU at each threshold.
    """

    def __init__(self, array: NDArray[np.float64] | None = None) -> None:
        columns = 1 + len(_MEANS) + _PIXELS + _NUCLEI + 3 * len(THRESHOLDS)
        self.array = np.zeros((len(_KINDS), columns)) if array is None else array

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
        means, ap, pixels, nuclei, matches, matched_iou = np.split(
            row[1:], np.cumsum([len(_MEANS), len(THRESHOLDS), _PIXELS, _NUCLEI, len(THRESHOLDS)])
        )
        pooled = MatchCounts(int(nuclei[0]), int(nuclei[1]), matches.astype(np.int64), matched_iou)
        mask = PixelCounts(*(int(value) for value in pixels))
        return {
            **{name: float(value / count) for name, value in zip(_MEANS, means, strict=True)},
            **{name: float(value / count) for name, value in zip(_AP, ap, strict=True)},
            "map": float(ap.mean() / count),
            "nuclei_true": float(nuclei[0]),
            "nuclei_predicted": float(nuclei[1]),
            "pooled_iou": mask.iou,
            "pooled_dice": mask.dice,
            "pooled_accuracy": mask.accuracy,
            **{f"pooled_{name}": float(value) for name, value in zip(_AP, pooled.ap, strict=True)},
            "pooled_map": pooled.mean_ap,
            "pooled_f1_50": float(pooled.f1[0]),
            "pooled_pq_50": float(pooled.pq[0]),
        }

    def report(self) -> dict[str, dict[str, float]]:
        """The metrics over all images under `all`, and those of each kind that there is."""
        by_kind = {kind.value: {"images": self.array[i, 0], **self.scores(kind)} for i, kind in enumerate(_KINDS)}
        return {
            "all": {"images": float(self.images), **self.scores()},
            **{kind: scores for kind, scores in by_kind.items() if scores["images"]},
        }
