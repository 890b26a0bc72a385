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

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["EpochPlan", "SplitShare", "epoch_plan", "mixed_plan", "shard_count", "stored_order"]

_MANY_DIVISORS = (24, 12, 8, 6, 4, 2, 1)
_SHARD_BYTES = 64 << 20
_BLOCK_SHARDS = _MANY_DIVISORS[0]
_GOLDEN_RATIO = (5**0.5 - 1) / 2


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
    parts, blocks = [], []
    start = filled = 0
    seeds = (seed, epoch) if shuffle else None
    for block in _block_order(records_by_shard, seeds):
        size = sum(records_by_shard[shard] for shard in block)
        places = np.arange((rank - start) % world, min(size, kept - start), world, dtype=np.int64)
        places = places[places >= done - start]
        part = _part(places, start, block, records_by_shard, seeds, weights)
        parts.append(part)
        blocks.append(slice(filled, filled + part.shape[1]))
        start, filled = start + size, filled + part.shape[1]
    positions, shards, records = np.concatenate(parts, axis=1)
    return EpochPlan(positions, shards, records, blocks, total - kept)


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
    owners = _dealt([split.share for split in splits], total, (seed, epoch))
    samples, moves, offset = np.empty((2, total), np.int64), np.zeros(total, np.int64), 0
    for number, split in enumerate(splits):
        places = np.flatnonzero(owners == number)
        shards, records = _stream(split, seed, range(epoch * len(places), (epoch + 1) * len(places)))
        samples[:, places] = offset + shards, records
        moves[places[1:]] = np.diff(shards // _BLOCK_SHARDS) != 0
        offset += len(split.records_by_shard)
    positions = np.arange(rank, total, world, dtype=np.int64)
    positions = positions[positions >= done]
    ends = np.flatnonzero(np.diff(np.cumsum(moves)[positions])) + 1
    bounds = [0, *ends.tolist(), len(positions)]
    blocks = [slice(*pair) for pair in pairwise(bounds)]
    shards, records = samples[:, positions]
    return EpochPlan(positions, shards, records, blocks, 0)


def _dealt(shares: Sequence[float], total: int, seeds: tuple[int, int]) -> NDArray[np.int64]:
    """Return the number of the split that each position goes to: exact numbers of positions, evenly spread.

    Multiples of the golden ratio, modulo 1, are evenly spread over [0, 1) in every part of their sequence.
    """
    ends = np.rint(np.cumsum(shares) * total).astype(np.int64)
    points = (np.arange(total) * _GOLDEN_RATIO + np.random.default_rng(seeds).random()) % 1
    owners = np.empty(total, np.int64)
    owners[np.argsort(points, kind="stable")] = np.searchsorted(ends[:-1], np.arange(total), side="right")
    return owners


def _stream(split: SplitShare, seed: int, places: range) -> NDArray[np.int64]:
    """Return shards and records (2 x n) at consecutive places of the passes over a split, one after the other."""
    size = sum(split.records_by_shard)
    passes = range(places.start // size, -(-places.stop // size))
    plans = [
        epoch_plan(
            split.records_by_shard, seed=seed, epoch=each, rank=0, world=1, global_batch=0, weights=split.weights
        )
        for each in passes
    ]
    samples = [np.stack([plan.shards, plan.records]) for plan in plans]
    start = places.start - passes.start * size
    return np.concatenate([np.empty((2, 0), np.int64), *samples], axis=1)[:, start : start + len(places)]


def _block_order(records_by_shard: list[int], seeds: tuple[int, int] | None) -> list[range]:
    """Return the blocks in the order of an epoch."""
    count = len(records_by_shard)
    starts = range(0, count, _BLOCK_SHARDS)
    blocks = [range(start, min(start + _BLOCK_SHARDS, count)) for start in starts]
    if seeds is not None:
        blocks = [blocks[i] for i in np.random.default_rng(seeds).permutation(len(blocks))]
    return sorted(blocks, key=lambda block: records_by_shard[block[0]] != records_by_shard[block[-1]])


def _part(
    places: NDArray[np.int64],
    start: int,
    block: range,
    records_by_shard: list[int],
    seeds: tuple[int, int] | None,
    weights: Sequence[float] | None,
) -> NDArray[np.int64]:
    """Return positions, shards and records (3 x n) of a worker's places in a block that starts at position `start`."""
    shards = block.start + places % len(block)
    records = places // len(block)
    if seeds is not None:
        for shard in np.unique(shards):
            rng = np.random.default_rng((*seeds, int(shard)))
            order = rng.permutation(records_by_shard[shard])
            if weights is not None:
                order = order[_resampled(np.asarray(weights[shard :: len(records_by_shard)])[order], rng)]
            mine = shards == shard
            records[mine] = order[records[mine]]
    return np.stack([start + places, shards, records])


def _resampled(weights: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw as many indices as there are weights, each floor or ceil of its expected number of times, in random order.

    Systematic resampling (Kitagawa 1996, https://doi.org/10.1080/10618600.1996.10474692).
    """
    count = len(weights)
    ends = np.cumsum(weights) * (count / weights.sum())
    points = np.arange(count) + rng.random()
    return rng.permutation(np.minimum(np.searchsorted(ends, points, side="right"), count - 1))
