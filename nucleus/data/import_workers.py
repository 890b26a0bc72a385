"""What the workers of a cluster do for an import: read parts of a source, look up records, and write shards.

They keep what is done in the bucket, below the prefix `importing/<source>/` of the dataset, until a version is written:
- `parts/<content>.json` has what is known of the images of a part; `content` is a hash of the files that it was read
  from (size and time, ETag or checksum), of the options, and of this package's code. It is written last.
- `parts/<content>-<sum>.tfrecord` has their records, without names.
- `shards/<plan>.json` has the size and sum of a shard that is in its place.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

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
from nucleus.errors import DataError, JobError, ObjectNotFoundError
from nucleus.progress import no_progress
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import sha256_of, temporary_folder

__all__ = ["CopiedRecord", "PartReader", "ShardWriter", "SourcePart", "code_sum", "record_finder"]

_THREADS = 4
"""Images that a worker reads at once: it has one CPU, and waits for the bucket."""
_REQUESTS = 8
_MOST_BYTES = 1 << 30
"""Bytes of records in one object; one request can send 5 GiB."""
_LIBRARIES = ("nucleus", "imagecodecs", "numpy", "opencv-python-headless", "scikit-image", "scipy", "tifffile")


@dataclass(frozen=True)
class SourcePart:
    """Images that a worker reads at a time, with their number among all parts and what identifies their files."""

    number: int
    items: tuple[SourceItem, ...]
    identities: dict[str, str]


@cache
def code_sum() -> str:
    """Return 12 hexadecimal digits that change with the code that reads images, and with the libraries it uses."""
    digest = hashlib.sha256(" ".join(f"{name} {version(name)}" for name in _LIBRARIES).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


_FACTS = TypeAdapter(list[SourceImage | LeftOut])


class PartReader:
    """Reads parts of a source in a worker.

    Args:
        reader: Reads its images.
        bucket: The bucket of the dataset.
        work: Prefix of what is kept.
        code: `code_sum` of the process that deals the parts.

    Raises:
        JobError: The worker has another version of this package, or of a library.
    """

    def __init__(self, reader: SourceReader, bucket: Bucket, work: str, code: str) -> None:
        if code_sum() != code:
            raise JobError(
                f"Expected the same nucleus and libraries on each worker as here; {socket.gethostname()} has others "
                f"({', '.join(f'{name} {version(name)}' for name in _LIBRARIES)}). Install the same versions on all."
            )
        self._reader = reader
        self._bucket = bucket
        self._folder = f"{work}/parts"

    def __call__(self, part: SourcePart) -> tuple[int, list[SourceImage | LeftOut], bool]:
        """Return the number of a part, its images, and whether they had been read before."""
        self._reader.expect(part.items, part.identities)
        content = hashlib.sha256(f"{code_sum()} {self._reader.content(part.items, part.identities)}".encode())
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

    def _read(self, part: SourcePart, key: str) -> list[SourceImage | LeftOut]:
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


@dataclass(frozen=True)
class CopiedRecord:
    """A record of a version: name, place, and the fingerprint of its image if images are compared."""

    name: str
    place: RecordPlace
    print: Fingerprint | None

    @classmethod
    def of(cls, record: bytes, place: RecordPlace, *, compare: bool) -> CopiedRecord:
        """Return what is known of a record; its image is decoded if images are compared."""
        return cls(record_name(record), place, fingerprint(decode_record(record)[1]) if compare else None)


def record_finder(parent: Dataset, *, compare: bool) -> Callable[[Shard], list[CopiedRecord]]:
    """Return, in a worker, the function that looks up the records of a shard, which stay where they are."""
    shards = ShardCache()

    def look_up(shard: Shard) -> list[CopiedRecord]:
        file, key = shards.open(parent, shard), f"{parent.manifest.version}/{shard.file}"
        places = [RecordPlace(key, *file.span(number), named=True) for number in range(len(file))]
        return [CopiedRecord.of(file.read(number), place, compare=compare) for number, place in enumerate(places)]

    return look_up


@dataclass(frozen=True)
class _Written:
    """A shard in its place, and its ETag there."""

    shard: Shard
    etag: str


_WRITTEN = TypeAdapter(_Written)


class ShardWriter:
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
