"""The objects of a Zarr hierarchy, in a folder or a bucket: read only, each read once, and nothing outside it.

Documents are JSON; arrays are opened by zarr-python on this module's store, after a look at their metadata: only
numbers, and only codecs that compress or rearrange numbers, so that nothing from a store can run code.
"""

import asyncio
import hashlib
import json
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nucleus.data.zarr_codecs import ChunkPacking, Span, chunk_packing
from nucleus.errors import AccessDeniedError, ImageError, ObjectNotFoundError
from nucleus.lazy import zarr
from nucleus.storage.bucket import Bucket, StoredObject
from nucleus.storage.s3_errors import credentials_refused, refusal_of
from nucleus.storage.uri import key_problem
from nucleus.surroundings import disk_space

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

__all__ = [
    "ZARR_SUFFIX",
    "ZarrFolder",
    "array_key",
    "bucket_zarr",
    "is_zarr",
    "local_zarr",
    "objects_and_zarrs",
    "why_no_zarr",
]

ZARR_SUFFIX = ".zarr"
_LARGEST_DOCUMENT = 64 << 20
"""Bytes; the metadata of a plate of 1,536 wells take some hundred thousand."""
_MOST_OF_DISK = 2
"""The part of the free disk, one in so many, that copies of a bucket's objects may take."""

_DOCUMENTS = ("zarr.json", ".zarray", ".zattrs")
_LAST = "\uffff"
"""What no part of a key begins with, but all are before."""
_SMALL, _MOST_IN_MEMORY = 1 << 15, 1 << 24
"""Bytes of an object that is kept in memory, and of all of them."""


def is_zarr(name: str) -> bool:
    """Return whether a name or path is that of a Zarr hierarchy."""
    return name.lower().rstrip("/").endswith(ZARR_SUFFIX)


def why_no_zarr(folder: Path) -> str | None:
    """Return why a folder that holds a Zarr hierarchy is not taken for one: its name; None for other folders."""
    if is_zarr(folder.name) or not any((folder / key).is_file() for key in (".zgroup", ".zattrs", "zarr.json")):
        return None
    return f"Expected a name that ends in {ZARR_SUFFIX}, by which Zarr is told from folders; found {folder}. Rename it."


def array_key(path: str, zarr_format: int) -> str:
    """Return the key of the metadata of an array at a path."""
    return f"{path}/{'zarr.json' if zarr_format == 3 else '.zarray'}"


class ZarrFolder:
    """A Zarr hierarchy, or a group in one; made by `local_zarr` or `bucket_zarr`.

    Attributes:
        name: Name in messages.
    """

    def __init__(self, name: str, objects: "_LocalObjects | _BucketObjects") -> None:
        self.name = name
        self._objects = objects

    def __str__(self) -> str:
        return self.name

    @property
    def place(self) -> "Path | tuple[Bucket, str]":
        """Where it is: a folder without links that lead out of the hierarchy, or a bucket and a key.

        Raises `ImageError` if a link does lead out of it.
        """
        return self._objects.place

    def identity(self) -> str:
        """Return a text that changes with any object in this group, which are all listed; an empty one without any.

        Raises:
            ImageError: A link leads out of the hierarchy.
            StorageError: The bucket cannot be read.
        """
        digest, count = hashlib.sha256(), 0
        for count, line in enumerate(self._objects.listed(), 1):  # noqa: B007
            digest.update(f"{line}\n".encode(errors="surrogateescape"))
        return digest.hexdigest() if count else ""

    def below(self, path: str) -> "ZarrFolder":
        """Return a group in this one. Raises `ImageError` if the path leads out of it."""
        self._check_key(path)
        return ZarrFolder(f"{self.name}/{path}", self._objects.below(path))

    def read(self, key: str, span: Span | None = None) -> bytes | None:
        """Return the bytes of an object, or a span of them; None if there is no such object.

        Raises:
            ImageError: The object must not or cannot be read, or is outside this hierarchy.
            StorageError: The bucket cannot be read.
        """
        self._check_key(key)
        return self._objects.read(key, span)

    def document(self, key: str) -> dict[str, Any] | None:
        """Return a JSON object; None if there is none of this key.

        Raises:
            ImageError: It is not a JSON object, or cannot be read.
            StorageError: The bucket cannot be read.
        """
        data = self.read(key)
        if data is None:
            return None
        try:
            found = json.loads(data) if len(data) <= _LARGEST_DOCUMENT else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ImageError(
                f"Expected a JSON object in {self.name}/{key}; found something else. The Zarr is damaged: copy it "
                "again from its source."
            )
        return found

    def array(self, path: str, zarr_format: int) -> "zarr.Array[Any] | None":
        """Open an array of numbers, after a look at its metadata; None if there is none at this path.

        Args:
            path: Path of the array in this group.
            zarr_format: Version of Zarr, 2 or 3.

        Raises:
            ImageError: It is of other things than numbers, has a codec that is not read, or a shape that no image has.
            StorageError: The bucket cannot be read.
            MissingPackageError: zarr is not installed.
        """
        document = self.document(array_key(path, zarr_format))
        if document is None or document.get("node_type", "array") != "array":
            return None
        where = f"{self.name}/{path}"
        packing = chunk_packing(document, zarr_format, where)
        store = _store(self, path, packing)
        try:
            return zarr.open_array(store, path=path, mode="r", zarr_format=zarr_format)  # type: ignore[arg-type]
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"Expected a Zarr array at {where}; its metadata cannot be read: {reason}.") from error

    def _check_key(self, key: str) -> None:
        problem = key_problem(key) or ("Expected forward slashes; found others" if "\\" in key else None)
        if problem is not None:
            raise ImageError(f"Expected only paths within {self.name} in its metadata; found {key!r}. {problem}.")


