"""How well nuclei are found by their size."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nucleus.metrics.matching import LabelPairs, matched_labels

__all__ = ["SIZES", "SizeCounts", "count_sizes"]

_BOUNDS = np.array((12.0, 24.0, 48.0))
SIZES = ("under_12px", "12_to_24px", "24_to_48px", "over_48px")
"""Ranges of a nucleus's diameter, that of the circle of its area."""


@dataclass(frozen=True)
class SizeCounts:
    """True nuclei of one image by size.

    Attributes:
        true_nuclei: How many there are in each of `SIZES`, int64.
        matched: How many of them a predicted one matches at IoU 0.5, int64.
    """

    true_nuclei: NDArray[np.int64]
    matched: NDArray[np.int64]


def count_sizes(pairs: LabelPairs) -> SizeCounts:
    """Count the true nuclei of one image, and those found, by size."""
    matched, _ = matched_labels(pairs)
    return SizeCounts(_by_size(pairs.true_areas[pairs.true_areas > 0]), _by_size(pairs.true_areas[matched]))


def _by_size(areas: NDArray[np.int64]) -> NDArray[np.int64]:
    diameters = np.sqrt(4 * areas / np.pi)
    return np.bincount(np.searchsorted(_BOUNDS, diameters), minlength=len(SIZES))
