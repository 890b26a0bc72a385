"""Groups of related images, which splits must not divide.

Tiles of one picture, overlapping crops and near-duplicates must not be divided between splits. To find them, three
features of the images, each cheap to compute, are compared:
- the grey lines along the four borders: if the last line of one image continues in the first line of another, they are
  neighbouring tiles (`border_lines`);
- hashes of small patches around local extrema: an identical patch in two images means overlapping tiles or crops;
- a thumbnail, compared in all eight orientations: the same picture saved again, rotated, or with another contrast
  (`thumbnails`).
Images that are linked, directly or through others, form a group. A million images take some minutes: no step compares
all pairs. The more images there are, the more alike border lines must be: see `_neighbours`.
"""

import bisect
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nucleus.data.border_lines import CORRELATION, Borders
from nucleus.data.fingerprints import THUMBNAIL, Fingerprint
from nucleus.data.thumbnails import Pairs, Places, linked, near_duplicates

__all__ = ["Joined", "group_images", "join_groups", "picture_names"]

_PARTS = 16
"""Parts of the patches that are sorted one after the other: limits memory."""
_MOST_BY_CHANCE = 0.05
"""Links by chance for each group, at most: far from where they would chain most groups into one."""
_FEW_BY_CHANCE = 10
"""Links by chance that are always accepted."""


def group_images(
    fingerprints: Sequence[Fingerprint],
    pictures: Sequence[str | None],
    known: Sequence[int] = (),
    warn: Callable[[str], None] = lambda _: None,
) -> list[int]:
    """Return the group of each image; groups are numbered 0, 1, ... in the order of their first image.

    Args:
        fingerprints: Fingerprint of each image.
        pictures: Name of the picture that each image was cut from, or None if unknown; images with the same name are
            linked.
        known: Group of each of the first images, if they have one already; images with the same one are linked.
        warn: Called with a sentence if border lines had to be more alike than usual, so that neighbours may be missed.
    """
    if not fingerprints:
        return []
    thumbnails = np.frombuffer(b"".join(item.thumbnail for item in fingerprints), np.uint8).reshape(-1, THUMBNAIL**2)
    pairs = _joined([_same(known), _same(pictures), *_overlaps(fingerprints), near_duplicates(thumbnails)])
    labels = linked(len(fingerprints), _joined([pairs, _neighbours(fingerprints, pairs, warn)]))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels.tolist()]


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
    warn: Callable[[str], None] = lambda _: None,
) -> list[Joined]:
    """Return where images belong that are added to known ones, whose groups and splits stay as they are.

    Args:
        fingerprints: Fingerprint of each image, the known ones first.
        pictures: As for `group_images`.
        known_groups: Group of each known image.
        known_splits: Split of each known image.
        warn: As for `group_images`.
    """
    count = len(known_groups)
    linked = group_images(fingerprints, pictures, known_groups, warn)
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


def _neighbours(fingerprints: Sequence[Fingerprint], others: Pairs, warn: Callable[[str], None]) -> Pairs:
    """Return pairs of neighbouring tiles.

    Lines of unrelated images match by chance, in a number that grows with the square of that of the images. Enough of
    them would chain most images into one group. So only matches count whose score is above what leaves one by chance
    for 20 groups, or ten in all.

    Args:
        fingerprints: Fingerprint of each image.
        others: Pairs that are linked in other ways.
        warn: Called with a sentence if that score is above the usual one.
    """
    count = len(fingerprints)
    sides = list(_borders(fingerprints))
    decoys = [(scores, np.full(len(scores), share)) for scores, share in (each.by_chance() for _, each in sides)]
    chance, shares = (np.concatenate(each) for each in zip(*decoys, strict=True))
    order = np.argsort(-chance, kind="stable")
    expected = np.cumsum(shares[order])
    above = np.append(chance[order], 0.0)  # [k]: the score above which there are k decoys

    def allowed(pairs: Pairs) -> int:
        groups = int(linked(count, pairs).max()) + 1
        return int(np.searchsorted(expected, max(_FEW_BY_CHANCE, _MOST_BY_CHANCE * groups), side="right"))

    most = allowed(others)
    i, j, scores = (np.concatenate(each) for each in zip(*_continued(sides, above[most]), strict=True))

    def links(decoys: int) -> Pairs:
        return i[scores > above[decoys]], j[scores > above[decoys]]

    # What they link leaves fewer groups, of which fewer links by chance are allowed.
    fits = bisect.bisect_left(range(most), True, key=lambda n: allowed(_joined([others, links(most - n)])) >= most - n)
    least = float(above[most - fits])
    if least > CORRELATION:
        warn(
            f"Border lines of so many images ({count}) match by chance: neighbouring tiles are put into one group only "
            f"if their lines agree by more than {least:.3f} (usually {CORRELATION}), so others may be in different "
            "splits. If the names of the files tell which picture they were cut from, use --group-by."
        )
    return links(most - fits)


def _borders(fingerprints: Sequence[Fingerprint]) -> Iterator[tuple[Places, Borders]]:
    """Yield the places of images of the same width or height, and their borders: bottom to top, right to left."""
    for first, second in ((1, 0), (3, 2)):
        by_length = defaultdict(list)
        for index, item in enumerate(fingerprints):
            by_length[item.width if first == 1 else item.height].append(index)
        for length, indices in by_length.items():
            joined = (b"".join(fingerprints[i].line(side) for i in indices) for side in (first, second))
            yield np.array(indices), Borders(*(np.frombuffer(each, np.uint8).reshape(-1, length) for each in joined))


def _continued(
    sides: Sequence[tuple[Places, Borders]], above: float
) -> Iterator[tuple[Places, Places, NDArray[np.float64]]]:
    """Yield the pairs of neighbours of each kind of borders, and their scores."""
    for indices, borders in sides:
        i, j, scores = borders.continued(above)
        yield indices[i], indices[j], scores


def _overlaps(fingerprints: Sequence[Fingerprint]) -> Iterator[Pairs]:
    """Yield each image and the next one that have a patch in common."""
    patches = np.frombuffer(b"".join(item.patches for item in fingerprints), "<u8")
    owners = np.repeat(np.arange(len(fingerprints), dtype=np.uint32), [len(p.patches) // 8 for p in fingerprints])
    for part in range(_PARTS):
        chosen = np.flatnonzero(patches % _PARTS == part)
        chosen = chosen[np.argsort(patches[chosen], kind="stable")]
        same = patches[chosen[1:]] == patches[chosen[:-1]]
        yield owners[chosen[:-1][same]].astype(np.int64), owners[chosen[1:][same]].astype(np.int64)


def _same(names: Sequence[object]) -> Pairs:
    """Return pairs that link the images with the same name; None is no name."""
    first_seen: dict[object, int] = {}
    pairs = [(first_seen.setdefault(name, index), index) for index, name in enumerate(names) if name is not None]
    i, j = np.array(pairs, np.int64).reshape(-1, 2).T
    return i, j


def _joined(pairs: Sequence[Pairs]) -> Pairs:
    i, j = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return i, j
