"""Which sample comes at which step on which worker: a function of seed and epoch, not of the number of workers.

A split of N samples lies in S shards, sample i as record i // S of shard i % S. 24 neighbouring shards are a block. An
epoch shuffles the blocks (by seed and epoch) and in each block every shard's records (by seed, epoch and shard), and
reads the block's shards in turn, which gives one global order. Global batch k is positions k * B to (k + 1) * B - 1 of
that order, and worker r of W takes those with p % W == r. So the samples of a global batch are the same for any W that
divides B; a worker has to have one block at hand at a time; and where W divides 24 it only ever needs the shards s
with s % W == r. For that, the one block whose shards may differ in length comes last.

With weights, a shard's records are drawn by systematic resampling instead of all being taken once: still as many as it
has, each about as often as its share of the shard's weight says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["EpochPlan", "epoch_plan", "shard_count", "stored_order"]

_MANY_DIVISORS = (24, 12, 8, 6, 4, 2, 1)
_SHARD_BYTES = 64 << 20
_BLOCK_SHARDS = _MANY_DIVISORS[0]


@dataclass(frozen=True)
class EpochPlan:
    """What one worker reads in one epoch, in order.

    Attributes:
        positions: Place of each sample in the global order, of all workers.
        shards: The shard of each sample.
        records: The record in that shard.
        blocks: Where each block's samples are in these arrays.
        dropped: Samples of the ragged last global batch, over all workers, that no worker sees this epoch.
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
        """The shards that the worker needs in a block."""
        return [int(shard) for shard in np.unique(self.shards[self.blocks[block]])]


def shard_count(samples: int, total_bytes: int) -> int:
    """How many shards a split gets: a multiple of 24 of at most 64 MiB each, fewer for fewer than 24 samples."""
    if samples < _MANY_DIVISORS[0]:
        return next(count for count in _MANY_DIVISORS if count <= samples)
    blocks = max(1, -(-total_bytes // (_MANY_DIVISORS[0] * _SHARD_BYTES)))
    return min(blocks, samples // _MANY_DIVISORS[0]) * _MANY_DIVISORS[0]


def stored_order(samples: int) -> NDArray[np.int64]:
    """Which of a split's samples, in the order of the manifest, lies where: shuffled, by their number alone."""
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
        records_by_shard: Records in each of the S shards, as `shard_count` and the import distribute them: shards
            differ by at most one record, the larger ones first.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        rank: This worker.
        world: Number of workers; divides `global_batch`.
        global_batch: Samples of one step over all workers; whole batches only, the rest is dropped. 0 keeps all.
        shuffle: Whether to shuffle; validation keeps the stored order.
        weights: How often each sample of the split, in stored order, is drawn, relative to the others; without, each
            comes once.
        done: Positions of the global order, from its beginning, that are left out because they were read before.
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


def _block_order(records_by_shard: list[int], seeds: tuple[int, int] | None) -> list[range]:
    """The blocks in the order of an epoch."""
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
    """Positions, shards and records (3 x n) of a worker's places in a block that begins at position `start`."""
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
