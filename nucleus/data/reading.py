"""One worker's records of a split in their order: block after block, the next one fetched meanwhile."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nucleus.data.cache import ShardCache
from nucleus.data.datasets import Dataset
from nucleus.data.sampling import EpochPlan
from nucleus.data.shards import ShardFile
from nucleus.errors import CacheFullError, NucleusError

__all__ = ["OpenShard", "SplitReader", "cached_split"]

_CONNECTIONS = 4


class OpenShard(Protocol):
    """Opens a shard of the split by its number, fetched first where needed."""

    def __call__(self, number: int) -> ShardFile:
        """The shard."""


class SplitReader:
    """Reads a split by a plan.

    Args:
        open_shard: Opens a shard; called from several threads.
        plan: The worker's order in an epoch.

    Attributes:
        failure: Why the last read failed; TensorFlow, which calls from its own threads, keeps only the text.
    """

    def __init__(self, open_shard: OpenShard, plan: Callable[[int], EpochPlan]) -> None:
        self._open_shard = open_shard
        self._plan = lru_cache(maxsize=2)(plan)
        self._shards: dict[int, ShardFile] = {}
        self._pool = ThreadPoolExecutor(_CONNECTIONS, "shards")
        self.failure: NucleusError | None = None

    def prefetch(self, epoch: int, block: int) -> None:
        """Begin to fetch what a block needs."""
        for shard in self._plan(epoch).shards_of_block(block):
            if shard not in self._shards:
                self._pool.submit(self._fetch, shard)

    def blocks(self, epoch: int) -> int:
        """How many blocks an epoch has."""
        return len(self._plan(epoch).blocks)

    def enter(self, epoch: int, block: int) -> NDArray[np.int64]:
        """Have a block's shards open and no others, and begin to fetch the next block.

        Returns:
            A row for each of the worker's samples in the block: position in the epoch, shard, record.
        """
        plan = self._plan(epoch)
        numbers = plan.shards_of_block(block)
        held = self._shards
        missing = [number for number in numbers if number not in held]
        self._shards = {number: held[number] for number in numbers if number in held}
        del held  # what the last block needed may now make room
        with self._noted():
            self._shards |= dict(zip(missing, self._pool.map(self._open_shard, missing), strict=True))
        following = (epoch, block + 1) if block + 1 < len(plan.blocks) else (epoch + 1, 0)
        self.prefetch(*following)
        rows = plan.blocks[block]
        return np.stack([plan.positions[rows], plan.shards[rows], plan.records[rows]], axis=1)

    def read(self, shard: int, record: int) -> bytes:
        """The bytes of one record; those still asked for after their block was left are opened again."""
        number = int(shard)
        with self._noted():
            return (self._shards.get(number) or self._open_shard(number)).read(int(record))

    def records(self, epoch: int = 0) -> Iterator[bytes]:
        """The records of an epoch in order."""
        for block in range(self.blocks(epoch)):
            for _, shard, record in self.enter(epoch, block):
                yield self.read(shard, record)

    def close(self) -> None:
        """Let go of the shards and stop fetching ahead."""
        self._pool.shutdown(cancel_futures=True)
        self._shards = {}

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except NucleusError as error:
            self.failure = error
            raise

    def _fetch(self, shard: int) -> None:
        try:
            self._open_shard(shard)
        except CacheFullError:  # then it waits until the block before it is done
            return


def cached_split(dataset: Dataset, split: str, cache: ShardCache, plan: Callable[[int], EpochPlan]) -> SplitReader:
    """Reads a split of a dataset through the cache."""
    shards = dataset.manifest.split_shards(split)
    return SplitReader(lambda number: cache.open(dataset, shards[number]), plan)
