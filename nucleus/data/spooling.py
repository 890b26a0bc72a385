"""Where an import keeps records and shards until its version is written: a folder of this machine, or the bucket.

In the bucket, the workers of a cluster read the images in parts, and write the shards. What is done stays below
`importing/<source>/` of the dataset until a version is written, so an import that was broken off goes on:
- `parts/<content>.json` has what is known of the images of a part; `content` is a hash of the files that it was read
  from (size and time, ETag or checksum), of the options, and of this package's code. It is written last.
- `parts/<content>-<sum>.tfrecord` has their records, without names.
- `shards/<plan>.json` has the size and sum of a shard that is in its place.
"""

from __future__ import annotations

import hashlib
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, LeftOut, Shard
from nucleus.data.fingerprints import Fingerprint, fingerprint
from nucleus.data.intake import SourceImage, SourceItem, SourceListing, SourceReader, read_items
from nucleus.data.shards import (
    RecordPlace,
    ShardFile,
    ShardPlan,
    decode_record,
    record_name,
    span_of_record,
    unframed_record,
    write_planned,
    write_shard,
)
from nucleus.errors import AccessDeniedError, DataError, JobError, ObjectNotFoundError
from nucleus.progress import Advance, no_progress, split_progress
from nucleus.storage.bucket import TEST_FILE, Bucket, check_conditional_writes
from nucleus.storage.files import sha256_of, temporary_folder
from nucleus.storage.uri import S3Uri

__all__ = ["BucketSpool", "FolderSpool", "Spool", "Spread", "opened_spool"]

_FOLDER = "importing"
_ITEMS_OF_A_PART = 16
_THREADS = 4
"""Images that a worker reads at once: it has one CPU, and waits for the bucket."""
_REQUESTS = 8
_DELETIONS = 16
_MOST_BYTES = 1 << 30
"""Bytes of records in one object; one request can send 5 GiB."""
_LIBRARIES = ("nucleus", "imagecodecs", "numpy", "opencv-python-headless", "scikit-image", "scipy", "tifffile")

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

        def copy(cache: ShardCache, shard: Shard) -> list[_Copied]:
            file, records = cache.open(parent, shard), []
            for number in range(len(file)):
                path, data = folder / f"{shard.file}-{number}", file.read(number)
                path.write_bytes(data)
                records.append(_Copied.of(data, RecordPlace(str(path), 0, len(data), named=True), compare=compare))
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


@dataclass(frozen=True)
class _Copied:
    """A record of a version: name, place, and the fingerprint of its image if images are compared."""

    name: str
    place: RecordPlace
    print: Fingerprint | None

    @classmethod
    def of(cls, record: bytes, place: RecordPlace, *, compare: bool) -> _Copied:
        """Return what is known of a record; its image is decoded if images are compared."""
        return cls(record_name(record), place, fingerprint(decode_record(record)[1]) if compare else None)


def _in_order(
    parent: Dataset, shards: Iterable[list[_Copied]], advance: Advance
) -> tuple[list[RecordPlace], list[Fingerprint]]:
    """Return the places, and the fingerprints if there are any, in the order of the samples of a version."""
    names = parent.manifest.samples.texts("name")
    found: dict[str, _Copied] = {}
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
        make = partial(_PartReader, listing.reader, self._bucket, self._work, _code_sum())
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
        make = partial(_copier, parent, compare=compare)
        return _in_order(parent, self._spread(parent.manifest.shards, make), advance)

    def write(self, version: str, plans: Sequence[ShardPlan], advance: Advance) -> list[Shard]:
        sizes = {plan.file: plan.size for plan in plans}
        done, total = 0, sum(sizes.values())
        found: dict[str, Shard] = {}
        for shard in self._spread(plans, partial(_ShardWriter, self._bucket, self._work, version)):
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


@dataclass(frozen=True)
class _Part:
    """Images that a worker reads at a time, with their number among all parts and what identifies their files."""

    number: int
    items: tuple[SourceItem, ...]
    identities: dict[str, str]


def _parts(listing: SourceListing) -> Iterator[_Part]:
    """Yield the parts of a source, as workers have room for them; of files, size and time are looked up then."""
    starts = range(0, len(listing.items), _ITEMS_OF_A_PART)
    for number, start in enumerate(starts):
        items = tuple(listing.items[start : start + _ITEMS_OF_A_PART])
        yield _Part(number, items, listing.reader.identities(items))


