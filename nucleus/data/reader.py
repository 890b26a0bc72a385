"""Readers of a split: its records block by block, while the next block is fetched; its images; and a few examples."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nucleus.config.names import Kind
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, DatasetManifest
from nucleus.data.decoded import decoded_bytes, decoded_image
from nucleus.data.images import LabelImage, RgbImage
from nucleus.data.sampling import EpochPlan, epoch_plan, stored_order
from nucleus.data.shards import ShardFile
from nucleus.errors import CacheFullError, NucleusError

__all__ = [
    "LabelledImage",
    "OpenShard",
    "SplitReader",
    "cached_split",
    "cached_splits",
    "example_positions",
    "example_records",
    "images_of_range",
    "images_of_split",
    "images_of_worker",
    "split_reader",
]


_log = logging.getLogger(__name__)
_TRAIN = "train"
_CONNECTIONS = 4
_MOST_CANDIDATES = 256
"""Number of images among which examples are chosen."""


class OpenShard(Protocol):
    """Function that opens a shard of the split by its number, and downloads it first if it is not cached."""

    def __call__(self, number: int) -> ShardFile:
        """Return the shard."""


class SplitReader:
    """Reader of a split in the order of a plan.

    Args:
        open_shard: Opens a shard; called from several threads.
        plan: Returns the worker's plan of an epoch.

    Attributes:
        failure: Error of the last read that failed, if any; TensorFlow, from whose threads reads are called, keeps only
            its text.
    """

    def __init__(self, open_shard: OpenShard, plan: Callable[[int], EpochPlan]) -> None:
        self._open_shard = open_shard
        self._plan = lru_cache(maxsize=2)(plan)
        self._shards: dict[int, ShardFile] = {}
        self._pool = ThreadPoolExecutor(_CONNECTIONS, "shards")
        self.failure: NucleusError | None = None

    @property
    def shards(self) -> dict[int, ShardFile]:
        """The open shards of the current block, by number."""
        return self._shards

    def prefetch(self, epoch: int, block: int) -> None:
        """Start to fetch the shards of a block."""
        for shard in self._plan(epoch).shards_of_block(block):
            if shard not in self._shards:
                self._pool.submit(self._fetch, shard)

    def blocks(self, epoch: int) -> int:
        """Return the number of blocks of an epoch."""
        return len(self._plan(epoch).blocks)

    def enter(self, epoch: int, block: int) -> NDArray[np.int64]:
        """Open the shards of a block, close all others, and start to fetch the next block.

        Returns:
            A row per sample of the worker in the block: position in the epoch, shard, record.
        """
        plan = self._plan(epoch)
        numbers = plan.shards_of_block(block)
        held = self._shards
        missing = [number for number in numbers if number not in held]
        self._shards = {number: held[number] for number in numbers if number in held}
        del held  # so that the cache can evict the shards of the previous block
        with self.noted():
            self._shards |= dict(zip(missing, self._pool.map(self._open_shard, missing), strict=True))
        following = (epoch, block + 1) if block + 1 < len(plan.blocks) else (epoch + 1, 0)
        self.prefetch(*following)
        rows = plan.blocks[block]
        return np.stack([plan.positions[rows], plan.shards[rows], plan.records[rows]], axis=1)

    def read(self, shard: int, record: int) -> bytes:
        """Return the bytes of a record; a shard of an earlier block is opened again."""
        with self.noted():
            return self.shard(shard).read(int(record))

    def shard(self, shard: int) -> ShardFile:
        """Return an open shard; one of an earlier block is opened again."""
        number = int(shard)
        return self._shards.get(number) or self._open_shard(number)

    def places(self, epoch: int = 0) -> Iterator[tuple[int, int]]:
        """Yield shard and record of the samples of an epoch in order; the shards of a block are open meanwhile."""
        for block in range(self.blocks(epoch)):
            for _, shard, record in self.enter(epoch, block).tolist():
                yield shard, record

    def close(self) -> None:
        """Close the shards and stop fetching ahead."""
        self._pool.shutdown(cancel_futures=True)
        self._shards = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Keep an error of the block as `failure`."""
        try:
            yield
        except NucleusError as error:
            self.failure = error
            raise

    def _fetch(self, shard: int) -> None:
        try:
            self._open_shard(shard)
        except CacheFullError:  # `enter` fetches it when the current block is done
            return


def cached_split(dataset: Dataset, split: str, cache: ShardCache, plan: Callable[[int], EpochPlan]) -> SplitReader:
    """Return a reader of a split through the cache."""
    return cached_splits([dataset], split, cache, plan)


def cached_splits(
    datasets: Sequence[Dataset],
    split: str,
    cache: ShardCache,
    plan: Callable[[int], EpochPlan],
    *,
    decoded: bool = False,
) -> SplitReader:
    """Return a reader of the same split of several datasets through the cache, in the order of a `mixed_plan`.

    Args:
        datasets: The datasets.
        split: Name of the split.
        cache: Cache of the shards.
        plan: Returns the worker's plan of an epoch.
        decoded: Whether decoded records are kept in the cache, of as many shards as fit beside all shards, and, if the
            split is another one, beside the decoded records of the training split.
    """
    shards = [(dataset, shard) for dataset in datasets for shard in dataset.manifest.split_shards(split)]
    sizes = _kept_sizes(datasets, split, cache.limit) if decoded else {}
    return SplitReader(lambda number: cache.open(*shards[number], sizes.get(number)), plan)


