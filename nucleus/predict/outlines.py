"""Outlines of labelled nuclei: polygons along the edges of their pixels, made for all nuclei at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

__all__ = ["Outline", "outlines_of"]

_TOLERANCE = 0.49
"""Largest distance from an outline to the edges of the pixels, px. Centres of pixels are half a pixel from them, so
none of them changes sides."""


@dataclass(frozen=True)
class Outline:
    """The outline of a nucleus.

    Coordinates are in pixels, x to the right and y down; the first pixel reaches from 0 to 1. A pixel is in the nucleus
    if its centre is inside an odd number of the rings.

    Attributes:
        label: Label of the nucleus.
        rings: K x 2 each, (x, y), not closed: around the nucleus clockwise as seen, around its holes the other way.
    """

    label: int
    rings: tuple[NDArray[np.float64], ...]

    @property
    def parts(self) -> list[list[NDArray[np.float64]]]:
        """The rings around the parts of the nucleus (one, unless it was cut), each followed by those of its holes."""
        if len(self.rings) == 1:
            return [[self.rings[0]]]
        outer = [[ring] for ring in self.rings if _doubled_area(ring) > 0]
        for hole in (ring for ring in self.rings if _doubled_area(ring) <= 0):
            around = [part for part in outer if len(outer) == 1 or _contains(part[0], hole[0])]
            min(around or outer, key=lambda part: _doubled_area(part[0])).append(hole)
        return outer


def outlines_of(
    labels: NDArray[np.integer], *, top: int = 0, left: int = 0, simplified: bool = True
) -> Iterator[Outline]:
    """Yield the outline of each label, in order.

    The corners of all nuclei are linked along rows and along columns, as the sides of a rectilinear polygon are, and
    the rings are ordered by pointer doubling. Pixels of a nucleus that touch at a corner are connected.

    Args:
        labels: H x W, 0 background.
        top: First row of these labels in their image.
        left: First column.
        simplified: Whether the corners are cut and vertices left out, as far as the outline stays within half a pixel
            of the edges of the pixels; so the same pixels are inside.
    """
    corners = _corners(labels)
    if not len(corners.labels):
        return
    order, starts = _rings(corners)
    of = corners.labels[order][starts].tolist()
    path = corners.x[order] + 1j * corners.y[order]
    if simplified:
        path, starts = _simplified(path, starts, corners.pinched[order])
    points = path.view(np.float64).reshape(-1, 2) + np.array([left, top])
    ends = [*starts[1:].tolist(), len(points)]
    rings = [points[begin:end] for begin, end in zip(starts.tolist(), ends, strict=True)]
    for label, group in groupby(zip(of, rings, strict=True), key=itemgetter(0)):
        yield Outline(label, tuple(ring for _, ring in group))


@dataclass(frozen=True)
class _Corners:
    """Corners of the pixel edges of all labels; a place where two rings of a label meet is two corners.

    Attributes:
        labels: Label of each corner.
        x: Column, 0 to W.
        y: Row, 0 to H.
        row_turn: Order among corners of a label at the same place, along the row.
        column_turn: The same along the column.
        pinched: Whether two rings of the label meet here.
        below: Whether the pixel to the lower right is of the label.
    """

    labels: NDArray[np.integer]
    x: NDArray[np.intp]
    y: NDArray[np.intp]
    row_turn: NDArray[np.int8]
    column_turn: NDArray[np.int8]
    pinched: NDArray[np.bool_]
    below: NDArray[np.bool_]


def _corners(labels: NDArray[np.integer]) -> _Corners:
    padded = np.pad(labels, 1)
    across, down = padded[:, :-1] != padded[:, 1:], padded[:-1] != padded[1:]
    busy = (across[:-1] | across[1:]) & (down[:, :-1] | down[:, 1:])  # else all four pixels are two pairs of equals
    height, width = busy.shape
    quadrants = {(dy, dx): padded[dy : dy + height, dx : dx + width] for dy in (0, 1) for dx in (0, 1)}
    y, x = np.nonzero(busy)
    values = {place: pixels[y, x] for place, pixels in quadrants.items()}
    found = []
    for (dy, dx), own in values.items():
        beside, below, across = values[dy, 1 - dx], values[1 - dy, dx], values[1 - dy, 1 - dx]
        alone, inner = (beside != own) & (below != own), (beside == own) & (below == own) & (across != own)
        here = np.flatnonzero((own > 0) & (alone | inner))
        pinched = (alone & (across == own))[here]
        # Where two pixels touch at a corner, each ring goes around one of the two other pixels.
        turns = (np.where(pinched, turn, 0).astype(np.int8) for turn in (dx, 1 - dx if dy == dx else dx))
        found.append((own[here], x[here], y[here], *turns, pinched, (values[1, 1] == own)[here]))
    return _Corners(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _rings(corners: _Corners) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the corners in the order of their rings, and where each ring starts; sorted by label."""
    rows = _order(corners.labels, corners.y, corners.x, corners.row_turn).reshape(-1, 2)
    columns = _order(corners.labels, corners.x, corners.y, corners.column_turn).reshape(-1, 2)
    heads, tails = np.where(corners.below[rows[:, 0], np.newaxis], rows, rows[:, ::-1]).T
    opposite = np.empty(len(corners.x), np.intp)
    opposite[columns] = columns[:, ::-1]
    number = np.empty(len(corners.x), np.intp)
    number[heads] = np.arange(len(heads))
    following = number[opposite[tails]]
    first = _smallest_of_cycle(following)
    left = _steps_to_end(following, following == first)
    order = _order(first, left.max() - left)
    starts = np.flatnonzero(np.r_[True, np.diff(first[order]) > 0])
    return np.stack([heads[order], tails[order]], axis=1).ravel(), 2 * starts


