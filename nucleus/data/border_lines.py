"""Neighbouring tiles, found by their border lines: exactly those that a comparison of all pairs finds.

The last line of a tile continues in the first line of its neighbour: their details correlate, and their levels agree by
Lin's concordance (1989, https://doi.org/10.2307/2532051). Few pairs can be that alike, and the others are passed over
by bounds that hold for every line, so that none is missed:
- The concordance 2 cov / (var a + var b + (mean a - mean b)^2) bounds how far levels and contrasts may differ.
- It also bounds the correlation of the lines from below, so their distance as unit vectors from above, and a distance
  never grows by projection on some axes: cosines of the main frequencies of the lines at hand.
The lines before a border are divided into ever smaller blocks that are alike; with each block go on only the lines
after it that the block's ranges allow. The last blocks are multiplied with them: one product of matrices gives the
bound for each pair. What is left is compared itself, in integers, whose sums have no rounding: the same pairs on every
machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct, idct

__all__ = ["continued_lines"]

# Measured on DSB2018: these thresholds find 76 % of the neighbours cut from its large images (the others meet in empty
# background), and link 9 of 140,000 pairs of unrelated borders (one reversed); of 1,600 generated images, the largest
# group has 8.
_CORRELATION = 0.7
_CONCORDANCE = 0.9
_CONTRAST = 1  # standard deviation of the details, grey values
_WINDOW = 31

_BOUND = 0.899
"""The concordance that bounds are computed for: rounding of 32-bit numbers is less than what it differs by."""
_AXES = 32
_BOX_AXES = 8
"""Axes that blocks are compared by; the later ones tell little."""
_SAMPLE = 20_000
_BLOCK = 256
_COLUMNS = 1 << 14
_DENSE = 0.05
"""From this share of candidates on, multiplying all pairs of a block is faster than gathering some."""
_ROWS = 1 << 14
_FEW_PAIRS = 1 << 20
"""Pairs up to which all are compared at once."""

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Places = NDArray[np.int64]


def continued_lines(before: Bytes, after: Bytes) -> tuple[Places, Places]:
    """Return the pairs (i, j) where line j of `after` continues line i of `before` (both N x L, uint8), i not j.

    Only mutual best matches count, of equal ones the first: the number of chance matches grows with the square of N,
    and they would chain thousands of unrelated images into one group.
    """
    search = _Search(_Lines.of(before), _Lines.of(after))
    search.run()
    return search.mutual()


@dataclass(frozen=True)
class _Lines:
    """Lines with contrast, of equal ones the first two, and what their scores are computed from; sums are exact.

    Attributes:
        place: Place of each line among those that were given.
        values: Grey values, n x L, uint8.
        details: 31 times the values minus their local mean, n x L, int16.
        sums: Sums of the values.
        spreads: L times the sum of squares of the values, minus the square of their sum: L^2 times the variance.
        energies: Sums of the squares of the details.
    """

    place: Places
    values: Bytes
    details: NDArray[np.int16]
    sums: Doubles
    spreads: Doubles
    energies: Doubles

    @classmethod
    def of(cls, lines: Bytes) -> _Lines:
        place = _with_contrast(lines)
        place = place[_first_two(lines[place])]
        values = lines[place]
        details = np.empty(values.shape, np.int16)
        facts = np.empty((3, len(place)))
        for start in range(0, len(place), _ROWS):
            part = slice(start, start + _ROWS)
            details[part] = _details(values[part])
            whole, fine = values[part].astype(np.float64), details[part].astype(np.float64)
            sums = whole.sum(axis=1)
            facts[:, part] = sums, lines.shape[1] * (whole**2).sum(axis=1) - sums**2, (fine**2).sum(axis=1)
        return cls(place, values, details, *facts)

    def __len__(self) -> int:
        return len(self.place)


def _with_contrast(lines: Bytes) -> Places:
    """Return the places of the lines whose details have enough contrast."""
    found = []
    for start in range(0, len(lines), _ROWS):
        details = _details(lines[start : start + _ROWS]).astype(np.float64)
        squares = lines.shape[1] * (details**2).sum(axis=1) - details.sum(axis=1) ** 2
        found.append(start + np.flatnonzero(squares >= (_WINDOW * _CONTRAST * lines.shape[1]) ** 2))
    return np.concatenate(found)


def _details(lines: Bytes) -> NDArray[np.int16]:
    """Return 31 times each line, minus the sums over 31 values around each value; lines are reflected at their ends."""
    half = _WINDOW // 2
    sums = np.cumsum(np.pad(lines, ((0, 0), (half + 1, half)), mode="symmetric").astype(np.int32), axis=1)
    return np.asarray(_WINDOW * lines.astype(np.int32) - (sums[:, _WINDOW:] - sums[:, :-_WINDOW]), np.int16)


def _first_two(lines: Bytes) -> Places:
    """Return the places of the first two of equal lines: no other one can be a mutual best match."""
    if not len(lines):
        return np.empty(0, np.int64)
    whole = np.ascontiguousarray(lines).view(np.dtype((np.void, lines.shape[1])))[:, 0]
    order = np.argsort(whole, kind="stable")
    same = np.zeros(len(order) + 2, bool)  # [i + 2]: equal to the one before
    same[3:] = whole[order][1:] == whole[order][:-1]
    return np.sort(order[~(same[2:] & same[1:-1])])


class _Search:
    """The search for pairs, and the best match of each line so far.

    Args:
        before: The lines before a border, which are divided into blocks.
        after: The lines after it.
    """

    def __init__(self, before: _Lines, after: _Lines) -> None:
        self._before, self._after = before, after
        self._length = before.values.shape[1]
        self._best_after = _Best.none(len(before))
        self._best_before = _Best.none(len(after))

    def run(self) -> None:
        """Compare all pairs that can be alike."""
        if not len(self._before) or not len(self._after):
            return
        if len(self._before) * len(self._after) <= _FEW_PAIRS:
            self._compare_all(np.arange(len(self._before)), np.arange(len(self._after)))
            return
        axes = _main_axes(self._before, self._after)
        self._rows, self._columns = _Points.of(self._before, axes), _Points.of(self._after, axes)
        waiting = [(np.arange(len(self._before)), np.arange(len(self._after)))]
        while waiting:
            rows, columns = waiting.pop()
            columns = columns[_within(self._rows.of_places(rows), self._columns.of_places(columns))]
            if not len(columns):
                continue
            if len(rows) <= _BLOCK:
                self._compare(rows, columns)
            else:
                waiting += [(half, columns) for half in self._rows.halves(rows)]

    def mutual(self) -> tuple[Places, Places]:
        """Return the pairs that are each other's best match."""
        rows = np.flatnonzero(self._best_after.score > 0)
        columns = self._best_after.other[rows]
        both = self._best_before.other[columns] == rows
        return self._before.place[rows[both]], self._after.place[columns[both]]

    def _compare(self, rows: Places, columns: Places) -> None:
        """Compare the lines of a block with those that may be alike."""
        first = self._rows.of_places(rows)
        level = float(first.mean.mean())
        left = first.factors(level)
        for start in range(0, len(columns), _COLUMNS):
            part = columns[start : start + _COLUMNS]
            possible = left @ self._columns.of_places(part).other_factors(level) >= 0
            hits = np.flatnonzero(possible)
            if not len(hits):
                continue
            if len(hits) > _DENSE * possible.size:
                self._compare_all(rows, part)
            else:
                for places in np.array_split(hits, -(-len(hits) // _ROWS)):
                    i, j = rows[places // len(part)], part[places % len(part)]
                    self._note(i, j, *self._paired(i, j))

    def _compare_all(self, rows: Places, columns: Places) -> None:
        """Compare all pairs of two sets of lines."""
        values = self._before.values[rows].astype(np.float64) @ self._after.values[columns].astype(np.float64).T
        details = self._before.details[rows].astype(np.float64) @ self._after.details[columns].astype(np.float64).T
        i, j = (each.ravel() for each in np.broadcast_arrays(rows[:, np.newaxis], columns))
        self._note(i, j, values.ravel(), details.ravel())

    def _paired(self, i: Places, j: Places) -> tuple[Doubles, Doubles]:
        """Return the products of values, and of details, of pairs."""
        pairs = ((self._before.values, self._after.values), (self._before.details, self._after.details))
        values, details = (np.einsum("ij,ij->i", a[i], b[j], dtype=np.float64) for a, b in pairs)
        return values, details

    def _note(self, i: Places, j: Places, values: Doubles, details: Doubles) -> None:
        """Keep the best of pairs, from their products of values and of details."""
        first, second = self._before, self._after
        covariance = self._length * values - first.sums[i] * second.sums[j]
        spread = first.spreads[i] + second.spreads[j] + (first.sums[i] - second.sums[j]) ** 2
        levels = 2 * covariance / spread
        correlation = details / np.sqrt(first.energies[i] * second.energies[j])
        alike = (correlation >= _CORRELATION) & (levels >= _CONCORDANCE) & (first.place[i] != second.place[j])
        i, j, score = i[alike], j[alike], np.minimum(correlation, levels)[alike]
        self._best_after.note(i, j, score)
        self._best_before.note(j, i, score)


@dataclass
class _Best:
    """The best match of each line so far: of equal ones the first.

    Attributes:
        score: Its score; 0 for none.
        other: Its number.
    """

    score: Doubles
    other: Places

    @classmethod
    def none(cls, count: int) -> _Best:
        return cls(np.zeros(count), np.zeros(count, np.int64))

    def note(self, who: Places, other: Places, score: Doubles) -> None:
        """Take matches into account."""
        order = np.lexsort((other, -score, who))
        order = order[np.diff(who[order], prepend=-1) != 0]
        who, other, score = who[order], other[order], score[order]
        better = (score > self.score[who]) | ((score == self.score[who]) & (other < self.other[who]))
        self.score[who[better]], self.other[who[better]] = score[better], other[better]


def _main_axes(before: _Lines, after: _Lines) -> Floats:
    """Return the axes on which the lines, as unit vectors, differ most, L x A: cosines of the main frequencies."""
    length = before.values.shape[1]
    lines = np.concatenate([each.values[:: -(-len(each) // _SAMPLE)] for each in (before, after)])
    energies = (dct(_units(lines), norm="ortho", axis=1) ** 2).sum(axis=0)
    main = np.argsort(-energies, kind="stable")[:_AXES]
    return np.asarray(idct(np.eye(length, dtype=np.float32)[main], norm="ortho", axis=1).T, np.float32)


def _units(lines: Bytes) -> Floats:
    values = lines - lines.mean(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), np.float32)


@dataclass(frozen=True)
class _Points:
    """Lines as points, for bounds of their concordance.

    Attributes:
        axes: Coordinates of the unit vectors on the main axes, n x A.
        rest: Length of what is left of them.
        mean: Mean values.
        deviation: Standard deviations.
    """

    axes: Floats
    rest: Floats
    mean: Floats
    deviation: Floats

    @classmethod
    def of(cls, lines: _Lines, axes: Floats) -> _Points:
        projected = np.empty((len(lines), axes.shape[1]), np.float32)
        for start in range(0, len(lines), _ROWS):
            projected[start : start + _ROWS] = _units(lines.values[start : start + _ROWS]) @ axes
        rest = np.sqrt(np.maximum(0, 1 - (projected**2).sum(axis=1)))
        length = lines.values.shape[1]
        facts = (lines.sums / length, np.sqrt(lines.spreads) / length)
        return cls(projected, rest, *(fact.astype(np.float32) for fact in facts))

    def of_places(self, places: Places) -> _Points:
        return _Points(self.axes[places], self.rest[places], self.mean[places], self.deviation[places])

    def halves(self, places: Places) -> Iterator[Places]:
        """Divide points in two, along what they differ in most; the units are distances that may still be alike."""
        points = self.of_places(places)
        reach = np.sqrt(2 - 2 * _BOUND)
        scaled = [column / reach for column in points.axes[:, :_BOX_AXES].T]
        scaled.append(np.log(points.deviation) / reach)
        scaled.append(points.mean / (reach * np.median(points.deviation)))
        widest = max(scaled, key=np.ptp)
        order = np.argpartition(widest, len(places) // 2)
        yield places[order[: len(places) // 2]]
        yield places[order[len(places) // 2 :]]

    def factors(self, level: float) -> Floats:
        """Return factors (n x F) whose product with `other_factors` is not negative where lines can be alike.

        It is 2 cov - .899 (var a + var b + (mean a - mean b)^2), with the covariance that is possible at most. `level`
        is a grey value near the means, for precision.
        """
        mean, deviation = self.mean - np.float32(level), self.deviation
        own = -_BOUND * (deviation**2 + mean**2)
        columns = (2 * deviation[:, np.newaxis] * self.axes, 2 * deviation * self.rest, 2 * _BOUND * mean, own)
        return np.column_stack([*columns, np.ones_like(own)]).astype(np.float32)

    def other_factors(self, level: float) -> Floats:
        """Return the other factors, F x n."""
        mean, deviation = self.mean - np.float32(level), self.deviation
        own = -_BOUND * (deviation**2 + mean**2)
        columns = (deviation[:, np.newaxis] * self.axes, deviation * self.rest, mean, np.ones_like(own), own)
        return np.column_stack(columns).astype(np.float32).T


def _within(block: _Points, points: _Points) -> Places:
    """Return the places of the points that may be alike with any of a block, by the ranges of the block."""
    level = _outside(points.mean, block.mean) ** 2
    found = np.flatnonzero(_can_agree(block, points.deviation, level, np.float32(1)))
    distance = np.zeros(len(found), np.float32)
    for axis in range(min(_BOX_AXES, points.axes.shape[1])):
        distance += _outside(points.axes[found, axis], block.axes[:, axis]) ** 2
    return found[_can_agree(block, points.deviation[found], level[found], np.float32(1) - distance / np.float32(2))]


def _outside(values: Floats, ranged: Floats) -> Floats:
    """Return how far values are outside the range of others."""
    return np.asarray(np.maximum(np.maximum(ranged.min() - values, values - ranged.max()), 0), np.float32)


def _can_agree(block: _Points, deviation: Floats, level: Floats, correlation: Floats | np.float32) -> NDArray[np.bool_]:
    """Return whether 2 cov can reach .899 (var a + var b + level) for the best standard deviation a of a block."""
    best = np.clip(correlation * deviation / _BOUND, block.deviation.min(), block.deviation.max())
    return np.asarray(2 * correlation * best * deviation >= _BOUND * (best**2 + deviation**2 + level))