def _kept_sizes(datasets: Sequence[Dataset], split: str, limit: int) -> dict[int, NDArray[np.int64]]:
    """Return the sizes of the records (N x 2) of the first shards whose decoded records fit in the cache, by number.

    All workers of a machine choose the same ones. What fits stays, so an epoch does not evict what the next one needs.
    """
    sizes = _sizes_by_shard(datasets, split)
    needed = np.cumsum([decoded_bytes(each) for each in sizes])
    others = sum(shard.size for dataset in datasets for shard in dataset.manifest.shards)
    if split != _TRAIN:
        others += sum(decoded_bytes(each) for each in _sizes_by_shard(datasets, _TRAIN))
    kept = int(np.searchsorted(needed, limit - others, side="right"))
    if kept < len(sizes):
        _log.warning(
            "The cache has room for the decoded images of %d of %d shards of the split %s; the others are decoded each "
            "time, which takes longer (a training crop several times as long). Room for all: cache_limit_gib = %.3g",
            kept, len(sizes), split, (needed[-1] + others) / (1 << 30),
        )  # fmt: skip
    return dict(enumerate(sizes[:kept]))


def _sizes_by_shard(datasets: Sequence[Dataset], split: str) -> list[NDArray[np.int64]]:
    return [each for dataset in datasets for each in _record_sizes(dataset.manifest, split)]


def _record_sizes(manifest: DatasetManifest, split: str) -> list[NDArray[np.int64]]:
    """Return height and width of the records of each shard of a split, N x 2."""
    samples = manifest.split_samples(split)
    sizes = np.stack([samples.column("height"), samples.column("width")], axis=1)[stored_order(len(samples))]
    count = len(manifest.split_shards(split))
    return [sizes[number::count] for number in range(count)]


def example_positions(manifest: DatasetManifest, split: str, count: int) -> list[int]:
    """Return positions of example images in a split's stored order, which is random: one image per kind, then a second.

    Images without nuclei come last. The same dataset gives the same examples.
    """
    samples = manifest.split_samples(split)
    candidates = stored_order(len(samples))[:_MOST_CANDIDATES]
    facts = (samples.column(name)[candidates].tolist() for name in ("kind", "nuclei"))
    seen: dict[object, int] = {}
    ranked = []
    for place, (kind, nuclei) in enumerate(zip(*facts, strict=True)):
        seen[kind] = seen.get(kind, 0) + (nuclei > 0)
        ranked.append((nuclei == 0, seen[kind], place))
    return [place for _, _, place in sorted(ranked)[:count]]


def example_records(dataset: Dataset, split: str, cache: ShardCache, count: int) -> list[bytes]:
    """Return the records of the example images; only their shards are fetched."""
    shards = dataset.manifest.split_shards(split)
    return [
        cache.open(dataset, shards[place % len(shards)]).read(place // len(shards))
        for place in example_positions(dataset.manifest, split, count)
    ]


@dataclass(frozen=True)
class LabelledImage:
    """An image of a dataset, with its labels, in memory.

    Attributes:
        name: Name of the image in the dataset.
        kind: Kind of the image.
        image: H x W x 3, uint8.
        labels: H x W, uint16.
    """

    name: str
    kind: Kind
    image: RgbImage
    labels: LabelImage


def images_of_worker(manifest: DatasetManifest, split: str, reader: SplitReader) -> Iterator[LabelledImage]:
    """Yield the images of one worker's reader, in stored order."""
    samples = manifest.split_samples(split)
    names, kinds = samples.texts("name"), samples.texts("kind")
    stored, shards = stored_order(len(samples)), len(manifest.split_shards(split))
    for shard, record in reader.places():
        number = stored[record * shards + shard]
        image, labels = decoded_image(reader.shard(shard), record, names[number])
        yield LabelledImage(names[number], Kind(kinds[number]), image, labels)


def images_of_split(dataset: Dataset, split: str, cache: ShardCache) -> Iterator[LabelledImage]:
    """Yield all images of a split in stored order, from shards that are fetched into the cache."""
    yield from images_of_range(dataset, split, cache, range(len(dataset.manifest.split_samples(split))))


def images_of_range(dataset: Dataset, split: str, cache: ShardCache, positions: range) -> Iterator[LabelledImage]:
    """Yield the images at consecutive positions of a split's stored order; only their shards are fetched."""
    counts = _records(dataset, split)

    def plan(_: int) -> EpochPlan:
        whole = epoch_plan(counts, seed=0, epoch=0, rank=0, world=1, global_batch=0, shuffle=False)
        return whole.cut(positions)

    with closing(cached_split(dataset, split, cache, plan)) as reader:
        yield from images_of_worker(dataset.manifest, split, reader)


def split_reader(
    dataset: Dataset,
    split: str,
    cache: ShardCache,
    rank: int = 0,
    world: int = 1,
    *,
    beside: Sequence[Dataset] | None = None,
) -> SplitReader:
    """Return a reader of a worker's images in stored order; over all workers, each image once.

    Args:
        dataset: The dataset.
        split: Name of the split.
        cache: Cache of the shards.
        rank: Number of the worker.
        world: Number of workers.
        beside: Datasets that are mixed in. If given, decoded records are kept in the cache, as `cached_splits` says.
    """
    counts = _records(dataset, split)
    return cached_splits(
        [dataset, *(beside or ())],
        split,
        cache,
        lambda _: epoch_plan(counts, seed=0, epoch=0, rank=rank, world=world, global_batch=0, shuffle=False),
        decoded=beside is not None,
    )


def _records(dataset: Dataset, split: str) -> list[int]:
    """Return the number of records of each shard of a split."""
    return [shard.records for shard in dataset.manifest.split_shards(split)]
