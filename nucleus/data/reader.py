"""One worker's records of a split in their order: block after block, the next one fetched meanwhile."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, DatasetManifest
from nucleus.data.images import Kind, LabelImage, RgbImage
from nucleus.data.sampling import EpochPlan, epoch_plan, stored_order
from nucleus.data.shards import ShardFile, decode_record
from nucleus.errors import CacheFullError, NucleusError

__all__ = [
    "LabelledImage",
    "OpenShard",
    "SplitReader",
    "cached_split",
    "example_positions",
    "example_records",
    "images_of_split",
    "images_of_worker",
    "split_reader",
]


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


_LOOKED_AT = 256


def example_positions(manifest: DatasetManifest, split: str, count: int) -> list[int]:
    """Places in a split's stored order, which is a random one: of each kind the first image, then the next ones.

    Images without nuclei, which show little, come last. The same for the same dataset.
    """
    samples = manifest.split_samples(split)
    places = list(enumerate(samples[i] for i in stored_order(len(samples))[:_LOOKED_AT]))
    seen: dict[object, int] = {}
    ranked = []
    for place, sample in places:
        seen[sample.kind] = seen.get(sample.kind, 0) + (sample.nuclei > 0)
        ranked.append((sample.nuclei == 0, seen[sample.kind], place))
    return [place for _, _, place in sorted(ranked)[:count]]


def example_records(dataset: Dataset, split: str, cache: ShardCache, count: int) -> list[bytes]:
    """The records of these images; only their shards are fetched."""
    shards = dataset.manifest.split_shards(split)
    return [
        cache.open(dataset, shards[place % len(shards)]).read(place // len(shards))
        for place in example_positions(dataset.manifest, split, count)
    ]


@dataclass(frozen=True)
class LabelledImage:
    """One image of a dataset in memory.

    Attributes:
        name: Its name in the dataset.
        kind: Its kind.
        image: H x W x 3, uint8.
        labels: H x W, uint16.
    """

    name: str
    kind: Kind
    image: RgbImage
    labels: LabelImage


def images_of_worker(manifest: DatasetManifest, split: str, reader: SplitReader) -> Iterator[LabelledImage]:
    """The images of a split that are one worker's, in stored order; over all workers each image once."""
    kinds = {sample.name: sample.kind for sample in manifest.split_samples(split)}
    for record in reader.records():
        name, image, labels = decode_record(record)
        yield LabelledImage(name, kinds[name], image, labels)


def images_of_split(dataset: Dataset, split: str, cache: ShardCache) -> Iterator[LabelledImage]:
    """All images of a split, in stored order, from shards that are fetched into the cache."""
    return images_of_worker(dataset.manifest, split, split_reader(dataset, split, cache))


def split_reader(dataset: Dataset, split: str, cache: ShardCache, rank: int = 0, world: int = 1) -> SplitReader:
    """Reads a worker's images of a split in stored order."""
    counts = [shard.records for shard in dataset.manifest.split_shards(split)]
    return cached_split(
        dataset,
        split,
        cache,
        lambda _: epoch_plan(counts, seed=0, epoch=0, rank=rank, world=world, global_batch=0, shuffle=False),
    )
