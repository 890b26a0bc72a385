"""Splits into train, val and test: groups of related images, and their assignment to splits.

Tiles of one picture, overlapping crops and near-duplicates must not be divided between splits. To find them, three
features of the images, each cheap to compute, are compared:
- the grey lines along the four borders: if the last line of one image continues in the first line of another, they are
  neighbouring tiles (their details correlate, and their levels agree by Lin's concordance, 1989);
- hashes of small patches around local extrema: an identical patch in two images means overlapping tiles or crops;
- a thumbnail, compared in all eight orientations: the same picture saved again, rotated, or with another contrast.
Images that are linked, directly or through others, form a group.
"""

import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nucleus.data.dataset import SPLITS
from nucleus.data.images import RgbImage
from nucleus.errors import DataError, UsageError

__all__ = [
    "Fingerprint",
    "Joined",
    "SplitOptions",
    "fingerprint",
    "group_images",
    "join_groups",
    "picture_names",
    "split_images",
]


# Measured on DSB2018: these thresholds find 76 % of the neighbours cut from its large images (the others meet in empty
# background), and link 9 of 140,000 pairs of unrelated borders (one reversed); of 1,600 generated images, the largest
# group has 8. No two thumbnails of DSB2018 correlate above .7.
_LINE_CORRELATION = 0.7
_LINE_CONCORDANCE = 0.9
_LINE_CONTRAST = 1.0  # standard deviation of the details, grey values
_LINE_WINDOW = 31
_THUMBNAIL = 16
_THUMBNAIL_CORRELATION = 0.9
_PATCH = 17
_PATCH_CONTRAST = 3.0
_PATCHES = 64
_ROWS = 1024  # images that are compared with all others at a time: limits memory
_FOLDS = 20

Floats = NDArray[np.float32]


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


@dataclass(frozen=True)
class Fingerprint:
    """Features of an image for comparing it with others.

    Attributes:
        borders: Grey values along the borders: top, bottom, left, right.
        patches: Hashes of exact patches.
        thumbnail: 16 x 16 grey values in one row, zero mean, norm one (zero for a constant image).
    """

    borders: tuple[Floats, Floats, Floats, Floats]
    patches: frozenset[int]
    thumbnail: Floats


