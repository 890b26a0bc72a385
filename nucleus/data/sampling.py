"""Which sample comes at which step on which worker: a function of seed and epoch, not of the number of workers.

A split of N samples lies in S shards, sample p as record p // S of shard p % S. An epoch shuffles each shard's
records (by seed, epoch and shard) and reads the shards in turn, which gives one global order. Global batch k is
positions k * B to (k + 1) * B - 1 of that order, and worker r of W takes those with p % W == r. So the samples of
a global batch are the same for any W that divides B, and where W divides S, as 1, 2, 3, 4, 6, 8, 12 and 24 divide
24, a worker needs only the shards s with s % W == r.
"""

from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

__all__ = ["EpochPlan", "epoch_plan", "shard_count", "shards_of_worker"]

_MANY_DIVISORS = (24, 12, 8, 6, 4, 2, 1)
_SHARD_BYTES = 64 << 20


@dataclass(frozen=True)
class EpochPlan:
    """What one worker reads in one epoch, in order.

    Attributes:
        positions: Place of each sample in the global order, of all workers.
        shards: The shard of each sample.
        records: The record in that shard.
        dropped: Samples of the ragged last global batch, over all workers, that no worker sees this epoch.
    """

    positions: NDArray[np.int64]
    shards: NDArray[np.int64]
    records: NDArray[np.int64]
    dropped: int


def shard_count(samples: int, total_bytes: int) -> int:
    """How many shards a split gets: a multiple of 24 of at most 64 MiB each, fewer for fewer than 24 samples."""
    if samples < _MANY_DIVISORS[0]:
        return next(count for count in _MANY_DIVISORS if count <= samples)
    blocks = max(1, -(-total_bytes // (_MANY_DIVISORS[0] * _SHARD_BYTES)))
    return min(blocks, samples // _MANY_DIVISORS[0]) * _MANY_DIVISORS[0]


def shards_of_worker(shards: int, rank: int, world: int) -> list[int]:
    """The shards that hold a worker's samples."""
    common = gcd(shards, world)
    return list(range(rank % common, shards, common))


def epoch_plan(
    records_by_shard: list[int],
    *,
    seed: int,
    epoch: int,
    rank: int,
    world: int,
    global_batch: int,
    shuffle: bool = True,
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
    """
    total, shards = sum(records_by_shard), len(records_by_shard)
    kept = total - total % global_batch if global_batch else total
    positions = np.arange(rank, kept, world, dtype=np.int64)
    shard = positions % shards
    record = positions // shards
    if shuffle:
        for s in shards_of_worker(shards, rank, world):
            order = np.random.default_rng((seed, epoch, s)).permutation(records_by_shard[s])
            mine = shard == s
            record[mine] = order[record[mine]]
    return EpochPlan(positions, shard, record, total - kept)
