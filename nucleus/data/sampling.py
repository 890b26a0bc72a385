"""Order of the samples in training: a function of seed and epoch, independent of the number of workers.

A split of N samples is stored in S shards, sample i as record i // S of shard i % S. 24 consecutive shards form a
block. An epoch shuffles the blocks (by seed and epoch) and, within each block, the records of every shard (by seed,
epoch and shard), and reads the shards of a block in turn, which gives one global order. Global batch k consists of the
positions k * B to (k + 1) * B - 1 of this order, of which worker r of W reads the positions p with p % W == r.
Therefore the samples of a global batch are the same for any W that divides B, a worker needs only one block at a time,
and if W divides 24 it needs only the shards s with s % W == r. To allow this, the one block whose shards may differ in
length comes last.

With weights, the records of a shard are drawn by systematic resampling: as many draws as the shard has records, each
record about in proportion to its weight.

Splits of several datasets can be mixed, and epochs can have any number of steps. Then each split is an endless stream,
one pass (an epoch as above) after the other, and the positions of an epoch are dealt to the splits, to each as many in
every epoch as its share asks, evenly spread. So the order is still one of seed and epoch alone: epoch e takes from a
split that has n positions in an epoch the places e * n to (e + 1) * n - 1 of its stream.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["EpochPlan", "SplitShare", "epoch_plan", "mixed_plan", "shard_count", "stored_order"]

_MANY_DIVISORS = (24, 12, 8, 6, 4, 2, 1)
_SHARD_BYTES = 64 << 20
_BLOCK_SHARDS = _MANY_DIVISORS[0]
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_POINTS_AT_ONCE = 1 << 17
"""As many as fit into a processor's cache."""
_NEAR = 256
"""Points on each side of a rank's place that are looked at first; of 10^9, the rank was always among them."""


@dataclass(frozen=True)
class EpochPlan:
    """The samples that one worker reads in one epoch, in order.

    Attributes:
        positions: Position of each sample in the global order.
        shards: Shard of each sample.
        records: Record of each sample in its shard.
        blocks: Slice of each block in these arrays.
        dropped: Number of samples, over all workers, in the incomplete last batch, which no worker reads.
    """

    positions: NDArray[np.int64]
    shards: NDArray[np.int64]
    records: NDArray[np.int64]
    blocks: list[slice]
    dropped: int

    def cut(self, places: range) -> "EpochPlan":
        """Return the plan of a part of the samples: consecutive places in these arrays."""
        part = slice(places.start, places.stop)
        ends = [(max(block.start, part.start), min(block.stop, part.stop)) for block in self.blocks]
        blocks = [slice(first - part.start, last - part.start) for first, last in ends if first < last]
        return EpochPlan(self.positions[part], self.shards[part], self.records[part], blocks, self.dropped)

    def shards_of_block(self, block: int) -> list[int]:
        """Return the shards that the worker needs for a block."""
        return [int(shard) for shard in np.unique(self.shards[self.blocks[block]])]


