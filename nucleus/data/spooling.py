"""Where an import keeps records and shards until its version is written: a folder of this machine, or the bucket.

In the bucket, the workers of a cluster read the images in parts, and write the shards (`import_workers`). What is done
stays below `importing/<source>/` of the dataset until a version is written, so an import that was broken off goes on.
"""

from __future__ import annotations

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, LeftOut, Shard
from nucleus.data.fingerprints import Fingerprint
from nucleus.data.import_workers import CopiedRecord, PartReader, ShardWriter, SourcePart, code_sum, record_finder
from nucleus.data.intake import SourceImage, SourceListing, read_items
from nucleus.data.shards import RecordPlace, ShardPlan, write_planned
from nucleus.errors import AccessDeniedError
from nucleus.progress import Advance, split_progress
from nucleus.storage.bucket import TEST_FILE, Bucket, check_conditional_writes
from nucleus.storage.files import temporary_folder
from nucleus.storage.uri import S3Uri

__all__ = ["BucketSpool", "FolderSpool", "Spool", "Spread", "opened_spool"]

_FOLDER = "importing"
_ITEMS_OF_A_PART = 16
_REQUESTS = 8
_DELETIONS = 16

Spread = Callable[[Iterable[Any], Callable[[], Callable[[Any], Any]]], Iterator[Any]]
"""Applies a function, which each worker makes for itself, to items; yields the answers in any order."""


class Spool(ABC):
    """Where an import keeps what it reads.

    Attributes:
        read_before: Number of images that an import which was broken off had read.
    """

    read_before = 0

    @abstractmethod
    def read(self, listing: SourceListing, advance: Advance) -> list[SourceImage | LeftOut]:
        """Read the images of a source and keep their records; return them in order.

        Args:
            listing: The images.
            advance: Called with the number of images read and their total.

        Raises:
            DataError: The source changed, or a worker does not see it.
            NucleusError: The bucket, the disk or the cluster cannot be used.
        """

    @abstractmethod
    def copied(
        self, parent: Dataset, advance: Advance, *, compare: bool
    ) -> tuple[list[RecordPlace], list[Fingerprint]]:
        """Return the places of the records of a version, in the order of its samples, for another one.

        Args:
            parent: The version.
            advance: Called with the number of records and their total.
            compare: Whether to return the fingerprint of each image too; it is empty otherwise.

        Raises:
            NucleusError: A shard is damaged, or the bucket, the disk or the cluster cannot be used.
        """

    @abstractmethod
    def write(self, version: str, plans: Sequence[ShardPlan], advance: Advance) -> list[Shard]:
        """Write the shards of a version into the bucket.

        Args:
            version: The version.
            plans: Its shards.
            advance: Called with the bytes written and their total.

        Raises:
            NucleusError: A record is damaged, or the bucket, the disk or the cluster cannot be used.
        """

    def finish(self) -> list[str]:
        """Remove what is kept in the bucket, after the version is written; return why it could not be, a sentence."""
        return []


@contextmanager
def opened_spool(bucket: Bucket, src: Path | S3Uri, cache: ShardCache | None, spread: Spread | None) -> Iterator[Spool]:
    """Provide the place for the records of an import: a temporary folder, or the bucket if it is spread over workers.

    Args:
        bucket: The bucket at `s3://bucket/datasets/<name>`.
        src: The source.
        cache: Cache of shards, for an addition by this process.
        spread: Applies functions to items in workers; None for this process alone.

    Raises:
        OutputError: The folder for temporary files (TMPDIR) has no room.
        StorageError: The bucket cannot be written, or its server ignores the conditions of writes.
    """
    if spread is None:
        with temporary_folder("import") as folder:
            yield FolderSpool(folder, bucket, cache)
    else:
        check_conditional_writes(Bucket(bucket.uri.parent, single_writer=bucket.single_writer), TEST_FILE)
        place = src.absolute() if isinstance(src, Path) else src
        yield BucketSpool(bucket, hashlib.sha256(str(place).encode()).hexdigest()[:12], spread)