def fingerprint(image: RgbImage) -> Fingerprint:
    """Return the fingerprint of an image (H x W x 3, uint8)."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32)
    lines = (grey[0], grey[-1], grey[:, 0], grey[:, -1])
    top, bottom, left, right = (line.astype(np.float32) for line in lines)
    return Fingerprint((top, bottom, left, right), _patch_hashes(grey), _unit((small - small.mean()).ravel()))


def group_images(
    fingerprints: Sequence[Fingerprint], pictures: Sequence[str | None], known: Sequence[int] = ()
) -> list[int]:
    """Return the group of each image; groups are numbered 0, 1, ... in the order of their first image.

    Args:
        fingerprints: Fingerprint of each image.
        pictures: Name of the picture that each image was cut from, or None if unknown; images with the same name are
            linked.
        known: Group of each of the first images, if they have one already; images with the same one are linked.
    """
    links = {
        *_same_picture(list(map(str, known))),
        *_neighbours(fingerprints),
        *_overlaps(fingerprints),
        *_near_duplicates(fingerprints),
        *_same_picture(pictures),
    }
    count = len(fingerprints)
    rows, columns = (np.array([link[i] for link in links], np.int64) for i in (0, 1))
    graph = coo_array((np.ones(len(links), np.int8), (rows, columns)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    numbers: dict[int, int] = {}
    return [numbers.setdefault(int(label), len(numbers)) for label in labels]


def picture_names(titles: Sequence[str], pattern: re.Pattern[str] | None) -> list[str | None]:
    """Return the name of the picture that each image was cut from, which the pattern finds in its title, or None.

    >>> picture_names(["P1_a", "x"], re.compile(r"^(P\\d)_"))
    ['P1', None]
    """
    if pattern is None:
        return [None] * len(titles)
    matches = [pattern.search(title) for title in titles]
    return [match and match.group(1 if pattern.groups else 0) for match in matches]


@dataclass(frozen=True)
class Joined:
    """Where an image that is added to others belongs.

    Attributes:
        group: Its group: that of the images that it is linked with, or a new one.
        splits: The splits of the images that it is linked with, directly or through others; none if the group is new.
            With several, it belongs to none of them, as it would divide a group between splits.
    """

    group: int
    splits: tuple[str, ...]


def join_groups(
    fingerprints: Sequence[Fingerprint],
    pictures: Sequence[str | None],
    known_groups: Sequence[int],
    known_splits: Sequence[str],
) -> list[Joined]:
    """Return where images belong that are added to known ones, whose groups and splits stay as they are.

    Args:
        fingerprints: Fingerprint of each image, the known ones first.
        pictures: As for `group_images`.
        known_groups: Group of each known image.
        known_splits: Split of each known image.
    """
    count = len(known_groups)
    linked = group_images(fingerprints, pictures, known_groups)
    group_of: dict[int, int] = {}
    splits: dict[int, set[str]] = defaultdict(set)
    for number, group, split in zip(linked[:count], known_groups, known_splits, strict=True):
        group_of[number] = min(group, group_of.get(number, group))
        splits[number].add(split)
    following = itertools.count(max(known_groups, default=-1) + 1)
    joined = []
    for number in linked[count:]:
        if number not in group_of:
            group_of[number] = next(following)
        joined.append(Joined(group_of[number], tuple(sorted(splits[number]))))
    return joined


def _unit(values: Floats) -> Floats:
    """Scale the last axis to norm one; zeros stay zero."""
    norm = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.asarray(values / np.maximum(norm, 1e-6), np.float32)


def _patch_hashes(grey: NDArray[np.uint8]) -> frozenset[int]:
    half = _PATCH // 2
    if min(grey.shape) < 2 * _PATCH:
        return frozenset()
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 2)
    window = np.ones((2 * _PATCH - 1, 2 * _PATCH - 1), np.uint8)
    highest, lowest = cv2.dilate(smooth, window), cv2.erode(smooth, window)
    # Bright peaks are nuclei in dark-field images; dark peaks are nuclei in stained and bright-field images.
    peak = ((smooth == highest) | (smooth == lowest)) & (highest - lowest >= _PATCH_CONTRAST)
    # Peaks near the border depend on pixels outside the image, so another tile would not find them.
    peak[: 2 * _PATCH] = peak[-2 * _PATCH :] = False
    peak[:, : 2 * _PATCH] = peak[:, -2 * _PATCH :] = False
    hashes = set()
    for y, x in np.argwhere(peak):
        patch = grey[y - half : y + half + 1, x - half : x + half + 1]
        if patch.std() >= _PATCH_CONTRAST:
            hashes.add(int.from_bytes(hashlib.blake2b(patch.tobytes(), digest_size=8).digest(), "big"))
    return frozenset(sorted(hashes)[:_PATCHES])  # the lowest hashes, so that every tile makes the same choice


def _neighbours(fingerprints: Sequence[Fingerprint]) -> Iterator[tuple[int, int]]:
    for first, second in ((1, 0), (3, 2)):  # bottom to top, right to left
        by_length = defaultdict(list)
        for index, item in enumerate(fingerprints):
            by_length[item.borders[first].size].append(index)
        for indices in by_length.values():
            before = np.stack([fingerprints[i].borders[first] for i in indices])
            after = np.stack([fingerprints[i].borders[second] for i in indices])
            yield from _continued(before, after, indices)


def _continued(before: Floats, after: Floats, indices: list[int]) -> Iterator[tuple[int, int]]:
    """Yield pairs of images where the second continues the first, from their border lines (N x L each).

    Only mutual best matches count: the number of chance matches grows with the square of N, and they would chain
    thousands of unrelated images into one group.
    """
    count = len(indices)
    detail_before, detail_after = _details(before), _details(after)
    best_after, best_before = np.zeros(count, np.int64), np.zeros(count, np.int64)
    score_after, score_before = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for start in range(0, count, _ROWS):
        rows = np.arange(start, min(start + _ROWS, count))
        details, levels = detail_before[rows] @ detail_after.T, _concordance(before[rows], after)
        alike = (details >= _LINE_CORRELATION) & (levels >= _LINE_CONCORDANCE)
        scores = np.where(alike, np.minimum(details, levels), 0)
        scores[rows - start, rows] = 0  # no image is its own neighbour
        best_after[rows], score_after[rows] = scores.argmax(axis=1), scores.max(axis=1)
        better = scores.max(axis=0) > score_before
        best_before[better] = start + scores.argmax(axis=0)[better]
        score_before = np.maximum(score_before, scores.max(axis=0))
    for i in np.flatnonzero(score_after):
        if best_before[best_after[i]] == i:
            yield indices[int(i)], indices[int(best_after[i])]


def _details(lines: Floats) -> Floats:
    """Return lines (N x L) minus their local mean, scaled to norm one; zero for lines without contrast."""
    details = lines - cv2.blur(lines, (_LINE_WINDOW, 1), borderType=cv2.BORDER_REFLECT)
    return _unit(details * (details.std(axis=1, keepdims=True) >= _LINE_CONTRAST))


def _concordance(a: Floats, b: Floats) -> Floats:
    """Return Lin's concordance correlation of each row of `a` with each row of `b`; 1 for identical lines."""
    mean_a, mean_b = a.mean(axis=1, keepdims=True), b.mean(axis=1, keepdims=True)
    covariance = (a - mean_a) @ (b - mean_b).T / a.shape[1]
    spread = a.var(axis=1)[:, np.newaxis] + b.var(axis=1)[np.newaxis] + (mean_a - mean_b.T) ** 2
    return np.asarray(2 * covariance / np.maximum(spread, 1e-6), np.float32)


def _near_duplicates(fingerprints: Sequence[Fingerprint]) -> Iterator[tuple[int, int]]:
    count = len(fingerprints)
    upright = np.stack([item.thumbnail for item in fingerprints]).reshape(count, _THUMBNAIL, _THUMBNAIL)
    for flipped in (upright, upright[:, :, ::-1]):
        for quarter_turns in range(4):
            turned = np.rot90(flipped, quarter_turns, axes=(1, 2)).reshape(count, -1)
            for start in range(0, count, _ROWS):
                rows = upright[start : start + _ROWS].reshape(-1, turned.shape[1])
                for i, j in np.argwhere(rows @ turned.T >= _THUMBNAIL_CORRELATION):
                    if start + i < j:
                        yield start + int(i), int(j)


def _overlaps(fingerprints: Sequence[Fingerprint]) -> Iterator[tuple[int, int]]:
    first_seen: dict[int, int] = {}
    for index, item in enumerate(fingerprints):
        for patch in item.patches:
            other = first_seen.setdefault(patch, index)
            if other != index:
                yield other, index


def _same_picture(pictures: Sequence[str | None]) -> Iterator[tuple[int, int]]:
    first_seen: dict[str, int] = {}
    for index, picture in enumerate(pictures):
        if picture is not None and first_seen.setdefault(picture, index) != index:
            yield first_seen[picture], index


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
