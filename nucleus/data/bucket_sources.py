"""Sources of images in a bucket: a prefix, or a zip, read where they are; nothing is copied here first."""

import io
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from nucleus.data.folder_listing import is_annotation, is_archive, is_image
from nucleus.data.sources import BESIDE_IMAGES, Source, ZipSource, no_zip, opened_zip
from nucleus.data.zarr_store import ZarrFolder, bucket_zarr, objects_and_zarrs
from nucleus.errors import AccessDeniedError, DataError, ImageError, ObjectNotFoundError
from nucleus.storage.bucket import Bucket, StoredObject
from nucleus.storage.s3_errors import credentials_refused
from nucleus.storage.uri import S3Uri, key_problem

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

__all__ = ["open_bucket_source"]

_ZIP = ".zip"
_HEADER = 30
"""Bytes of the header of an entry in a zip, before its name."""
_MOST_HEADER = _HEADER + 2 * 65_535
_TAIL = 1 << 20
"""Bytes at the end of a zip that are read first: they hold the list of contents of most."""
_START = 262


def open_bucket_source(uri: S3Uri, *, anonymous: bool = False) -> Source:
    """Open the images below a prefix, or those of a zip, in a bucket.

    Each object is read once, when it is needed; of a zip, its list of contents and then each entry. An object that is
    not the one that was listed ends the import.

    Args:
        uri: The prefix, or the zip.
        anonymous: Whether requests are not signed, as public buckets allow.

    Raises:
        DataError: There is nothing, or the object is no zip.
        StorageError: The bucket cannot be read.
    """
    above = Bucket(S3Uri(uri.bucket), anonymous=anonymous)
    if not uri.key.lower().endswith(_ZIP):
        return _PrefixSource(Bucket(uri, anonymous=anonymous))
    found = above.find(uri.key)
    if found is None:
        raise DataError(f"Expected a zip at {uri}; nothing is there. Check its key.")
    return _BucketZip(above, found)


def _get(bucket: Bucket, key: str, etag: str, span: str | None = None) -> bytes:
    """Return an object, or a span of it.

    Raises:
        ImageError: It must not be read.
        DataError: It is no longer the object that was listed.
    """
    changed = (
        f"Expected {bucket.uri / key} to stay as it is while it is imported; it was {{}}. Import again, when "
        "nobody writes there."
    )
    try:
        data, found = bucket.get_tagged(key, span)
    except ObjectNotFoundError as error:
        raise DataError(changed.format("removed")) from error
    except AccessDeniedError as error:
        if credentials_refused(error):
            raise
        raise ImageError(f"Cannot read {bucket.uri / key}: {error}") from error
    if found != etag:
        raise DataError(changed.format("replaced"))
    return data


class _PrefixSource(Source):
    """The objects below a prefix, whose keys are listed once."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(str(bucket.uri))
        self._bucket = bucket

    def zarrs(self) -> dict[str, ZarrFolder]:
        _ = self._objects  # lists them
        return {key: bucket_zarr(self._bucket, key) for key in self._zarrs}

    @cached_property
    def _objects(self) -> dict[str, StoredObject]:
        """The images, outlines and archives by their keys; the listing is a stream, and what is passed over goes."""
        wanted = (item for item in self._listed() if _is_wanted(item.key))
        return {item.key: item for item in wanted if not (item.key.endswith("/") and item.size == 0)}

    @cached_property
    def _zarrs(self) -> list[str]:
        return []

    def _listed(self) -> Iterator[StoredObject]:
        """Yield the objects that are not in a Zarr, of which there may be millions; keep the keys of Zarrs."""
        for item in objects_and_zarrs(self._bucket):
            if isinstance(item, str):
                self._zarrs.append(item)
            else:
                yield item

    def entries(self) -> list[str]:
        return [key for key in self._objects if is_image(key) and key_problem(key) is None]

    def annotations(self) -> list[str]:
        return [key for key in self._objects if is_annotation(key) and key_problem(key) is None]

    def archives(self) -> list[str]:
        return [key for key in self._objects if is_archive(key)]

    def left_out(self) -> dict[str, str]:
        problems = {key: key_problem(key) for key in self._objects if is_image(key)}
        unread = {key: f"{problem}. Copy the object to another key." for key, problem in problems.items() if problem}
        return unread | dict.fromkeys(self._zarrs, BESIDE_IMAGES)

    @cached_property
    def _etags(self) -> dict[str, str]:
        """The ETag of each entry, as it was listed here or in the process that dealt the entry."""
        return {key: item.etag for key, item in self._objects.items()}

    def identity(self, entry: str) -> str:
        return self._etags[entry]

    def unlike(self, identities: Mapping[str, str]) -> None:
        self._etags = dict(identities)  # `read` compares them

    def read(self, entry: str) -> bytes:
        return _get(self._bucket, entry, self._etags[entry])


def _is_wanted(key: str) -> bool:
    return is_image(key) or is_annotation(key) or is_archive(key)


class _BucketZip(ZipSource):
    """A zip in a bucket: its list of contents is read when it is opened, and each entry by a request of its own."""

    def __init__(self, bucket: Bucket, item: StoredObject) -> None:
        self._bucket = bucket
        self._item = item
        title = str(bucket.uri / item.key)
        file = io.BufferedReader(_RangedFile(self))
        if not zipfile.is_zipfile(file):
            raise no_zip(title, self.span(0, _START) if item.size else b"", item.size)
        super().__init__(title, opened_zip(file, title))

    @property
    def size(self) -> int:
        """Bytes of the zip."""
        return self._item.size

    def span(self, start: int, stop: int) -> bytes:
        """Return the bytes of the zip from a start to before a stop; it has at least one of them."""
        return _get(self._bucket, self._item.key, self._item.etag, f"bytes={start}-{min(stop, self.size) - 1}")

    @cached_property
    def _ends(self) -> dict[int, int]:
        """Where the entry that begins at a place ends at the latest: where the next begins."""
        starts = sorted({info.header_offset for info in self._members.values()})
        return dict(zip(starts, [*starts[1:], self.size], strict=True))

    def unpacked(self, info: zipfile.ZipInfo) -> bytes:
        stop = min(self._ends[info.header_offset], info.header_offset + _MOST_HEADER + info.compress_size)
        data = self.span(info.header_offset, stop)
        if not data.startswith(b"PK\3\4") or len(data) < _HEADER:
            raise zipfile.BadZipFile("its header is damaged")
        start = _HEADER + sum(int.from_bytes(data[at : at + 2], "little") for at in (26, 28))
        with zipfile.ZipExtFile(io.BytesIO(data[start : start + info.compress_size]), "r", info) as file:
            return file.read()


class _RangedFile(io.RawIOBase):
    """The bytes of a zip as a file, for its list of contents: its end is read at once, and other parts as asked."""

    def __init__(self, archive: _BucketZip) -> None:
        self._archive = archive
        self._at = 0

    @cached_property
    def _tail(self) -> bytes:
        return self._archive.span(max(0, self._archive.size - _TAIL), self._archive.size) if self._archive.size else b""

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._archive.size}[whence]
        if start + offset < 0:
            raise OSError("a place before the first byte")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: "Buffer", /) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._archive.size)
        if self._at >= stop:
            return 0
        first = self._archive.size - len(self._tail)
        inside = self._tail[self._at - first : stop - first] if self._at >= first else None
        data = self._archive.span(self._at, stop) if inside is None else inside
        view[: len(data)] = data
        self._at += len(data)
        return len(data)
