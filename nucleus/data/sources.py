"""Where images come from: a folder or a zip, seen as named entries that are read one at a time."""

import stat
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath

from nucleus.data.images import IMAGE_SUFFIXES
from nucleus.errors import DataError

__all__ = ["Source", "open_source"]

_MAX_ENTRY_BYTES = 4 << 30
_BOMB_BYTES = 64 << 20
_BOMB_RATIO = 200
"""What unpacks to more than this many times its size is a bomb, if it is large: images do not."""


class Source(ABC):
    """Image files under one root.

    Attributes:
        title: What the user calls the source.
    """

    def __init__(self, title: str) -> None:
        self.title = title

    @abstractmethod
    def entries(self) -> list[str]:
        """Relative path with forward slashes of each image file, in order; hidden ones left out."""

    @abstractmethod
    def read(self, entry: str) -> bytes:
        """The content of one entry. May be called from several threads at once."""


def open_source(path: Path) -> Source:
    """Open a folder or a zip file.

    Raises:
        DataError: The path does not exist, or is a file that is no zip.
    """
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise DataError(f"Expected a folder or a zip file at {path}; nothing is there.")
    if not zipfile.is_zipfile(path):
        raise DataError(f"Expected a folder or a zip file; {path} is neither. Put the images into a folder.")
    return _Zip(path)


def _is_image(entry: str) -> bool:
    parts = PurePosixPath(entry).parts
    hidden = any(part.startswith((".", "__MACOSX")) and part != ".." for part in parts)
    return not hidden and PurePosixPath(entry).suffix.lower() in IMAGE_SUFFIXES


class _Folder(Source):
    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._root = path

    def entries(self) -> list[str]:
        files = (path.relative_to(self._root).as_posix() for path in self._root.rglob("*") if path.is_file())
        return sorted(filter(_is_image, files))

    def read(self, entry: str) -> bytes:
        try:
            return (self._root / entry).read_bytes()
        except OSError as error:
            raise DataError(f"Cannot read {self._root / entry}: {error.strerror}.") from error


class _Zip(Source):
    """A zip is never unpacked: entries are read into memory. What would lead out of it when unpacked is not read."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._archive = zipfile.ZipFile(path)
        self._lock = threading.Lock()

    def entries(self) -> list[str]:
        return sorted(
            info.filename for info in self._archive.infolist() if _is_image(info.filename) and not info.is_dir()
        )

    def read(self, entry: str) -> bytes:
        try:
            with self._lock:
                info = self._archive.getinfo(entry)
                self._check(info)
                return self._archive.read(info)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            raise DataError(f"Cannot read {entry} in {self.title}: {error}. Download the zip again.") from error

    def _check(self, info: zipfile.ZipInfo) -> None:
        entry, path = info.filename, PurePosixPath(info.filename)
        if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"Expected image files in {self.title}; {entry} is a link or leads out of it.")
        if info.file_size > _MAX_ENTRY_BYTES:
            raise DataError(f"Expected entries of at most 4 GiB in {self.title}; {entry} is larger.")
        if info.file_size > max(_BOMB_BYTES, _BOMB_RATIO * info.compress_size):
            raise DataError(
                f"Expected images in {self.title}; {entry} unpacks to {info.file_size >> 20} MiB from "
                f"{info.compress_size} bytes, which no image does. Remove it from the zip."
            )
