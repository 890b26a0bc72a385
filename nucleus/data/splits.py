"""Splits into train, val and test: the assignment of groups of related images to splits."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nucleus.data.samples import SPLITS
from nucleus.errors import DataError, UsageError

__all__ = ["SplitOptions", "split_images"]


_FOLDS = 20


@dataclass(frozen=True)
class SplitOptions:
    """Options of the splits.

    Attributes:
        seed: Seed of the folds.
        val: Fraction of the images for validation, between 0 and 1.
        test: Fraction of the images for the test split, between 0 and 1.
        group_by: Pattern that is searched for in the titles of the images. Images with the same first group (or the
            same whole match, if the pattern has no group) stay in one split.
    """

    seed: int = 0
    val: float = 0.1
    test: float = 0.1
    group_by: re.Pattern[str] | None = None

    def __post_init__(self) -> None:
        if not (0 < self.val < 1 and 0 < self.test < 1 and self.val + self.test < 1):
            raise UsageError(
                f"Expected fractions above 0 that leave some for training; found val {self.val}, test {self.test}."
            )


def split_images(
    kinds: Sequence[str],
    groups: Sequence[int],
    given: Sequence[str | None],
    *,
    seed: int,
    val: float,
    test: float,
    few: bool = False,
) -> list[str]:
    """Assign each image to `train`, `val` or `test`.

    The images are first divided into folds: groups are never divided, and the kinds are distributed evenly. If the
    source has a test folder, its images, with their whole groups, form the test split.

    Args:
        kinds: Kind of each image.
        groups: Group of each image.
        given: Split of each image in the source: `train`, `test` or None.
        seed: Seed of the folds.
        val: Fraction of the images for validation.
        test: Fraction of the images for the test split; ignored if the source has a test folder.
        few: Whether the images may be too few to split, because they are added to others: they are then for training.

    Raises:
        DataError: There are too few independent groups for three splits.
    """
    held_out = {group for group, split in zip(groups, given, strict=True) if split == "test"}
    open_images = [i for i, group in enumerate(groups) if group not in held_out]
    wanted = {"val": val} if held_out else {"val": val, "test": test}
    independent = len({groups[i] for i in open_images})
    splits = ["test" if group in held_out else "train" for group in groups]
    if few and independent <= len(wanted):
        return splits
    if independent <= len(wanted):
        raise DataError(
            f"Expected at least {len(wanted) + 1} independent images to split into train, {', '.join(wanted)}; "
            f"found {independent} (tiles of one picture and near-duplicates count as one image). Add more images."
        )
    folds = _folds([kinds[i] for i in open_images], [groups[i] for i in open_images], seed)
    taken = 0
    for split, fraction in wanted.items():
        count = max(1, round(fraction * len(folds)))
        for fold in folds[taken : taken + count]:
            for i in fold:
                splits[open_images[i]] = split
        taken += count
    empty = sorted(set(SPLITS) - set(splits))
    if empty:
        raise DataError(
            f"Expected images in every split; {', '.join(empty)} would have none of {independent} independent images "
            f"at val {val} and test {test}. Lower --val and --test, or add images."
        )
    return splits


def _folds(kinds: list[str], groups: list[int], seed: int) -> list[list[int]]:
    """Divide the images into up to 20 folds of whole groups, with the kinds distributed as evenly as possible."""
    count = min(_FOLDS, len(set(groups)), max(Counter(kinds).values()))
    if count < 3:
        return _fold_per_group(groups, seed)
    folds = _stratified_folds(kinds, groups, count, seed)
    return folds if all(folds[:2]) else _fold_per_group(groups, seed)


def _stratified_folds(kinds: list[str], groups: list[int], count: int, seed: int) -> list[list[int]]:
    """Divide the images into folds as `sklearn.model_selection.StratifiedGroupKFold` does, with the same result.

    The groups whose kinds are the most uneven come first, after a shuffle; each goes to the fold that leaves the shares
    of the kinds the most alike over the folds or, of equal ones, has the fewest images. scikit-learn is not used,
    because it would add 39 MiB to the light install for this function.
    """
    totals, per_group, group_of = _counts(kinds, groups)
    order = np.arange(len(per_group))
    np.random.RandomState(seed).shuffle(order)
    order = order[np.argsort(-per_group[order].std(axis=1), kind="stable")]
    in_folds = np.zeros((count, len(totals)))
    fold_of = np.zeros(len(per_group), np.int64)
    for group in order:
        fold = _best_fold(in_folds, per_group[group], totals)
        in_folds[fold] += per_group[group]
        fold_of[group] = fold
    return [np.flatnonzero(fold_of[group_of] == fold).tolist() for fold in range(count)]


def _counts(kinds: list[str], groups: list[int]) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Return the images of each kind, those of each group (rows) by kind, and the row of each image's group."""
    _, kind_of, totals = np.unique(kinds, return_inverse=True, return_counts=True)
    group_of = np.unique(groups, return_inverse=True)[1]
    per_group = np.zeros((int(group_of.max()) + 1, len(totals)))
    np.add.at(per_group, (group_of, kind_of), 1)
    return totals, per_group, group_of


def _best_fold(in_folds: NDArray[np.float64], group: NDArray[np.float64], totals: NDArray[np.int64]) -> int:
    """Return the fold that a group is added to, from the images by kind: in the folds, in the group, and in all."""
    count = len(in_folds)
    added = np.repeat(in_folds[np.newaxis], count, axis=0)  # [i]: the folds with the group in fold i
    added[np.arange(count), np.arange(count)] += group
    unevenness = (added / totals).std(axis=1).mean(axis=1).tolist()
    images = in_folds.sum(axis=1).tolist()
    best = 0
    for fold in range(1, count):
        alike = abs(unevenness[fold] - unevenness[best]) <= 1e-8 + 1e-5 * unevenness[best]  # as `numpy.isclose`
        if unevenness[fold] < unevenness[best] or (alike and images[fold] < images[best]):
            best = fold
    return best


def _fold_per_group(groups: list[int], seed: int) -> list[list[int]]:
    """For very few images: one group per fold, the largest group last, so that it stays in training."""
    order = np.random.default_rng(seed).permutation(sorted(set(groups)))
    sizes = Counter(groups)
    ordered = sorted((int(group) for group in order), key=lambda group: sizes[group])
    return [[i for i, other in enumerate(groups) if other == group] for group in ordered]
