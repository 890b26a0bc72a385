"""Import sources: a folder or zip of image files, and the layouts in which images and masks are recognised."""

import stat
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from nucleus.data.images import IMAGE_SUFFIXES
from nucleus.errors import DataError

__all__ = ["Annotated", "Layout", "MaskForm", "Source", "find_images", "open_source"]

_MAX_ENTRY_BYTES = 4 << 30
_BOMB_BYTES = 64 << 20
_BOMB_RATIO = 200
"""An entry of more than `_BOMB_BYTES` that unpacks to more than this multiple of its size is a zip bomb."""
_MASK_ENDINGS = ("_mask", "_masks", "_label", "_labels")


class Source(ABC):
    """Image files in a folder or zip.

    Attributes:
        title: Name of the source in messages.
    """

    def __init__(self, title: str) -> None:
        self.title = title

    @abstractmethod
    def entries(self) -> list[str]:
        """Return the relative paths of the image files, with forward slashes, sorted and without hidden files."""

    @abstractmethod
    def read(self, entry: str) -> bytes:
        """Return the content of an entry. May be called from several threads at once."""


def open_source(path: Path) -> Source:
    """Open a folder or a zip file.

    Raises:
        DataError: The path does not exist, or is a file other than a zip.
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
    """A zip file. It is never unpacked to disk; links and entries with paths outside the zip are refused."""

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
            raise DataError(f"Expected image files in {self.title}; {entry} is a link or a path outside the zip.")
        if info.file_size > _MAX_ENTRY_BYTES:
            raise DataError(f"Expected entries of at most 4 GiB in {self.title}; {entry} is larger.")
        if info.file_size > max(_BOMB_BYTES, _BOMB_RATIO * info.compress_size):
            raise DataError(
                f"Expected images in {self.title}; {entry} unpacks to {info.file_size >> 20} MiB from "
                f"{info.compress_size} bytes, which no image does. Remove it from the zip."
            )


class MaskForm(StrEnum):
    """Content of the mask files of an image."""

    PER_NUCLEUS = "per_nucleus"
    """One binary mask per nucleus."""
    BINARY = "binary"
    """One binary mask for all nuclei."""
    LABELS = "labels"
    """One integer label image."""


@dataclass(frozen=True)
class Annotated:
    """An image with the entries of its masks.

    Attributes:
        title: Name of the image in messages.
        image: Entry of the image.
        masks: Entries of the masks, in order; empty if there are none.
        form: Content of the masks.
        given_split: `train` or `test`, if the source has such folders.
        problem: Why the image cannot be used, if the names of the entries show it.
    """

    title: str
    image: str
    masks: tuple[str, ...]
    form: MaskForm
    given_split: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Layout:
    """A recognised layout.

    Attributes:
        name: Name of the layout, a key of `_LAYOUTS`.
        images: Images of the source, with their masks.
    """

    name: str
    images: list[Annotated]


def find_images(source: Source) -> Layout:
    """List the images of a source with their masks.

    Raises:
        DataError: There are no image files, or they follow none of the layouts.
    """
    entries = source.entries()
    if not entries:
        raise DataError(f"Expected image files (PNG, TIFF, JPEG, BMP, WebP) in {source.title}; found none.")
    for name, recognise in _LAYOUTS.items():
        images = recognise(entries)
        if images:
            return Layout(name, images)
    raise DataError(
        f"Expected one of these layouts in {source.title}: <id>/images/*.png + <id>/masks/*.png (Kaggle); "
        "inputs/ + masks/, also under train/ and test/ (binary masks); images/ + labels/ (integer labels). "
        f"Found {len(entries)} image files in none of them, such as {entries[0]!r}."
    )


def _by_folder(entries: list[str]) -> dict[PurePosixPath, list[str]]:
    folders: dict[PurePosixPath, list[str]] = defaultdict(list)
    for entry in entries:
        folders[PurePosixPath(entry).parent].append(entry)
    return folders


def _kaggle(entries: list[str]) -> list[Annotated]:
    """`<id>/images/<id>.png` with `<id>/masks/*.png`, at any depth."""
    folders = _by_folder(entries)
    # Parents of at least one complete `<id>`: other folders called `images` below them belong to the layout too.
    parents = {
        folder.parent.parent
        for folder, images in folders.items()
        if folder.name == "images" and folder.parent.name and len(images) == 1 and folder.parent / "masks" in folders
    }
    found = [
        Annotated(
            folder.parent.name,
            images[0],
            tuple(folders.get(folder.parent / "masks", ())),
            MaskForm.PER_NUCLEUS,
            problem=None if len(images) == 1 else f"Expected one image in {folder}; found {len(images)}.",
        )
        for folder, images in folders.items()
        if folder.name == "images" and folder.parent.name and (len(images) == 1 or folder.parent.parent in parents)
    ]
    return found if any(image.masks for image in found) else []


def _paired(entries: list[str]) -> list[Annotated]:
    """`inputs/*` or `images/*` with `masks/*` of the same stem, at the top or under `train/` and `test/`."""
    found = []
    for images_name in ("inputs", "images"):
        found += _pairs(entries, images_name, "masks", MaskForm.BINARY)
    return found


def _labelled(entries: list[str]) -> list[Annotated]:
    """`images/*` with `labels/*` of the same stem, at the top or under `train/` and `test/`."""
    return _pairs(entries, "images", "labels", MaskForm.LABELS)


def _pairs(entries: list[str], images_name: str, masks_name: str, form: MaskForm) -> list[Annotated]:
    folders = _by_folder(entries)
    found = []
    for folder, images in folders.items():
        if folder.name != images_name or folder.parent / masks_name not in folders:
            continue
        masks = {_stem(entry): entry for entry in folders[folder.parent / masks_name]}
        masks |= {PurePosixPath(entry).stem: entry for entry in folders[folder.parent / masks_name]}
        split = folder.parent.name if folder.parent.name in {"train", "test"} else None
        for entry in images:
            stem = PurePosixPath(entry).stem
            mask = masks.get(stem)
            found.append(Annotated(stem, entry, (mask,) if mask else (), form, split))
    return found


def _stem(entry: str) -> str:
    """Return the file name without its suffix and without the `_mask` or `_label` that some tools add."""
    stem = PurePosixPath(entry).stem
    for ending in _MASK_ENDINGS:
        if stem.endswith(ending):
            return stem.removesuffix(ending)
    return stem


_LAYOUTS: dict[str, Callable[[list[str]], list[Annotated]]] = {
    "kaggle": _kaggle,
    "paired": _paired,
    "labelled": _labelled,
}
