"""Near-duplicates, found by their thumbnails: the same picture saved again, turned, mirrored, or with another contrast.

Two images are near-duplicates if their thumbnails correlate by .9 or more in one of eight orientations. Up to some
thousand images, all pairs are compared. Of more, those are that fall into a bucket together: a thumbnail is turned so
that it agrees best with a random pattern, and its bucket are the signs of its products with other random patterns
(Charikar 2002, https://doi.org/10.1145/509907.509965). Two thumbnails at a correlation of .9 have the same sign with a
probability of 1 - acos(.9) / pi = .856, unrelated ones of .5. There are so many tables of buckets, each with other
patterns, that a pair at the threshold is missed with a probability of a millionth, and closer ones with less. The
patterns come from a fixed seed, and the comparison itself is in integers without rounding: the same images give the
same links on every machine.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nucleus.data.fingerprints import THUMBNAIL

__all__ = ["linked", "near_duplicates"]

_CORRELATION = 0.9
"""No two thumbnails of unrelated images of DSB2018 correlate above .8."""
_ALL_PAIRS = 2048
"""Number of images up to which all pairs are compared."""
_MISSED = 1e-6
_SAME_SIGN = 1 - math.acos(_CORRELATION) / math.pi
_SAME_TURN = 0.6
"""Probability that two thumbnails at a correlation of .9 are turned alike; .66 was measured on DSB2018."""
_TABLES = 8
"""Tables for each way to turn the thumbnails."""
_MOST_SIGNS = 24
_ROWS = 1 << 14
_PAIRS = 1 << 18
"""Pairs that are compared at a time: limits memory."""
_VALUES = THUMBNAIL**2

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Places = NDArray[np.int64]
Pairs = tuple[Places, Places]


def linked(count: int, pairs: Pairs) -> Places:
    """Return a number for each of `count` items, the same for those that pairs link, directly or through others."""
    graph = coo_array((np.ones(len(pairs[0]), np.int8), pairs), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def near_duplicates(thumbnails: Bytes) -> Pairs:
    """Return pairs (i, j) that link all near-duplicates, directly or through others.

    Args:
        thumbnails: 16 x 16 grey values of each image in a row, N x 256. Constant ones are like no other.
    """
    varied = np.flatnonzero(np.ptp(thumbnails, axis=1))
    values = thumbnails[varied]
    i, j = _of_all_pairs(values) if len(values) <= _ALL_PAIRS else _of_buckets(values)
    return varied[i], varied[j]


def _orientations() -> Places:
    """Return the places of the values of a thumbnail in each orientation, 8 x 256."""
    upright = np.arange(_VALUES).reshape(THUMBNAIL, THUMBNAIL)
    return np.stack([np.rot90(each, turns).ravel() for each in (upright, upright[:, ::-1]) for turns in range(4)])


def _sums(values: Bytes) -> tuple[Doubles, Doubles]:
    """Return the sum of each thumbnail, and 256 times that of its squares minus the square of its sum."""
    sums = values.sum(axis=1, dtype=np.float64)
    squares = np.einsum("ij,ij->i", values, values, dtype=np.float64)
    return sums, _VALUES * squares - sums**2


def _correlate(products: NDArray[np.floating[Any]], first: tuple[Any, Any], second: tuple[Any, Any]) -> Flags:
    """Return whether thumbnails correlate by .9, from their products and `_sums`, which are whole numbers."""
    covariance = _VALUES * products.astype(np.float64) - first[0] * second[0]
    return np.asarray(covariance >= _CORRELATION * np.sqrt(first[1] * second[1]))


def _of_all_pairs(values: Bytes) -> Pairs:
    """Compare all pairs. Products of 256 bytes are below 2^24, so that 32-bit numbers hold them exactly."""
    sums, spreads = _sums(values)
    turned = [values[:, places].astype(np.float32).T for places in _orientations()]
    found = []
    for start in range(0, len(values), _ROWS >> 4):
        part = slice(start, start + (_ROWS >> 4))
        rows = values[part].astype(np.float32)
        own = (sums[part, np.newaxis], spreads[part, np.newaxis])
        for other in turned:
            i, j = np.nonzero(_correlate(rows @ other, own, (sums, spreads)))
            found.append(np.stack([start + i, j])[:, start + i < j])
    i, j = np.concatenate([np.empty((2, 0), np.int64), *found], axis=1)
    return i, j


def _of_buckets(values: Bytes) -> Pairs:
    """Compare the pairs that share a bucket in one of many tables, unless they are linked already."""
    links = _Links(values)
    rng = np.random.default_rng(0)
    signs = min(math.ceil(math.log2(len(values))) + 1, _MOST_SIGNS)
    for _ in range(_rounds(signs)):
        turned, tables = _turned(values, _pattern(rng, 1)[:, 0], _pattern(rng, _TABLES * signs))
        for keys in tables:
            links.compare(turned, keys)
    return links.pairs()


def _rounds(signs: int) -> int:
    """Return how many rounds of tables miss a pair at the threshold with a probability of a millionth.

    >>> _rounds(21)
    79
    """
    found = _SAME_TURN * (1 - (1 - _SAME_SIGN**signs) ** _TABLES)
    return math.ceil(math.log(_MISSED) / math.log(1 - found))


def _pattern(rng: np.random.Generator, count: int) -> Floats:
    """Return random patterns of mean zero, 256 x count, by which the mean of a thumbnail does not matter."""
    pattern = rng.normal(size=(_VALUES, count))
    return np.asarray(pattern - pattern.mean(axis=0), np.float32)


def _turned(values: Bytes, direction: Floats, patterns: Floats) -> tuple[Bytes, NDArray[np.uint64]]:
    """Return the thumbnails, turned to agree best with a direction, and their buckets in each table, T x N."""
    orientations = _orientations()
    directions = np.empty((_VALUES, len(orientations)), np.float32)
    for number, places in enumerate(orientations):
        directions[places, number] = direction
    weights = np.float32(2) ** np.arange(patterns.shape[1] // _TABLES, dtype=np.float32)
    turned = np.empty_like(values)
    keys = np.empty((_TABLES, len(values)), np.uint64)
    for start in range(0, len(values), _ROWS):
        part = slice(start, start + _ROWS)
        best = (values[part].astype(np.float32) @ directions).argmax(axis=1)
        turned[part] = np.take_along_axis(values[part], orientations[best], axis=1)
        positive = (turned[part].astype(np.float32) @ patterns > 0).reshape(len(best), _TABLES, -1)
        keys[:, part] = (positive.astype(np.float32) @ weights).T
    return turned, keys


class _Links:
    """The links between thumbnails so far.

    Args:
        values: The thumbnails, N x 256.
    """

    def __init__(self, values: Bytes) -> None:
        self._sums, self._spreads = _sums(values)
        self._group = np.arange(len(values))
        self._found: list[NDArray[np.int64]] = [np.empty((2, 0), np.int64)]

    def pairs(self) -> Pairs:
        """Return the pairs that were linked."""
        i, j = np.concatenate(self._found, axis=1)
        return i, j

    def compare(self, turned: Bytes, keys: NDArray[np.uint64]) -> None:
        """Compare thumbnails with the same key: neighbours in the bucket, then, of several groups, all with all."""
        places = np.sort(keys << np.uint64(32) | np.arange(len(keys), dtype=np.uint64))
        keys, places = places >> np.uint64(32), (places & np.uint64(0xFFFFFFFF)).astype(np.int64)
        apart = 1
        while len(places) > apart:
            same = keys[apart:] == keys[:-apart]
            if not same.any():
                return
            self._link(turned, places[:-apart][same], places[apart:][same])
            if apart == 1:
                mixed = self._mixed(keys, places)
                keys, places = keys[mixed], places[mixed]
            apart += 1

    def _mixed(self, keys: NDArray[np.uint64], places: Places) -> Flags:
        """Return which thumbnails are in a bucket with others that they are not linked with."""
        starts = np.flatnonzero(np.diff(keys, prepend=keys[0] + 1))
        groups = self._group[places]
        mixed = np.minimum.reduceat(groups, starts) != np.maximum.reduceat(groups, starts)
        return np.repeat(mixed, np.diff(starts, append=len(keys)))

    def _link(self, turned: Bytes, i: Places, j: Places) -> None:
        """Link the pairs that correlate and are not linked yet."""
        new = self._group[i] != self._group[j]
        i, j = i[new], j[new]
        alike = [np.empty(0, bool)]
        for start in range(0, len(i), _PAIRS):
            first, second = i[start : start + _PAIRS], j[start : start + _PAIRS]
            products = np.einsum("ij,ij->i", turned[first], turned[second], dtype=np.float32)
            alike.append(_correlate(products, self._facts(first), self._facts(second)))
        chosen = np.concatenate(alike)
        if chosen.any():
            i, j = i[chosen], j[chosen]
            self._found.append(np.stack([i, j]))
            self._group = linked(len(self._group), (self._group[i], self._group[j]))[self._group]

    def _facts(self, places: Places) -> tuple[Doubles, Doubles]:
        return self._sums[places], self._spreads[places]
