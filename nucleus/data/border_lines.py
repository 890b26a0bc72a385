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

Lines of unrelated images match by chance, the more the more lines there are. How many do is counted with decoys, as in
Elias and Gygi (2007, https://doi.org/10.1038/nmeth1019): a mirrored line is as any other line, and continues none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct, idct

__all__ = ["CORRELATION", "Borders"]

# Measured on DSB2018: these thresholds find 76 % of the neighbours cut from its large images (the others meet in empty
# background), and link 9 of 140,000 pairs of unrelated borders (one reversed).
CORRELATION = 0.7
_CONCORDANCE = 0.9
_CONTRAST = 1  # standard deviation of the details, grey values
_WINDOW = 31

_ROUNDING = 0.001
"""Bounds are computed for a threshold that is lower by so much: rounding of 32-bit numbers is less."""
_AXES = 32
_BOX_AXES = 8
"""Axes that blocks are compared by; the later ones tell little."""
_SAMPLE = 20_000
_DECOYS = 2048
"""Lines that are mirrored to count matches by chance, at most."""
_BLOCK = 1024
_COLUMNS = 1 << 14
_DENSE = 0.05
"""From this share of candidates on, multiplying all pairs of a block is faster than gathering some."""
_ROWS = 1 << 14
_FEW_PAIRS = 1 << 20
"""Pairs up to which all are compared at once."""

_DOT = "ij,ij->i"

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Places = NDArray[np.int64]


class Borders:
    """The lines before and after the borders of N images, and the pairs of them that continue each other.

    Only mutual best matches count, of equal ones the first: the number of chance matches grows with the square of N,
    and they would chain thousands of unrelated images into one group.

    Args:
        before: The last line of each image, N x L, uint8.
        after: The first line of each, N x L, uint8.
    """

    def __init__(self, before: Bytes, after: Bytes) -> None:
        lines = _Lines.of(before), _Lines.of(after)
        many = len(lines[0]) * len(lines[1]) > _FEW_PAIRS
        self._axes = _main_axes(*lines) if many else np.empty((before.shape[1], 0), np.float32)
        self._before, self._after = (_Side.of(each, self._axes) for each in lines)

    def continued(self, above: float = 0.0) -> tuple[Places, Places, Doubles]:
        """Return pairs (i, j) where line j after the border continues line i before it, i not j, and their scores.

        Args:
            above: Only pairs with a higher score, which lies in (.7, 1].
        """
        search = _Search(self._before, self._after, above)
        search.run()
        i = np.flatnonzero(search.best_after.score > 0)
        j = search.best_after.other[i]
        mutual = search.best_before.other[j] == i
        i, j = i[mutual], j[mutual]
        return self._before.lines.place[i], self._after.lines.place[j], search.best_after.score[i]

    def by_chance(self) -> tuple[Doubles, float]:
        """Return the scores of pairs by chance, found with some mirrored lines, and for how many pairs each stands."""
        count = len(self._before.lines)
        chosen = np.arange(0, count, -(-count // _DECOYS) or 1)
        decoys = _Search(self._before.mirrored(chosen, self._axes), self._after)
        decoys.run()
        i = np.flatnonzero(decoys.best_after.score > 0)
        columns, j = np.unique(decoys.best_after.other[i], return_inverse=True)
        back = _Search(self._before, self._after.mirrored(columns, self._axes))
        back.run()
        mutual = back.best_before.other[j] == chosen[i]
        return decoys.best_after.score[i[mutual]], count / max(1, len(chosen))


@dataclass(frozen=True)
class _Lines:
    """Lines with contrast, of equal ones the first two, and what their scores are computed from; sums are exact.

    Attributes:
        place: Place of each line among those that were given.
        values: Grey values, n x L, uint8.
        sums: Sums of the values.
        spreads: L times the sum of squares of the values, minus the square of their sum: L^2 times the variance.
        energies: Sums of the squares of the details.
    """

    place: Places
    values: Bytes
    sums: Doubles
    spreads: Doubles
    energies: Doubles

    @classmethod
    def of(cls, lines: Bytes) -> _Lines:
        energies = np.empty(len(lines))
        facts = np.empty((2, len(lines)))
        varied = np.empty(len(lines), bool)
        length = lines.shape[1]
        for start in range(0, len(lines), _ROWS):
            part = slice(start, start + _ROWS)
            whole, fine = lines[part], _details(lines[part])
            sums, squares, fine_sums, energies[part] = (
                np.einsum(how, *each, dtype=np.float64)
                for how, each in (("ij->i", [whole]), (_DOT, [whole] * 2), ("ij->i", [fine]), (_DOT, [fine] * 2))
            )
            facts[:, part] = sums, length * squares - sums**2
            varied[part] = length * energies[part] - fine_sums**2 >= (_WINDOW * _CONTRAST * length) ** 2
        place = np.flatnonzero(varied)
        place = place[_first_two(lines[place])]
        sums, spreads = facts[:, place]
        return cls(place, lines[place], sums, spreads, energies[place])

    def mirrored(self, places: Places) -> _Lines:
        """Return some of the lines, from their end to their start."""
        facts = (self.sums[places], self.spreads[places], self.energies[places])
        return _Lines(self.place[places], np.ascontiguousarray(self.values[places, ::-1]), *facts)

    def __len__(self) -> int:
        return len(self.place)


def _details(lines: Bytes) -> NDArray[np.int16]:
    """Return 31 times each line, minus the sums over 31 values around each value; lines are reflected at their ends."""
    sums = cv2.boxFilter(lines, cv2.CV_32S, (_WINDOW, 1), normalize=False, borderType=cv2.BORDER_REFLECT)
    return np.asarray(_WINDOW * lines.astype(np.int32) - sums.reshape(lines.shape), np.int16)


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
    """The search for pairs.

    Args:
        before: The lines before a border, which are divided into blocks.
        after: The lines after it.
        above: Scores must be higher.

    Attributes:
        best_after: The best match of each line before the border so far.
        best_before: The best match of each line after it.
    """

    def __init__(self, before: _Side, after: _Side, above: float = 0.0) -> None:
        self._before, self._after = before.lines, after.lines
        self._rows, self._columns = before.points, after.points
        self._above = above
        self._bound = max(_CONCORDANCE, above) - _ROUNDING
        self.best_after = _Best.none(len(self._before))
        self.best_before = _Best.none(len(self._after))

    def run(self) -> None:
        """Compare all pairs that can be alike."""
        if not len(self._before) or not len(self._after):
            return
        rows, columns = np.arange(len(self._before)), np.arange(len(self._after))
        if len(rows) * len(columns) <= _FEW_PAIRS:
            self._compare_all(rows, columns)
            return
        waiting = [(rows, columns)]
        while waiting:
            rows, columns = waiting.pop()
            columns = _possible(self._rows.of_places(rows), self._columns, columns, self._bound)
            if not len(columns):
                continue
            if len(rows) <= _BLOCK:
                self._compare(rows, columns)
            else:
                waiting += [(half, columns) for half in self._rows.halves(rows, self._bound)]

    def _compare(self, rows: Places, columns: Places) -> None:
        """Compare the lines of a block with those that may be alike."""
        level = float(self._rows.mean[rows].mean())
        left = self._rows.factors(rows, level, self._bound)
        for start in range(0, len(columns), _COLUMNS):
            part = columns[start : start + _COLUMNS]
            possible = left @ self._columns.other_factors(part, level, self._bound).T >= 0
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
        first, second = self._before.values[rows], self._after.values[columns]
        pairs = ((first, second), (_details(first), _details(second)))
        values, details = (a.astype(np.float64) @ b.astype(np.float64).T for a, b in pairs)
        i, j = (each.ravel() for each in np.broadcast_arrays(rows[:, np.newaxis], columns))
        self._note(i, j, values.ravel(), details.ravel())

    def _paired(self, i: Places, j: Places) -> tuple[Doubles, Doubles]:
        """Return the products of values, and of details, of pairs."""
        first, second = self._before.values[i], self._after.values[j]
        pairs = ((first, second), (_details(first), _details(second)))
        values, details = (np.einsum(_DOT, a, b, dtype=np.float64) for a, b in pairs)
        return values, details

    def _note(self, i: Places, j: Places, values: Doubles, details: Doubles) -> None:
        """Keep the best of pairs, from their products of values and of details."""
        first, second = self._before, self._after
        covariance = first.values.shape[1] * values - first.sums[i] * second.sums[j]
        spread = first.spreads[i] + second.spreads[j] + (first.sums[i] - second.sums[j]) ** 2
        levels = 2 * covariance / spread
        correlation = details / np.sqrt(first.energies[i] * second.energies[j])
        score = np.minimum(correlation, levels)
        alike = (correlation >= CORRELATION) & (levels >= _CONCORDANCE) & (score > self._above)
        alike &= first.place[i] != second.place[j]
        i, j, score = i[alike], j[alike], score[alike]
        self.best_after.note(i, j, score)
        self.best_before.note(j, i, score)


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
        boxes: Coordinates of the unit vectors on the first axes, B x n.
        scaled: Coordinates on all axes and length of what is left, times the standard deviation, n x (A + 1).
        mean: Mean values.
        deviation: Standard deviations.
    """

    boxes: Floats
    scaled: Floats
    mean: Floats
    deviation: Floats

    @classmethod
    def of(cls, lines: _Lines, axes: Floats) -> _Points:
        length = lines.values.shape[1]
        mean, deviation = ((each / length).astype(np.float32) for each in (lines.sums, np.sqrt(lines.spreads)))
        count = axes.shape[1]
        boxes = np.empty((min(_BOX_AXES, count), len(lines)), np.float32)
        scaled = np.empty((len(lines), count + 1), np.float32)
        for start in range(0, len(lines), _ROWS):
            part = slice(start, start + _ROWS)
            projected = _units(lines.values[part]) @ axes
            boxes[:, part] = projected[:, : len(boxes)].T
            scaled[part, :count] = projected
            scaled[part, count] = np.sqrt(np.maximum(0, 1 - (projected**2).sum(axis=1)))
            scaled[part] *= deviation[part, np.newaxis]
        return cls(boxes, scaled, mean, deviation)

    def of_places(self, places: Places) -> _Points:
        """Return some of the points, without what only `factors` needs."""
        return _Points(self.boxes[:, places], self.scaled[:0], self.mean[places], self.deviation[places])

    def halves(self, places: Places, bound: float) -> Iterator[Places]:
        """Divide points in two, along what they differ in most; the units are distances that may still be alike."""
        points = self.of_places(places)
        reach = np.sqrt(2 - 2 * bound)
        scaled = [column / reach for column in points.boxes]
        scaled.append(np.log(points.deviation) / reach)
        scaled.append(points.mean / (reach * np.median(points.deviation)))
        widest = max(scaled, key=np.ptp)
        order = np.argpartition(widest, len(places) // 2)
        yield places[order[: len(places) // 2]]
        yield places[order[len(places) // 2 :]]

    def factors(self, places: Places, level: float, bound: float) -> Floats:
        """Return factors (n x F) whose product with `other_factors` is not negative where lines can be alike.

        It is 2 cov - bound (var a + var b + (mean a - mean b)^2), with the covariance that is possible at most. `level`
        is a grey value near the means, for precision.
        """
        factors = self.other_factors(places, level, bound)
        factors[:, :-3] *= 2
        factors[:, -3] *= 2 * bound
        factors[:, -2:] = factors[:, :-3:-1]
        return factors

    def other_factors(self, places: Places, level: float, bound: float) -> Floats:
        """Return the other factors, n x F."""
        factors = np.empty((len(places), self.scaled.shape[1] + 3), np.float32)
        factors[:, :-3] = self.scaled[places]
        mean, deviation = self.mean[places] - np.float32(level), self.deviation[places]
        factors[:, -3] = mean
        factors[:, -2] = 1
        factors[:, -1] = -bound * (deviation**2 + mean**2)
        return factors


@dataclass(frozen=True)
class _Side:
    """The lines on one side of a border, and their points."""

    lines: _Lines
    points: _Points

    @classmethod
    def of(cls, lines: _Lines, axes: Floats) -> _Side:
        return cls(lines, _Points.of(lines, axes))

    def mirrored(self, places: Places, axes: Floats) -> _Side:
        """Return some of the lines, from their end to their start."""
        return _Side.of(self.lines.mirrored(places), axes)


def _possible(block: _Points, points: _Points, places: Places, bound: float) -> Places:
    """Return those of some points that may be alike with any of a block, by the ranges of the block."""
    deviation, level = points.deviation[places], _outside(points.mean[places], block.mean) ** 2
    distance = np.zeros(len(places), np.float32)
    for axis in range(-1, len(points.boxes)):
        if axis >= 0:
            distance += _outside(points.boxes[axis][places], block.boxes[axis]) ** 2
        found = _can_agree(block, deviation, level, np.float32(1) - distance / np.float32(2), bound)
        places, deviation, level, distance = places[found], deviation[found], level[found], distance[found]
    return places


def _outside(values: Floats, ranged: Floats) -> Floats:
    """Return how far values are outside the range of others."""
    return np.asarray(np.maximum(np.maximum(ranged.min() - values, values - ranged.max()), 0), np.float32)


def _can_agree(
    block: _Points, deviation: Floats, level: Floats, correlation: Floats, bound: float
) -> NDArray[np.bool_]:
    """Return whether 2 cov can reach bound * (var a + var b + level) for the best standard deviation a of a block."""
    best = np.clip(correlation * deviation / bound, block.deviation.min(), block.deviation.max())
    return np.asarray(2 * correlation * best * deviation >= bound * (best**2 + deviation**2 + level))