def _order(*keys: NDArray[np.integer]) -> NDArray[np.intp]:
    """Return the order by some keys, none of them negative, the first of which counts most.

    The keys are sorted as one number, which is several times as fast as `np.lexsort`; a part of an image has few enough
    labels and pixels for that.
    """
    joined = keys[0].astype(np.int64)
    for key in keys[1:]:
        joined = joined * (int(key.max()) + 1) + key
    return np.argsort(joined, kind="stable")


def _smallest_of_cycle(following: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the smallest element of each element's cycle, by pointer doubling."""
    smallest, ahead = np.arange(len(following)), following
    while True:
        found = np.minimum(smallest, smallest[ahead])
        if (found == smallest).all():
            return found
        smallest, ahead = found, ahead[ahead]


def _steps_to_end(following: NDArray[np.intp], last: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the number of steps from each element to the last one of its cycle, by pointer doubling."""
    steps = (~last).astype(np.intp)
    ahead = np.where(last, np.arange(len(following)), following)
    while True:
        added = steps[ahead]
        if not added.any():
            return steps
        steps, ahead = steps + added, ahead[ahead]


def _simplified(
    corners: NDArray[np.complex128], starts: NDArray[np.intp], pinched: NDArray[np.bool_]
) -> tuple[NDArray[np.complex128], NDArray[np.intp]]:
    """Cut the corners of rings by half a pixel, and leave out vertices as long as all stays within the tolerance.

    A vertex is left out if the line between its neighbours is within the tolerance of all that lies between them, for
    which it is enough that the corners are; each is tried once, no two neighbours at the same time. Points are x + iy.
    """
    path, kept, stay, passed = _cut(corners, starts, pinched)
    short, ends = path.astype(np.complex64), corners.astype(np.complex64)  # half the memory to read; exact in a part
    points = np.flatnonzero(kept)
    untried = ~stay[points]
    parity = 0
    while untried.any():
        places = np.flatnonzero(untried)
        places = places[places % 2 == parity]
        parity = 1 - parity
        untried[places] = False
        before, after = points[places - 1], points[places + 1]
        left = np.ones(len(points), np.bool_)
        left[places[_near(short[before], short[after], ends, passed[before], passed[after])]] = False
        points, untried = points[left], untried[left]
    kept = np.zeros(len(path), np.bool_)
    kept[points] = True
    closing = 3 * np.r_[starts[1:], len(corners)] + np.arange(len(starts))
    kept[closing] = False
    counts = np.add.reduceat(kept.astype(np.intp), np.r_[0, closing[:-1] + 1])
    return path[kept], np.r_[0, np.cumsum(counts)[:-1]]


def _cut(
    corners: NDArray[np.complex128], starts: NDArray[np.intp], pinched: NDArray[np.bool_]
) -> tuple[NDArray[np.complex128], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.intp]]:
    """Return the path of all rings with a vertex half a pixel before and after each corner, each ring closed.

    Returns:
        The path; which of its vertices are those of the cut rings; which of these have to stay; and the number of
        corners that come before each vertex.
    """
    ends = np.r_[starts[1:], len(corners)] - 1
    following, before = np.arange(1, len(corners) + 1), np.arange(-1, len(corners) - 1)
    following[ends], before[starts] = starts, ends
    side = corners[following] - corners
    half = side / (2 * np.abs(side))
    triples = np.stack([corners - half[before], corners, corners + half], axis=1)
    single = np.abs(side) == 1  # the vertices after this corner and before the next are one
    kept = np.stack([~single[before], np.zeros(len(corners), np.bool_), np.ones(len(corners), np.bool_)], axis=1)
    stay = np.repeat(pinched[:, np.newaxis], 3, axis=1)
    stay[:, 2] |= pinched[following] & single
    kept[starts, 0] = stay[starts, 0] = True
    closing = 3 * (ends + 1)
    path = np.insert(triples.ravel(), closing, triples[starts, 0])
    last = ends[single[ends]]
    kept[last, 2] = False  # the closing vertex is at the same place
    passed = np.cumsum(np.insert(np.tile([0, 1, 0], len(corners)), closing, 0))
    return path, np.insert(kept.ravel(), closing, True), np.insert(stay.ravel(), closing, True), passed


def _near(
    before: NDArray[np.complex64],
    after: NDArray[np.complex64],
    corners: NDArray[np.complex64],
    first: NDArray[np.intp],
    last: NDArray[np.intp],
) -> NDArray[np.bool_]:
    """Return for pairs of points whether the line between them is near all corners from `first` to before `last`."""
    counts = last - first
    begins = np.cumsum(counts) - counts
    line = after - before
    squared = line.real**2 + line.imag**2
    pair = np.repeat(np.arange(len(counts)), counts)
    # In the direction of the line, x is along it and y across; both are multiplied by its length.
    turned = (corners[np.arange(len(pair)) + (first - begins)[pair]] - before[pair]) * line.conj()[pair]
    length = squared[pair]
    beyond = np.maximum(0, np.maximum(-turned.real, turned.real - length))
    far = np.r_[0, np.cumsum(beyond**2 + turned.imag**2 > _TOLERANCE**2 * length)]
    return np.asarray(far[begins] == far[begins + counts])


def _doubled_area(ring: NDArray[np.float64]) -> float:
    """Return twice the area of a ring, positive if it is clockwise as seen (y down)."""
    x, y = ring.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def _contains(ring: NDArray[np.float64], point: NDArray[np.float64]) -> bool:
    """Return whether a point is inside a ring, by the number of its sides to the right of the point."""
    (x0, y0), (x1, y1) = ring.T, np.roll(ring, -1, axis=0).T
    crossing = (y0 > point[1]) != (y1 > point[1])
    at = x0 + (point[1] - y0) / np.where(crossing, y1 - y0, 1) * (x1 - x0)
    return bool(np.count_nonzero(crossing & (at > point[0])) % 2)