class FolderSpool(Spool):
    """A folder of this machine, for an import by this process.

    Args:
        folder: The folder.
        bucket: The bucket at `s3://bucket/datasets/<name>`.
        cache: Cache of shards; `copied` needs it.
    """

    def __init__(self, folder: Path, bucket: Bucket, cache: ShardCache | None = None) -> None:
        self._folder = folder
        self._bucket = bucket
        self._cache = cache

    def read(self, listing: SourceListing, advance: Advance) -> list[SourceImage | LeftOut]:
        return read_items(self._folder / "new", listing, advance)

    def copied(
        self, parent: Dataset, advance: Advance, *, compare: bool
    ) -> tuple[list[RecordPlace], list[Fingerprint]]:
        assert self._cache is not None
        folder = _emptied(self._folder / "old")

        def copy(cache: ShardCache, shard: Shard) -> list[CopiedRecord]:
            file, records = cache.open(parent, shard), []
            for number in range(len(file)):
                path, data = folder / f"{shard.file}-{number}", file.read(number)
                path.write_bytes(data)
                records.append(CopiedRecord.of(data, RecordPlace(str(path), 0, len(data), named=True), compare=compare))
            return records

        with ThreadPoolExecutor() as pool:
            return _in_order(parent, pool.map(partial(copy, self._cache), parent.manifest.shards), advance)

    def write(self, version: str, plans: Sequence[ShardPlan], advance: Advance) -> list[Shard]:
        folder = _emptied(self._folder / "shards")
        shards = [
            write_planned(plan, folder, (Path(place.file).read_bytes() for place, _ in plan.records)) for plan in plans
        ]
        shares = split_progress({shard.file: shard.size for shard in shards}, advance)

        def put(file: str) -> None:
            self._bucket.put(f"{version}/{file}", folder / file, advance=shares[file])

        with ThreadPoolExecutor(_REQUESTS) as pool:
            list(pool.map(put, shares))
        return shards


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _in_order(
    parent: Dataset, shards: Iterable[list[CopiedRecord]], advance: Advance
) -> tuple[list[RecordPlace], list[Fingerprint]]:
    """Return the places, and the fingerprints if there are any, in the order of the samples of a version."""
    names = parent.manifest.samples.texts("name")
    found: dict[str, CopiedRecord] = {}
    for records in shards:
        found.update((record.name, record) for record in records)
        advance(len(found), len(names))
    ordered = [found[name] for name in names]
    return [record.place for record in ordered], [record.print for record in ordered if record.print is not None]


class BucketSpool(Spool):
    """The bucket, for an import that is spread over workers; this process has what is known of the images alone.

    Args:
        bucket: The bucket at `s3://bucket/datasets/<name>`.
        source: Name of the source: what was read of it is found again by it.
        spread: Applies functions to items in workers.
    """

    def __init__(self, bucket: Bucket, source: str, spread: Spread) -> None:
        self._bucket = bucket
        self._work = f"{_FOLDER}/{source}"
        self._spread = spread

    def read(self, listing: SourceListing, advance: Advance) -> list[SourceImage | LeftOut]:
        found: dict[int, list[SourceImage | LeftOut]] = {}
        make = partial(PartReader, listing.reader, self._bucket, self._work, code_sum())
        done = 0
        for number, images, before in self._spread(_parts(listing), make):
            found[number] = images
            done += len(images)
            self.read_before += len(images) if before else 0
            advance(done, len(listing.items))
        return [image for number in sorted(found) for image in found[number]]

    def copied(
        self, parent: Dataset, advance: Advance, *, compare: bool
    ) -> tuple[list[RecordPlace], list[Fingerprint]]:
        make = partial(record_finder, parent, compare=compare)
        return _in_order(parent, self._spread(parent.manifest.shards, make), advance)

    def write(self, version: str, plans: Sequence[ShardPlan], advance: Advance) -> list[Shard]:
        sizes = {plan.file: plan.size for plan in plans}
        done, total = 0, sum(sizes.values())
        found: dict[str, Shard] = {}
        for shard in self._spread(plans, partial(ShardWriter, self._bucket, self._work, version)):
            found[shard.file] = shard
            done += sizes[shard.file]
            advance(done, total)
        return [found[plan.file] for plan in plans]

    def finish(self) -> list[str]:
        keys = [item.key for item in self._bucket.objects(f"{self._work}/")]
        notes = [key for key in keys if key.endswith(".json")]
        try:
            with ThreadPoolExecutor(_DELETIONS) as pool:
                list(pool.map(self._bucket.delete, notes))  # first, so that none names an object that is not there
                list(pool.map(self._bucket.delete, set(keys) - set(notes)))
        except AccessDeniedError as error:
            return [
                f"Expected to remove {self._bucket.uri / self._work}, which the import no longer needs: {error} Remove "
                "it with an account that may."
            ]
        return []


def _parts(listing: SourceListing) -> Iterator[SourcePart]:
    """Yield the parts of a source, as workers have room for them; of files, size and time are looked up then."""
    starts = range(0, len(listing.items), _ITEMS_OF_A_PART)
    for number, start in enumerate(starts):
        items = tuple(listing.items[start : start + _ITEMS_OF_A_PART])
        yield SourcePart(number, items, listing.reader.identities(items))