def local_zarr(folder: Path, name: str | None = None) -> ZarrFolder:
    """Return the Zarr hierarchy in a folder; its name in messages is by default the path."""
    return ZarrFolder(name or str(folder), _LocalObjects(folder, folder))


def bucket_zarr(bucket: Bucket, key: str = "") -> ZarrFolder:
    """Return the Zarr hierarchy below a key of a bucket."""
    return ZarrFolder(str(bucket.uri / key if key else bucket.uri), _BucketObjects(bucket, key))


class _LocalObjects:
    """The files of a folder; links that lead out of it are refused."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder = folder.absolute()  # for other processes, which have other current folders
        self._root = root.absolute()
        self._real = root.resolve()

    @property
    def place(self) -> Path:
        self._check_inside(self._folder)
        return self._folder

    def listed(self) -> Iterator[str]:
        """Yield the path, size and time of each file."""
        for folder, folders, files in os.walk(self.place):
            folders.sort()
            for path in (Path(folder) / name for name in sorted(files)):
                with suppress(FileNotFoundError):  # a link to nothing, or removed just now
                    facts = path.stat()
                    yield f"{path.relative_to(self._folder)} {facts.st_size} {facts.st_mtime_ns}"

    def below(self, path: str) -> "_LocalObjects":
        return _LocalObjects(self._folder / path, self._root)

    def read(self, key: str, span: Span | None) -> bytes | None:
        path = self._folder / key
        try:
            self._check_inside(path)
            with path.open("rb") as file:
                return _span_of(file, span)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ImageError(f"Cannot read {path}: {error.strerror or error}.") from error

    def _check_inside(self, path: Path) -> None:
        if not path.resolve().is_relative_to(self._real):
            raise ImageError(
                f"Expected only files within {self._root}; {path} is a link that leads out of it. Copy the file there."
            )


def _span_of(file: IO[bytes], span: Span | None) -> bytes:
    if span is None:
        return file.read()
    start, stop = span
    if start is None:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (stop or 0)))
        return file.read()
    file.seek(start)
    return file.read(-1 if stop is None else stop - start)


class _BucketObjects:
    """The objects below a prefix of a bucket; what was read stays in a temporary file, while the disk has room."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._kept = _Kept()
        self._absent: set[str] = set()
        self._reading: dict[tuple[str, Span | None], threading.Lock] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _BucketObjects, (self._bucket, self._prefix)

    @property
    def place(self) -> tuple[Bucket, str]:
        return self._bucket, self._prefix

    def listed(self) -> Iterator[str]:
        """Yield the key and ETag of each object."""
        for item in self._bucket.objects(f"{self._prefix}/".lstrip("/")):
            yield f"{item.key} {item.etag}"

    def below(self, path: str) -> "_BucketObjects":
        return _BucketObjects(self._bucket, f"{self._prefix}/{path}".lstrip("/"))

    def read(self, key: str, span: Span | None) -> bytes | None:
        with self._reading.setdefault((key, span), threading.Lock()):  # two threads may need the same index of a shard
            if key in self._absent:
                return None
            found = self._kept.get((key, span))
            if found is None:
                found = self._received(key, span)
                if found is None:
                    self._absent.add(key)
                    return None
                self._kept.put((key, span), found)
            return found

    def _received(self, key: str, span: Span | None) -> bytes | None:
        try:
            return self._bucket.get(f"{self._prefix}/{key}".lstrip("/"), None if span is None else _header(span))
        except ObjectNotFoundError:
            return None
        except AccessDeniedError as error:
            if refusal_of(error) is None or credentials_refused(error):
                raise
            raise ImageError(
                f"Expected all objects of {self._bucket.uri / self._prefix} to be readable; {key} is not. {error} "
                "A server that may not tell which objects there are refuses those that there are not, too."
            ) from error


