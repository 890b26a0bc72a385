"""Near-duplicates, found by their thumbnails: the same picture saved again, turned, mirrored, or with another contrast.

Two images are near-duplicates if their thumbnails correlate by .9 or more in one of eight orientations. Up to some
thousand images, all pairs are compared. Of more, those are that fall into a bucket together: a thumbnail is turned so
that it agrees best with a random pattern, and the signs of its products with 128 other random patterns tell how alike
two are (Charikar 2002, https://doi.org/10.1145/509907.509965): at a correlation of .9 each sign is the same with a
probability of 1 - acos(.9) / pi = .856, of unrelated ones with .5. A bucket is a choice among these signs (Indyk and
Motwani 1998, https://doi.org/10.1145/276698.276876). There are so many tables of buckets, each with another choice,
that a pair at the threshold is missed with a probability of a millionth, and closer ones with less. The patterns come
from a fixed seed, and the comparison itself is in integers without rounding: the same images give the same links on
every machine.
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
_SIGNS = 128
"""Signs of a thumbnail."""
_TABLES = 24
"""Tables for each way to turn the thumbnails."""
_FEWEST_SAME = 96
"""Pairs with fewer signs in common are not compared."""
_MOST_CHOSEN = 24
_ROWS = 1 << 14
_PAIRS = 1 << 18
"""Pairs that are compared at a time: limits memory."""
_VALUES = THUMBNAIL**2
_LOWER = np.uint64(0xFFFFFFFF)

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Words = NDArray[np.uint64]
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
    chosen = min(math.ceil(math.log2(len(values))), _MOST_CHOSEN)
    for _ in range(_rounds(chosen)):
        turned, signs = _turned(values, _pattern(rng, 1)[:, 0], _pattern(rng, _SIGNS))
        for _ in range(_TABLES):
            links.compare(turned, signs, _keys(signs, rng, chosen))
    return links.pairs()


def _rounds(chosen: int) -> int:
    """Return how many rounds of tables miss a pair at the threshold with a probability of a millionth.

    >>> _rounds(20)
    31
    """
    return math.ceil(math.log(_MISSED) / math.log(1 - _found(chosen)))


def _found(chosen: int) -> float:
    """Return the probability that a round finds a pair at the threshold."""
    probability = 0.0
    for same in range(_FEWEST_SAME, _SIGNS + 1):
        other = _SIGNS - same
        of_signs = math.comb(_SIGNS, same) * _SAME_SIGN**same * (1 - _SAME_SIGN) ** other
        probability += of_signs * (1 - (1 - math.comb(same, chosen) / math.comb(_SIGNS, chosen)) ** _TABLES)
    return _SAME_TURN * probability


def _pattern(rng: np.random.Generator, count: int) -> Floats:
    """Return random patterns of mean zero, 256 x count, by which the mean of a thumbnail does not matter."""
    pattern = rng.normal(size=(_VALUES, count))
    return np.asarray(pattern - pattern.mean(axis=0), np.float32)


def _turned(values: Bytes, direction: Floats, patterns: Floats) -> tuple[Bytes, Words]:
    """Return the thumbnails, turned to agree best with a direction, and their signs, as bits (W x N words)."""
    orientations = _orientations()
    directions = np.empty((_VALUES, len(orientations)), np.float32)
    for number, places in enumerate(orientations):
        directions[places, number] = direction
    turned = np.empty_like(values)
    signs = np.empty((_SIGNS // 64, len(values)), np.uint64)
    for start in range(0, len(values), _ROWS):
        part = slice(start, start + _ROWS)
        best = (values[part].astype(np.float32) @ directions).argmax(axis=1)
        for number, places in enumerate(orientations):
            mine = start + np.flatnonzero(best == number)
            turned[mine] = values[mine].take(places, axis=1)
        positive = turned[part].astype(np.float32) @ patterns > 0
        signs[:, part] = np.packbits(positive, axis=1).view(np.uint64).T
    return turned, signs


def _keys(signs: Words, rng: np.random.Generator, chosen: int) -> Words:
    """Return keys of a table, in the upper halves: the same for the same signs in some places, chosen at random."""
    flags = np.zeros(_SIGNS, np.uint8)
    flags[rng.choice(_SIGNS, chosen, replace=False)] = 1
    masks = np.packbits(flags).view(np.uint64)
    keys = np.zeros(signs.shape[1], np.uint64)
    for word, mask in zip(signs, masks, strict=True):  # a hash; others with the same key are told by all signs
        keys += (word & mask) * (rng.integers(1 << 63, dtype=np.uint64) * np.uint64(2) + np.uint64(1))
    return keys


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

    def compare(self, turned: Bytes, signs: Words, keys: Words) -> None:
        """Compare thumbnails with the same key: neighbours in the bucket, then, of several groups, all with all."""
        order = np.sort(keys & ~_LOWER | np.arange(len(keys), dtype=np.uint64))
        keys, places = order >> np.uint64(32), (order & _LOWER).astype(np.int64)
        first = np.flatnonzero(keys[1:] == keys[:-1])
        apart = 1
        while len(first):
            self._link(turned, signs, places[first], places[first + apart])
            if apart == 1:
                first = first[self._mixed(keys[first], places[first], places[first + 1])]
            apart += 1
            first = first[: np.searchsorted(first, len(keys) - apart)]
            first = first[keys[first + apart] == keys[first]]

    def _mixed(self, keys: Words, places: Places, following: Places) -> Flags:
        """Return which keys, sorted, are those of buckets whose thumbnails are not linked with all others of it."""
        apart = keys[self._group[places] != self._group[following]]
        return np.asarray(np.searchsorted(apart, keys, "right") > np.searchsorted(apart, keys, "left"))

    def _link(self, turned: Bytes, signs: Words, i: Places, j: Places) -> None:
        """Link the pairs that correlate and are not linked yet."""
        new = self._group[i] != self._group[j]
        i, j = i[new], j[new]
        same = _SIGNS - sum(np.bitwise_count(word[i] ^ word[j]).astype(np.int16) for word in signs)
        i, j = i[same >= _FEWEST_SAME], j[same >= _FEWEST_SAME]
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
