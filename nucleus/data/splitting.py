"""Split images into train, val and test so that no group falls on both sides."""

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from nucleus.data.manifest import SPLITS
from nucleus.errors import DataError

__all__ = ["split_images"]

_FOLDS = 20


def split_images(
    kinds: Sequence[str],
    groups: Sequence[int],
    given: Sequence[str | None],
    *,
    seed: int,
    val: float,
    test: float,
) -> list[str]:
    """Assign each image to `train`, `val` or `test`.

    Folds come from scikit-learn's `StratifiedGroupKFold`: whole groups, each kind spread evenly. Where the source
    itself has a test folder, its images (with their whole groups) are the test split.

    Args:
        kinds: The kind of each image.
        groups: The group of each image.
        given: `train`, `test` or None for each image.
        seed: Decides the folds.
        val: Fraction for validation.
        test: Fraction for test; without effect where the source has a test folder.

    Raises:
        DataError: Too few independent groups to have all three splits.
    """
    held_out = {group for group, split in zip(groups, given, strict=True) if split == "test"}
    open_images = [i for i, group in enumerate(groups) if group not in held_out]
    wanted = {"val": val} if held_out else {"val": val, "test": test}
    independent = len({groups[i] for i in open_images})
    if independent <= len(wanted):
        raise DataError(
            f"Expected at least {len(wanted) + 1} independent images to split into train, {', '.join(wanted)}; "
            f"found {independent} (tiles of one picture and near-duplicates count as one). Add more images."
        )
    splits = ["test" if group in held_out else "train" for group in groups]
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
            f"at val {val} and test {test}. Set --val and --test lower, or add images."
        )
    return splits


def _folds(kinds: list[str], groups: list[int], seed: int) -> list[list[int]]:
    """Cut positions into up to 20 folds of whole groups, each kind spread as evenly as its groups allow."""
    # scikit-learn wants at least one kind with as many images as folds.
    count = min(_FOLDS, len(set(groups)), max(Counter(kinds).values()))
    if count < 3:
        return _fold_per_group(groups, seed)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        folds = [fold.tolist() for _, fold in splitter.split(kinds, kinds, groups)]
    return folds if all(folds[:2]) else _fold_per_group(groups, seed)


def _fold_per_group(groups: list[int], seed: int) -> list[list[int]]:
    """For a handful of images: each group a fold, the largest group last, so that it stays in training."""
    order = np.random.default_rng(seed).permutation(sorted(set(groups)))
    sizes = Counter(groups)
    ordered = sorted((int(group) for group in order), key=lambda group: sizes[group])
    return [[i for i, other in enumerate(groups) if other == group] for group in ordered]