@cache
def _code_sum() -> str:
    """Return 12 hexadecimal digits that change with the code that reads images, and with the libraries it uses."""
    digest = hashlib.sha256(" ".join(f"{name} {version(name)}" for name in _LIBRARIES).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


_FACTS = TypeAdapter(list[SourceImage | LeftOut])


class _PartReader:
    """Reads parts of a source in a worker.

    Args:
        reader: Reads its images.
        bucket: The bucket of the dataset.
        work: Prefix of what is kept.
        code: `_code_sum` of the process that deals the parts.

    Raises:
        JobError: The worker has another version of this package, or of a library.
    """

    def __init__(self, reader: SourceReader, bucket: Bucket, work: str, code: str) -> None:
        if _code_sum() != code:
            raise JobError(
                f"Expected the same nucleus and libraries on each worker as here; {socket.gethostname()} has others "
                f"({', '.join(f'{name} {version(name)}' for name in _LIBRARIES)}). Install the same versions on all."
            )
        self._reader = reader
        self._bucket = bucket
        self._folder = f"{work}/parts"

    def __call__(self, part: _Part) -> tuple[int, list[SourceImage | LeftOut], bool]:
        """Return the number of a part, its images, and whether they had been read before."""
        self._reader.expect(part.items, part.identities)
        content = hashlib.sha256(f"{_code_sum()} {self._reader.content(part.items, part.identities)}".encode())
        key = f"{self._folder}/{content.hexdigest()[:32]}"
        stored = self._stored(key, len(part.items))
        if stored is not None:
            return part.number, stored, True
        images = self._read(part, key)
        self._bucket.put(f"{key}.json", _FACTS.dump_json(images))
        return part.number, images, False

    def _stored(self, key: str, count: int) -> list[SourceImage | LeftOut] | None:
        """Return the images of a part that was read before; None if it was not, or something of it is missing."""
        try:
            images = _FACTS.validate_json(self._bucket.get(f"{key}.json"))
        except (ObjectNotFoundError, ValidationError):
            return None
        sizes = {item.key: item.size for item in self._bucket.objects(f"{key}-")}
        places = [image.record for image in images if isinstance(image, SourceImage)]
        there = all(place.start + place.size < sizes.get(place.file, 0) for place in places)
        return images if there and len(images) == count else None

    def _read(self, part: _Part, key: str) -> list[SourceImage | LeftOut]:
        """Read the images of a part, and put their records into the bucket."""
        with temporary_folder("part") as folder:
            listing = SourceListing(self._reader, "", list(part.items), [])
            found = read_items(folder / "new", listing, no_progress, threads=_THREADS)
            places = [image.record for image in found if isinstance(image, SourceImage)]
            stored = iter([place for batch in _batches(places) for place in self._put(batch, folder / "packed", key)])
        return [replace(each, record=next(stored)) if isinstance(each, SourceImage) else each for each in found]

    def _put(self, places: Sequence[RecordPlace], path: Path, key: str) -> list[RecordPlace]:
        """Put records from files into one object; return where they are."""
        write_shard(path, (Path(place.file).read_bytes() for place in places))
        target = f"{key}-{sha256_of(path)[:12]}.tfrecord"
        self._bucket.put(target, path)
        file = ShardFile.open(path)
        return [RecordPlace(target, *file.span(number)) for number in range(len(file))]


def _batches(places: Sequence[RecordPlace]) -> list[list[RecordPlace]]:
    """Cut records into batches, each of which one request can send."""
    batches: dict[int, list[RecordPlace]] = {}
    for place, end in zip(places, accumulate(place.size for place in places), strict=True):
        batches.setdefault(end // _MOST_BYTES, []).append(place)
    return list(batches.values())


def _copier(parent: Dataset, *, compare: bool) -> Callable[[Shard], list[_Copied]]:
    """Return, in a worker, the function that looks up the records of a shard, which stay where they are."""
    shards = ShardCache()

    def look_up(shard: Shard) -> list[_Copied]:
        file, key = shards.open(parent, shard), f"{parent.manifest.version}/{shard.file}"
        places = [RecordPlace(key, *file.span(number), named=True) for number in range(len(file))]
        return [_Copied.of(file.read(number), place, compare=compare) for number, place in enumerate(places)]

    return look_up


@dataclass(frozen=True)
class _Written:
    """A shard in its place, and its ETag there."""

    shard: Shard
    etag: str


_WRITTEN = TypeAdapter(_Written)


class _ShardWriter:
    """Writes shards in a worker, from records in the bucket.

    Args:
        bucket: The bucket of the dataset.
        work: Prefix of what is kept.
        version: The version.
    """

    def __init__(self, bucket: Bucket, work: str, version: str) -> None:
        self._bucket = bucket
        self._folder = f"{work}/shards"
        self._version = version

    def __call__(self, plan: ShardPlan) -> Shard:
        """Write a shard, unless it is in its place since an import that was broken off."""
        target = f"{self._version}/{plan.file}"
        note = f"{self._folder}/{hashlib.sha256(f'{target} {plan}'.encode()).hexdigest()[:32]}.json"
        written = self._written(note, target)
        if written is None:
            with temporary_folder("shard") as folder, ThreadPoolExecutor(_REQUESTS) as pool:
                places = [place for place, _ in plan.records]
                shard = write_planned(plan, folder, pool.map(self._record, places))
                written = _Written(shard, self._bucket.put(target, folder / plan.file))
            self._bucket.put(note, _WRITTEN.dump_json(written))
        return written.shard

    def _written(self, note: str, target: str) -> _Written | None:
        try:
            written = _WRITTEN.validate_json(self._bucket.get(note))
        except (ObjectNotFoundError, ValidationError):
            return None
        found = self._bucket.find(target)
        same = found is not None and found.etag.strip('"') == written.etag.strip('"')
        return written if same else None

    def _record(self, place: RecordPlace) -> bytes:
        try:
            data = self._bucket.get(place.file, span_of_record(place))
        except ObjectNotFoundError as error:
            raise DataError(
                f"Expected records at {self._bucket.uri / place.file}; they were removed, as another import of the "
                "same images does when it has ended. Import again."
            ) from error
        return unframed_record(data, str(self._bucket.uri / place.file))
