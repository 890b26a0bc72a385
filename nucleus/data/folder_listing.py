"""The files below a folder: which are images, outlines, archives or Zarr, and what cannot be read."""

import os
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from nucleus.data.images import IMAGE_SUFFIXES
from nucleus.data.zarr_store import is_zarr
from nucleus.errors import DataError

__all__ = ["Listing", "is_annotation", "is_archive", "is_hidden", "is_image", "list_folder"]

_SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
"""Folders that macOS, Synology, Windows and Linux make; they hold copies, thumbnails and what was deleted."""
_N5 = ".n5"
_NO_ZARR = "Save its images as OME-TIFF."
_MOST_VISITS = 100
"""How often one folder is listed under different names. Links from every folder to every other make endless names."""
_ARCHIVE_SUFFIXES = {".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz"}
_ANNOTATIONS = (".json", ".geojson", ".geojson.gz", ".roi", ".zip")


def is_hidden(path: str) -> bool:
    """Return whether a path with forward slashes is hidden: a part begins with a dot, or is a folder of the system."""
    parts = (part for part in path.split("/") if part not in {"", ".", ".."})
    return any(part.startswith(".") or part.lower() in _SYSTEM_FOLDERS for part in parts)


def is_image(path: str) -> bool:
    """Return whether a path with forward slashes has the suffix of an image and is not hidden."""
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path)


def is_annotation(path: str) -> bool:
    """Return whether a path has the suffix of a file of outlines (COCO, GeoJSON, ROI sets) and is not hidden."""
    return path.lower().endswith(_ANNOTATIONS) and not is_hidden(path)


def is_archive(path: str) -> bool:
    """Return whether a path has the suffix of an archive and is not hidden."""
    return PurePosixPath(path).suffix.lower() in _ARCHIVE_SUFFIXES and not is_hidden(path)


@dataclass(frozen=True)
class Listing:
    """The files below a folder.

    Attributes:
        files: Relative paths of the files, with forward slashes, sorted.
        unread: Reason for each path that could not be read: folders, broken links, and what is neither.
    """

    files: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)


def list_folder(folder: Path, wanted: Callable[[str], bool] = is_image, *, zarr: bool = False) -> Listing:
    """List the files below a folder, at any depth.

    Links are followed, but not in circles; hidden files and folders are passed over. A folder is a folder whatever its
    name ends in, except that folders of Zarr are named and not looked into.

    Args:
        folder: The folder.
        wanted: Which files to list, by their relative paths with forward slashes.
        zarr: Whether wanted folders of Zarr are listed among the files.

    Raises:
        DataError: The folder itself cannot be read, or is one of Zarr.
    """
    if _is_zarr(folder.name):
        raise DataError(f"Expected a folder of image files; {folder} is a Zarr folder, which is not read. {_NO_ZARR}")
    walk = _Walk(folder, wanted, zarr=zarr)
    waiting: deque[_Folder] = deque([("", frozenset())])
    while waiting:  # the shortest names first, of the many that links may give to a folder
        waiting += walk.visit(*waiting.popleft())
    return Listing(sorted(walk.found.files), dict(sorted(walk.found.unread.items())))


_Identity = tuple[int, int]
_Folder = tuple[str, frozenset[_Identity]]
"""A folder to visit: its relative path, and the real folders that it lies in."""


class _Walk:
    def __init__(self, root: Path, wanted: Callable[[str], bool], *, zarr: bool) -> None:
        self.found = Listing()
        self._zarr = zarr
        self._root = root
        self._wanted = wanted
        self._visits: Counter[_Identity] = Counter()

    def visit(self, relative: str, above: frozenset[_Identity]) -> list[_Folder]:
        """Add the files of a folder; return the folders in it."""
        path = self._root / relative
        try:
            status = path.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:  # a circle: these files are listed already
                return []
            self._visits[here] += 1
            if self._visits[here] > _MOST_VISITS:
                self.found.unread[relative] = f"links lead to this folder under more than {_MOST_VISITS} names"
                return []
            with os.scandir(path) as entries:
                listed = list(entries)
        except OSError as error:
            if not relative:
                raise DataError(f"Cannot read {path}: {error.strerror}. Correct its permissions.") from error
            self.found.unread[relative] = f"Cannot read the folder: {error.strerror}."
            return []
        return [(name, above | {here}) for entry in listed if (name := self._folder(entry, relative)) is not None]

    def _folder(self, entry: os.DirEntry[str], relative: str) -> str | None:
        """Return the relative path of an entry that is a folder to visit; add any other to what was found."""
        name = f"{relative}/{entry.name}" if relative else entry.name
        if is_hidden(entry.name):
            return None
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:  # a link to itself, or into a folder without permission
            self._cannot(name, f"Cannot read it: {error.strerror}.")
            return None
        if not is_file and not is_folder:
            self._cannot(name, _neither(entry))
        elif not _is_text(name) and (is_folder or self._wanted(name)):
            shown = name.encode(errors="backslashreplace").decode()
            self.found.unread[shown] = "Expected a file name in UTF-8; found other bytes. Rename it."
        elif is_folder and self._zarr and is_zarr(entry.name):
            self.found.files.extend([name] if self._wanted(name) else [])
        elif is_folder and _is_zarr(entry.name):
            self.found.unread[name] = f"Expected image files; found a Zarr folder, which is not read. {_NO_ZARR}"
        elif is_folder:
            return name
        elif self._wanted(name):
            self.found.files.append(name)
        return None

    def _cannot(self, name: str, reason: str) -> None:
        """Name what cannot be read, if it may be an image or a folder."""
        if self._wanted(name) or not PurePosixPath(name).suffix:
            self.found.unread[name.encode(errors="backslashreplace").decode()] = reason


def _neither(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        target = os.fsencode(Path(entry.path).readlink()).decode(errors="backslashreplace")
        return f"Expected a file or folder; found a link to {target}, which does not exist."
    return "Expected a file or folder; found neither (a device, pipe or socket)."


def _is_zarr(name: str) -> bool:
    return is_zarr(name) or name.lower().endswith(_N5)


def _is_text(name: str) -> bool:
    return name.encode(errors="ignore").decode() == name  # other bytes are kept as what has no code
