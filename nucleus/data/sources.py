"""Sources of images: a folder with all folders below it, or a zip."""

import lzma
import os
import stat
import struct
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO

from nucleus.data.folder_listing import Listing, is_annotation, is_archive, is_image, list_folder
from nucleus.data.zarr_store import ZarrFolder, is_zarr, local_zarr
from nucleus.errors import DataError, ImageError, StorageError

__all__ = [
    "BESIDE_IMAGES",
    "Source",
    "ZipSource",
    "no_zip",
    "open_source",
    "opened_zip",
]

BESIDE_IMAGES = "Expected image files alone, or Zarr folders alone; found both. Import the Zarr on its own."
"""Why a Zarr in a folder of image files is left out."""
_ARCHIVES = {
    b"\x1f\x8b": "gzip (.gz, .tar.gz)",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "RAR",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""Other archives by their first bytes."""
_TAR = slice(257, 262)
_PACKED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
_ENCRYPTED = 1
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError),
    *(OSError, ValueError),
)
"""What `zipfile` raises for entries that it cannot unpack."""
_MAX_ENTRY_BYTES = 4 << 30
_BOMB_BYTES = 64 << 20
_BOMB_RATIO = 200
"""An entry of more than `_BOMB_BYTES` that unpacks to more than this multiple of its size is a zip bomb."""


class Source(ABC):
    """Image files in a folder or zip.

    Attributes:
        title: Name of the source in messages.
    """

    def __init__(self, title: str) -> None:
        self.title = title

    @abstractmethod
    def entries(self) -> list[str]:
        """Return the relative paths of the image files, with forward slashes, sorted and without hidden files.

        Raises:
            DataError: The files cannot be listed, or are encrypted.
        """

    @abstractmethod
    def annotations(self) -> list[str]:
        """Return the relative paths of the files that may hold outlines, sorted; zips may be ROI sets."""

    @abstractmethod
    def left_out(self) -> dict[str, str]:
        """Return the reason for each path that could not be read."""

    @abstractmethod
    def archives(self) -> list[str]:
        """Return the relative paths of the archives in the source, which are not read."""

    def zarrs(self) -> dict[str, ZarrFolder]:
        """Return the Zarr hierarchies by their relative paths; a zip has none."""
        return {}

    @abstractmethod
    def read(self, entry: str) -> bytes:
        """Return the content of an entry. May be called from several threads at once.

        Raises:
            ImageError: This entry cannot be read.
            DataError: The source must not be read.
        """

    @abstractmethod
    def identity(self, entry: str) -> str:
        """Return a text that changes with the content of an entry; an empty one if it is not there."""

    def unlike(self, identities: Mapping[str, str]) -> str | None:
        """Return an entry whose identity is not the one that another process saw; None if there is none."""
        return next((entry for entry, seen in identities.items() if self.identity(entry) != seen), None)


def open_source(path: Path, title: str | None = None) -> Source:
    """Open a folder or a zip file; its name in messages is by default the path.

    Raises:
        DataError: The path does not exist, cannot be read, or is a file other than a whole zip.
    """
    if path.is_dir():
        return _FolderSource(path, title or str(path))
    if not path.exists():
        raise DataError(f"Expected a folder or a zip file at {title or path}; nothing is there.")
    return ZipSource(title or str(path), _opened_zip(path))


class _FolderSource(Source):
    def __init__(self, path: Path, title: str) -> None:
        super().__init__(title)
        self._root = path

    @cached_property
    def _listing(self) -> Listing:
        """What is in the folder, from one walk for images, outlines and archives alike."""
        kinds = (is_image, is_annotation, is_archive, is_zarr)
        return list_folder(self._root, lambda path: any(kind(path) for kind in kinds), zarr=True)

    def entries(self) -> list[str]:
        return list(filter(is_image, self._listing.files))

    def zarrs(self) -> dict[str, ZarrFolder]:
        found = filter(is_zarr, self._listing.files)
        return {path: local_zarr(self._root / path, str(Path(self.title) / path)) for path in found}

    def left_out(self) -> dict[str, str]:
        beside = {path for path in self._listing.unread if is_annotation(path) or is_archive(path)}  # no image is lost
        unread = {path: self._listing.unread[path] for path in self._listing.unread if path not in beside}
        return unread | dict.fromkeys(filter(is_zarr, self._listing.files), BESIDE_IMAGES)

    def annotations(self) -> list[str]:
        return list(filter(is_annotation, self._listing.files))

    def archives(self) -> list[str]:
        return list(filter(is_archive, self._listing.files))

    def read(self, entry: str) -> bytes:
        try:
            return (self._root / entry).read_bytes()
        except OSError as error:
            raise ImageError(f"Cannot read {Path(self.title) / entry}: {error.strerror}.") from error

    def identity(self, entry: str) -> str:
        path = self._root / entry
        with suppress(OSError):
            facts = path.stat()
            return f"{facts.st_size} {os.access(path, os.R_OK):d} {facts.st_mtime_ns // 100}"  # as shares of Windows
        return ""


class ZipSource(Source):
    """A zip file. It is never unpacked to disk; links and entries with paths outside the zip are refused.

    Args:
        title: Name of the zip in messages.
        archive: The open zip.
    """

    def __init__(self, title: str, archive: zipfile.ZipFile) -> None:
        super().__init__(title)
        self._archive = archive
        self._members = _members(self._archive, self.title)
        self._lock = threading.Lock()

    def entries(self) -> list[str]:
        images = sorted(filter(is_image, self._members))
        for entry in images:
            self._check_packing(entry)
        return images

    def left_out(self) -> dict[str, str]:
        reason = "Expected image files; found an archive within the zip, which is not read. Unpack it."
        return dict.fromkeys(self.archives(), reason)

    def annotations(self) -> list[str]:
        return sorted(filter(is_annotation, self._members))

    def archives(self) -> list[str]:
        return sorted(filter(is_archive, self._members))

    def read(self, entry: str) -> bytes:
        info = self._members[entry]
        self._check(entry, info)
        try:
            return self.unpacked(info)
        except (DataError, StorageError):
            raise
        except _DAMAGED as error:
            raise ImageError(f"Cannot read {entry} in {self.title}: {error}. Download the zip again.") from error

    def identity(self, entry: str) -> str:
        info = self._members.get(entry)
        return "" if info is None else f"{info.file_size} {info.CRC:08x}"

    def unpacked(self, info: zipfile.ZipInfo) -> bytes:
        """Return the content of an entry. Raises what `zipfile` does."""
        with self._lock:
            return self._archive.read(info)

    def _check_packing(self, entry: str) -> None:
        info = self._members[entry]
        if info.flag_bits & _ENCRYPTED:
            raise DataError(
                f"Expected a zip without a password; {entry} in {self.title} is encrypted. Unpack the zip with its "
                "password, and import the folder."
            )
        if info.compress_type not in _PACKED:
            raise DataError(
                f"Expected a zip packed with Deflate; {entry} in {self.title} is packed with method "
                f"{info.compress_type} of the zip format. Unpack the zip, and import the folder."
            )

    def _check(self, entry: str, info: zipfile.ZipInfo) -> None:
        path = PurePosixPath(entry)
        if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"Expected image files in {self.title}; {entry} is a link or a path outside the zip.")
        if info.file_size > _MAX_ENTRY_BYTES:
            raise DataError(f"Expected entries of at most 4 GiB in {self.title}; {entry} is larger.")
        if info.file_size > max(_BOMB_BYTES, _BOMB_RATIO * info.compress_size):
            raise DataError(
                f"Expected images in {self.title}; {entry} unpacks to {info.file_size >> 20} MiB from "
                f"{info.compress_size} bytes, which no image does. Remove it from the zip."
            )


def _opened_zip(path: Path) -> zipfile.ZipFile:
    try:
        with path.open("rb") as file:
            start = file.read(_TAR.stop)
        if zipfile.is_zipfile(path):
            return opened_zip(path, str(path))
        raise no_zip(str(path), start, path.stat().st_size)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


def opened_zip(file: Path | IO[bytes], title: str) -> zipfile.ZipFile:
    """Open a zip. Raises `DataError` if its list of contents cannot be read."""
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise DataError(
            f"Expected a whole zip file at {title}; its list of contents cannot be read: {error}. Download it again, "
            "or unpack it with another program and import the folder."
        ) from error


def no_zip(title: str, start: bytes, size: int) -> DataError:
    """Return the error for a file that is no whole zip.

    Args:
        title: Name of the file in messages.
        start: Its first bytes.
        size: Its size, bytes.
    """
    if start.startswith(b"PK\3\4"):
        return DataError(
            f"Expected a whole zip file at {title}; it breaks off after {size:,} bytes, before its list of contents. "
            "Download or copy it again."
        )
    tar = "tar" if start[_TAR] == b"ustar" else None
    kind = next((kind for begin, kind in _ARCHIVES.items() if start.startswith(begin)), tar)
    if kind is not None:
        return DataError(
            f"Expected a folder or a zip file; {title} is an archive of another kind, {kind}. Unpack it, and import "
            "the folder."
        )
    return DataError(f"Expected a folder or a zip file; {title} is neither. Put the images into a folder.")


def _members(archive: zipfile.ZipFile, title: str) -> dict[str, zipfile.ZipInfo]:
    """Return the files of a zip by their paths. Some programs of Windows write backslashes between folders."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        entry = info.filename.replace("\\", "/")
        other = members.get(entry)
        if other is not None and other.filename != info.filename:
            raise DataError(
                f"Expected one file of each name in {title}; found {other.filename!r} and {info.filename!r}, which "
                "differ in slashes only. Remove one of them."
            )
        if not entry.endswith("/"):
            members[entry] = info
    return members