def shard_count(samples: int, total_bytes: int) -> int:
    """Return the number of shards of a split: a multiple of 24, at most 64 MiB each; fewer for less than 24 samples."""
    if samples < _MANY_DIVISORS[0]:
        return next(count for count in _MANY_DIVISORS if count <= samples)
    blocks = max(1, -(-total_bytes // (_MANY_DIVISORS[0] * _SHARD_BYTES)))
    return min(blocks, samples // _MANY_DIVISORS[0]) * _MANY_DIVISORS[0]


def stored_order(samples: int) -> NDArray[np.int64]:
    """Return the order in which the samples of a split are stored: shuffled, depending only on their number."""
    return np.random.default_rng(0).permutation(samples)


def epoch_plan(
    records_by_shard: list[int],
    *,
    seed: int,
    epoch: int,
    rank: int,
    world: int,
    global_batch: int,
    shuffle: bool = True,
    weights: Sequence[float] | None = None,
    done: int = 0,
) -> EpochPlan:
    """Plan one epoch of one worker.

    Args:
        records_by_shard: Number of records of each of the S shards; they differ by at most one, larger ones first.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        rank: Number of this worker, from 0.
        world: Number of workers; divides `global_batch`.
        global_batch: Samples per step over all workers; an incomplete last batch is dropped. 0 keeps all samples.
        shuffle: Whether to shuffle; validation keeps the stored order.
        weights: Sampling weight of each sample of the split, in stored order; if None, each sample is read once.
        done: Number of positions at the start of the global order to leave out because they were read before.
    """
    total = sum(records_by_shard)
    kept = total - total % global_batch if global_batch else total
    positions = np.arange(rank, kept, world, dtype=np.int64)
    positions = positions[positions >= done]
    epoch_pass = _Pass(records_by_shard, (seed, epoch) if shuffle else None, weights)
    (shards, records), bounds = epoch_pass.samples(positions)
    return EpochPlan(positions, shards, records, [slice(*pair) for pair in pairwise(bounds)], total - kept)


@dataclass(frozen=True)
class SplitShare:
    """A split of one dataset, and its share of the samples of an epoch.

    Attributes:
        records_by_shard: Number of records of each shard, as for `epoch_plan`.
        share: Share of all samples; those of all splits add up to 1.
        weights: Sampling weights, as for `epoch_plan`.
    """

    records_by_shard: list[int]
    share: float = 1.0
    weights: Sequence[float] | None = None


def mixed_plan(
    splits: Sequence[SplitShare],
    *,
    steps: int,
    seed: int,
    epoch: int,
    rank: int,
    world: int,
    global_batch: int,
    done: int = 0,
) -> EpochPlan:
    """Plan one epoch of one worker over the splits of several datasets; nothing is dropped.

    Shards are numbered through: those of the first split, then those of the second, and so on. A block ends where a
    split goes on to its next one, so a worker needs at most a block of each split at a time.

    Args:
        splits: The splits.
        steps: Number of steps in the epoch.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        rank: Number of this worker, from 0.
        world: Number of workers; divides `global_batch`.
        global_batch: Samples per step over all workers.
        done: Number of positions at the start of the global order to leave out because they were read before.
    """
    total = steps * global_batch
    positions = np.arange(rank, total, world, dtype=np.int64)
    positions = positions[positions >= done]
    owners, counts = _dealt([split.share for split in splits], total, (seed, epoch), positions)
    samples, moves, offset = np.empty((2, len(positions)), np.int64), np.zeros(len(positions), np.int64), 0
    for number, split in enumerate(splits):
        stream = _Stream(split, seed, epoch * counts.totals[number], counts.totals[number])
        mine = owners == number
        shards, records = stream.samples(counts.before[number, mine])
        samples[:, mine] = offset + shards, records
        moves += stream.moves(counts.before[number] + mine)
        offset += len(split.records_by_shard)
    bounds = [0, *(np.flatnonzero(np.diff(moves)) + 1).tolist(), len(positions)]
    shards, records = samples
    return EpochPlan(positions, shards, records, [slice(*pair) for pair in pairwise(bounds)], 0)


@dataclass(frozen=True)
class _Counts:
    """How the positions of an epoch are dealt to K splits.

    Attributes:
        before: Number of positions before each of a worker's that go to each split, K x n.
        totals: Number of all positions that go to each split.
    """

    before: NDArray[np.int64]
    totals: list[int]


def _dealt(
    shares: Sequence[float], total: int, seeds: tuple[int, int], positions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], _Counts]:
    """Return the number of the split that each of some positions goes to; exact numbers, evenly spread.

    Multiples of the golden ratio, modulo 1, are evenly spread over [0, 1) in every part of their sequence. The
    positions with the smallest ones go to the first split, the following ones to the second, and so on.

    Args:
        shares: Share of each split; their sum is 1.
        total: Number of all positions.
        seeds: Seed and epoch.
        positions: Some positions, sorted.
    """
    ends = np.rint(np.cumsum(shares) * total).astype(np.int64)
    first = np.random.default_rng(seeds).random()
    limits = _limits(ends[:-1], total, first)
    owners, before = np.zeros(len(positions), np.int64), np.zeros((len(shares), len(positions)), np.int64)
    so_far = [0] * len(shares)
    for start, points in _points(total, first) if limits else ():
        mine = slice(*np.searchsorted(positions, (start, start + len(points))))
        here = positions[mine] - start
        lower = np.zeros(len(points), bool)
        for number, limit in enumerate(limits):
            below = limit.below(points)
            of = _count_before(below ^ lower, here)
            owners[mine] += ~below[here]
            before[number, mine] = so_far[number] + of[:-1]
            so_far[number] += int(of[-1])
            lower = below
    before[-1], so_far[-1] = positions - before[:-1].sum(axis=0), total - sum(so_far[:-1])  # the others
    return owners, _Counts(before, so_far)


def _count_before(flags: NDArray[np.bool_], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many flags are set before each of some places, sorted, and of all."""
    starts = np.append(0, places)
    counts = np.add.reduceat(np.append(flags, False), starts, dtype=np.int64)
    counts[:-1][np.diff(starts) == 0] = 0  # there reduceat returns the flag itself
    return np.cumsum(counts)


def _points(total: int, first: float) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield the points of all positions in parts, each with its first position; all at once would fill memory."""
    for start in range(0, total, _POINTS_AT_ONCE):
        points = np.arange(start, min(start + _POINTS_AT_ONCE, total), dtype=np.float64)
        points *= _GOLDEN_RATIO
        points += first
        points -= np.floor(points)
        yield start, points


@dataclass
class _Limit:
    """Tells the points of the lowest ranks; of those with the same value, the first have the lowest.

    Attributes:
        value: The lowest point that is not, or not always, below the limit.
        equal: How many points with this value are below it.
    """

    value: float
    equal: int

    def below(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which points are below the limit; of all, they are given in their order, each once."""
        below = points < self.value
        if self.equal:
            equal = np.flatnonzero(points == self.value)[: self.equal]
            below[equal] = True
            self.equal -= len(equal)
        return below


def _limits(ranks: NDArray[np.int64], total: int, first: float) -> list[_Limit]:
    """Return the limit below which there are as many of all points as each rank says."""
    found = dict.fromkeys(ranks[ranks >= total].tolist(), _Limit(np.inf, 0))
    near = _NEAR / total if total else 1.0
    while missing := [rank for rank in ranks.tolist() if rank not in found]:
        windows = [_Window(rank / total, near) for rank in missing]
        for _, points in _points(total, first):
            for window in windows:
                window.take(points)
        found |= {r: limit for r, window in zip(missing, windows, strict=True) if (limit := window.limit(r))}
        near *= 16
    return [replace(found[rank]) for rank in ranks.tolist()]


class _Window:
    """The points near a place, and the number of those below.

    Multiples of the golden ratio are so evenly spread that the point of a rank is near its share of all points.

    Args:
        place: The place.
        near: How far from it points are kept.
    """

    def __init__(self, place: float, near: float) -> None:
        self._first, self._last = place - near, place + near
        self._below = 0
        self._kept: list[NDArray[np.float64]] = []

    def take(self, points: NDArray[np.float64]) -> None:
        """Take more points."""
        below = points < self._first
        self._below += int(np.count_nonzero(below))
        self._kept.append(points[(points <= self._last) ^ below])

    def limit(self, rank: int) -> _Limit | None:
        """Return the limit of a rank; None if it is not among the points that were kept."""
        values = np.sort(np.concatenate(self._kept))
        place = rank - self._below
        if not 0 <= place < len(values):
            return None
        return _Limit(float(values[place]), place - int(np.searchsorted(values, values[place])))


class _Stream:
    """The samples of one split in an epoch: a part of its passes, one after the other.

    Args:
        split: The split.
        seed: Seed of the run.
        start: First place of the epoch in the stream.
        length: Number of places in the epoch.
    """

    def __init__(self, split: SplitShare, seed: int, start: int, length: int) -> None:
        self._start = start
        self._size = sum(split.records_by_shard)
        numbers = range(start // self._size, -(-(start + length) // self._size))
        self._passes = {each: _Pass(split.records_by_shard, (seed, each), split.weights) for each in numbers}
        self._moves = self._places_of_moves(length)

    def _places_of_moves(self, length: int) -> NDArray[np.int64]:
        """Return the places of the epoch, from 1, whose block is not that of the place before."""
        starts = [each.starts + number * self._size - self._start for number, each in self._passes.items()]
        blocks = [np.array([block.start for block in each.blocks]) for each in self._passes.values()]
        places = np.concatenate([np.empty(0, np.int64), *starts])
        changed = np.diff(np.concatenate([np.empty(0, np.int64), *blocks]), prepend=-1) != 0
        return np.asarray(places[changed & (places >= 1) & (places < length)])

    def samples(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return shards and records (2 x n) at some places of the epoch, sorted."""
        passes, within = np.divmod(places + self._start, self._size)
        found = [each.samples(within[passes == number])[0] for number, each in self._passes.items()]
        return np.concatenate([np.empty((2, 0), np.int64), *found], axis=1)

    def moves(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how often the block changed within the first places, for some numbers of places."""
        found: NDArray[np.int64] = np.searchsorted(self._moves, counts - 1, side="right")
        return found


class _Pass:
    """One pass over a split.

    Args:
        records_by_shard: Number of records of each shard, as for `epoch_plan`.
        seeds: Seed and epoch; None keeps the stored order.
        weights: Sampling weights, as for `epoch_plan`.

    Attributes:
        blocks: The blocks in their order.
        starts: Place of the first sample of each block.
    """

    def __init__(
        self, records_by_shard: list[int], seeds: tuple[int, int] | None, weights: Sequence[float] | None
    ) -> None:
        self._records_by_shard = records_by_shard
        self._seeds = seeds
        self._weights = None if weights is None else np.asarray(weights)
        self.blocks = _block_order(records_by_shard, seeds)
        sizes = [sum(records_by_shard[block.start : block.stop]) for block in self.blocks]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.starts = self._ends - sizes

    def samples(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
        """Return shards and records (2 x n) at some places of the pass, sorted, and where the places of each block end.

        The second has a 0 before all ends.
        """
        ends = np.searchsorted(places, self._ends)
        blocks = np.repeat(np.arange(len(self.blocks)), np.diff(ends, prepend=0))
        first, length = np.array([(block.start, len(block)) for block in self.blocks], np.int64).reshape(-1, 2).T
        records, shards = np.divmod(places - self.starts[blocks], length[blocks])
        shards += first[blocks]
        if self._seeds is not None:
            self._shuffle(shards, records, self._seeds)
        return np.stack([shards, records]), [0, *ends.tolist()]

    def _shuffle(self, shards: NDArray[np.int64], records: NDArray[np.int64], seeds: tuple[int, int]) -> None:
        """Replace the places of records in their shards by the records there."""
        by_shard = np.argsort(shards, kind="stable")
        needed, starts = np.unique(shards[by_shard], return_index=True)
        for shard, mine in zip(needed.tolist(), np.split(by_shard, starts[1:]), strict=bool(len(needed))):
            rng = np.random.default_rng((*seeds, shard))
            order = rng.permutation(self._records_by_shard[shard])
            if self._weights is not None:
                order = order[_resampled(self._weights[shard :: len(self._records_by_shard)][order], rng)]
            records[mine] = order[records[mine]]


def _block_order(records_by_shard: list[int], seeds: tuple[int, int] | None) -> list[range]:
    """Return the blocks in the order of an epoch."""
    count = len(records_by_shard)
    starts = range(0, count, _BLOCK_SHARDS)
    blocks = [range(start, min(start + _BLOCK_SHARDS, count)) for start in starts]
    if seeds is not None:
        blocks = [blocks[i] for i in np.random.default_rng(seeds).permutation(len(blocks))]
    return sorted(blocks, key=lambda block: records_by_shard[block[0]] != records_by_shard[block[-1]])


def _resampled(weights: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw as many indices as there are weights, each floor or ceil of its expected number of times, in random order.

    Systematic resampling (Kitagawa 1996, https://doi.org/10.1080/10618600.1996.10474692).
    """
    count = len(weights)
    ends = np.cumsum(weights) * (count / weights.sum())
    points = np.arange(count) + rng.random()
    return rng.permutation(np.minimum(np.searchsorted(ends, points, side="right"), count - 1))
