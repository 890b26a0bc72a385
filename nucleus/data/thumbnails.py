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

Thumbnails with few nuclei are alike by chance, the more often the more there are. How often is counted with decoys, as
Elias and Gygi do (2007, https://doi.org/10.1038/nmeth1019): some thumbnails whose quarters have changed places, which
are as any others and near-duplicates of none. If they are like too many, the correlation must be higher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

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
_DECOYS = 256
_MOST_BY_CHANCE = 0.05
"""Pairs by chance for each image, at most: far from where they would chain most images into one group."""
_FEW_BY_CHANCE = 10
"""Pairs by chance that are always accepted."""
_PAIRS = 1 << 18
"""Pairs that are compared at a time: limits memory."""
_VALUES = THUMBNAIL**2
_ROUNDING = 1e-4
"""More than rounding in 32 bits changes a correlation."""
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
    links = _Links(thumbnails[varied])
    find = _of_all_pairs if len(varied) <= _ALL_PAIRS else _of_buckets
    i, j = find(links)
    return varied[i], varied[j]


def _orientations() -> Places:
    """Return the places of the values of a thumbnail in each orientation, 8 x 256."""
    upright = np.arange(_VALUES).reshape(THUMBNAIL, THUMBNAIL)
    return np.stack([np.rot90(each, turns).ravel() for each in (upright, upright[:, ::-1]) for turns in range(4)])


class _Thumbnails:
    """Thumbnails, and what their correlations are computed from: whole numbers.

    Args:
        values: The thumbnails, N x 256.

    Attributes:
        values: The thumbnails.
        sums: Sum of each.
        spreads: 256 times the sum of the squares of each, minus the square of its sum.
    """

    def __init__(self, values: Bytes) -> None:
        self.values = values
        self.sums = values.sum(axis=1, dtype=np.float64)
        squares = np.einsum("ij,ij->i", values, values, dtype=np.float64)
        self.spreads = _VALUES * squares - self.sums**2

    def __len__(self) -> int:
        return len(self.values)

    def units(self, places: Places | slice) -> Floats:
        """Return some of them with a mean of 0 and a length of 1."""
        lengths = np.sqrt(self.spreads[places] / _VALUES)[:, np.newaxis]
        return np.asarray((self.values[places] - self.sums[places, np.newaxis] / _VALUES) / lengths, np.float32)

    def correlation(self, i: Places, j: Places, turned: Bytes, other: Bytes) -> Doubles:
        """Return the correlations of pairs, which are given as n x 256 too. Sums below 2^24 are exact in 32 bits."""
        products = np.einsum("ij,ij->i", turned, other, dtype=np.float32).astype(np.float64)
        covariance = _VALUES * products - self.sums[i] * self.sums[j]
        return np.asarray(covariance / np.sqrt(self.spreads[i] * self.spreads[j]))


def _alike(items: _Thumbnails, places: Places, given: Bytes) -> Iterator[tuple[Places, Places, Doubles]]:
    """Yield (number, j, correlation) of those that correlate by .9 with some of them, which may have been changed.

    Args:
        items: All thumbnails.
        places: Places of some.
        given: What became of these, n x 256: their values in another order.
    """
    units = _Thumbnails(given).units(slice(None)) if len(given) else np.empty((0, _VALUES), np.float32)
    for start in range(0, len(items), _ROWS >> 2):
        found = np.flatnonzero(units @ items.units(slice(start, start + (_ROWS >> 2))).T >= _CORRELATION - _ROUNDING)
        number, j = np.divmod(found, min(_ROWS >> 2, len(items) - start))
        j += start
        correlation = items.correlation(places[number], j, given[number], items.values[j])
        chosen = correlation >= _CORRELATION
        yield number[chosen], j[chosen], correlation[chosen]


def _above(items: _Thumbnails) -> float:
    """Return the correlation that a pair must exceed so that few pairs are alike by chance; 0 if all at .9 are few."""
    count = len(items)
    places = np.arange(0, count, -(-count // _DECOYS) or 1)
    half = THUMBNAIL // 2
    decoys = np.roll(items.values[places].reshape(-1, THUMBNAIL, THUMBNAIL), (half, half), axis=(1, 2))
    found = [np.empty(0)]
    for order in _orientations():
        for number, j, correlation in _alike(items, places, decoys.reshape(-1, _VALUES)[:, order]):
            found.append(correlation[places[number] != j])
    chance = np.sort(np.concatenate(found))[::-1]
    share = count / (2 * max(1, len(places)))  # a pair has two that could have been the decoy
    accepted = int(max(_FEW_BY_CHANCE, _MOST_BY_CHANCE * count) / max(share, 0.5))
    return float(chance[accepted]) if accepted < len(chance) else 0.0


def _of_all_pairs(links: _Links) -> Pairs:
    """Compare all pairs."""
    found = [np.empty((2, 0), np.int64)]
    for order in _orientations():
        for start in range(0, len(links.items), _ROWS >> 4):
            places = np.arange(start, min(start + (_ROWS >> 4), len(links.items)))
            for number, j, correlation in _alike(links.items, places, links.items.values[places][:, order]):
                chosen = (correlation > links.above) & (places[number] < j)
                found.append(np.stack([places[number[chosen]], j[chosen]]))
    i, j = np.concatenate(found, axis=1)
    return i, j


def _of_buckets(links: _Links) -> Pairs:
    """Compare the pairs that share a bucket in one of many tables, unless they are linked already."""
    values = links.items.values
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

    Attributes:
        items: The thumbnails.
        above: The correlation that a pair must exceed, besides .9.
    """

    def __init__(self, values: Bytes) -> None:
        self.items = _Thumbnails(values)
        self.above = _above(self.items)
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
            correlation = self.items.correlation(first, second, turned[first], turned[second])
            alike.append((correlation >= _CORRELATION) & (correlation > self.above))
        chosen = np.concatenate(alike)
        if chosen.any():
            i, j = i[chosen], j[chosen]
            self._found.append(np.stack([i, j]))
            self._group = linked(len(self._group), (self._group[i], self._group[j]))[self._group]