def _header(span: Span) -> str:
    """Return the value of the header `Range`."""
    start, stop = span
    if start is None:
        return f"bytes=-{stop}"
    return f"bytes={start}-" if stop is None else f"bytes={start}-{stop - 1}"


class _Kept:
    """Bytes by their keys: small ones in memory, others in a temporary file that ends with this object."""

    def __init__(self) -> None:
        self._small: dict[tuple[str, Span | None], bytes] = {}
        self._places: dict[tuple[str, Span | None], tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._end = self._in_memory = 0

    @cached_property
    def _file(self) -> IO[bytes]:
        file = tempfile.TemporaryFile(prefix="nucleus-zarr-")  # noqa: SIM115  it lives as long as this object
        weakref.finalize(self, file.close)
        return file

    @cached_property
    def _room(self) -> int:
        free, _ = disk_space(Path(tempfile.gettempdir()))
        return (free or 0) // _MOST_OF_DISK

    def get(self, key: tuple[str, Span | None]) -> bytes | None:
        place = self._places.get(key)
        if place is None:
            return self._small.get(key)
        with self._lock:
            self._file.seek(place[0])
            return self._file.read(place[1])

    def put(self, key: tuple[str, Span | None], data: bytes) -> None:
        """Keep bytes; not if the disk has no room, so that they are read again where they are needed again."""
        with self._lock:
            if len(data) <= _SMALL and self._in_memory + len(data) <= _MOST_IN_MEMORY:
                self._small[key] = data
                self._in_memory += len(data)
            elif self._end + len(data) <= self._room:
                self._write(key, data)

    def _write(self, key: tuple[str, Span | None], data: bytes) -> None:
        try:
            self._file.seek(self._end)
            self._file.write(data)
            self._file.flush()
        except OSError:
            self._room = 0
            return
        self._places[key] = (self._end, len(data))
        self._end += len(data)


class _ReadsFolder:
    """What zarr-python asks of a store: objects of a `ZarrFolder`, read in threads; nothing is written or listed."""

    supports_writes = supports_deletes = supports_listing = False
    folder: ZarrFolder
    path: str
    packing: ChunkPacking

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ReadsFolder) and other.folder is self.folder

    __hash__ = object.__hash__

    async def get(
        self, key: str, prototype: "BufferPrototype", byte_range: "ByteRequest | None" = None
    ) -> "Buffer | None":
        data = await asyncio.to_thread(self._checked, key, _asked(byte_range))
        return None if data is None else prototype.buffer.from_bytes(data)

    def _checked(self, key: str, span: Span | None) -> bytes | None:
        """Read an object; one of chunks is looked at before zarr-python unpacks it."""
        data = self.folder.read(key, span)
        if data is not None and key.startswith(f"{self.path}/") and not key.endswith(_DOCUMENTS):
            self.packing.check(data, span, f"{self.folder.name}/{key}")
        return data

    async def get_partial_values(
        self, prototype: "BufferPrototype", key_ranges: "Iterable[tuple[str, ByteRequest | None]]"
    ) -> "list[Buffer | None]":
        return list(await asyncio.gather(*(self.get(key, prototype, span) for key, span in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self.folder.read, key) is not None

    def _refuse(self, *_: object) -> Any:
        raise NotImplementedError

    set = delete = list = list_prefix = list_dir = _refuse


def _asked(span: Any) -> Span | None:
    """Return the span of a request of zarr-python: one of a range, an offset or a suffix, or None."""
    if span is None:
        return None
    if hasattr(span, "suffix"):
        return None, span.suffix
    return (span.offset, None) if hasattr(span, "offset") else (span.start, span.end)


def _store(folder: ZarrFolder, path: str, packing: ChunkPacking) -> "Store":
    """Return a store of zarr-python, which is slow to import, for an array at a path."""
    from zarr.abc.store import Store  # noqa: PLC0415

    found = type("FolderStore", (_ReadsFolder, Store), {})(read_only=True)
    found.folder, found.path, found.packing = folder, path, packing
    return found  # type: ignore[no-any-return]


def objects_and_zarrs(bucket: Bucket) -> Iterator[StoredObject | str]:
    """Yield the objects of a prefix in the order of their keys; of a Zarr, which may have millions, its key alone."""
    start: str | None = ""
    while start is not None:
        passed, start = start, None
        for item in bucket.objects("", f"{passed}/{_LAST}" if passed else ""):
            key = _zarr_of(item.key)
            if key is None:
                yield item
            elif key != passed:
                yield key
                start = key
                break


def _zarr_of(key: str) -> str | None:
    """Return the key of the Zarr that an object is in, or None."""
    parts = key.split("/")[:-1]
    return next(("/".join(parts[: at + 1]) for at, part in enumerate(parts) if is_zarr(part)), None)
