"""Recognise how images and masks lie in a source: the three layouts that `nucleus data import` reads.

To add a layout, write a function that takes the entries and returns the `Annotated` images it recognises (none if
the layout is another one), and put it into `_LAYOUTS`.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

from nucleus.data.sources import Source
from nucleus.errors import DataError

__all__ = ["Annotated", "Layout", "MaskForm", "find_images"]

_MASK_ENDINGS = ("_mask", "_masks", "_label", "_labels")


class MaskForm(StrEnum):
    """What the mask files of an image hold."""

    PER_NUCLEUS = "per_nucleus"
    """One binary mask for each nucleus."""
    BINARY = "binary"
    """One binary mask for all nuclei."""
    LABELS = "labels"
    """One integer label image."""


@dataclass(frozen=True)
class Annotated:
    """One image with the entries that annotate it.

    Attributes:
        title: How the user knows the image.
        image: Entry of the image.
        masks: Entries of its masks, in order; empty if there are none.
        form: What the masks hold.
        given_split: `train` or `test` if the source's folders say so.
        problem: Why it cannot be used, if that is known from the names alone.
    """

    title: str
    image: str
    masks: tuple[str, ...]
    form: MaskForm
    given_split: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Layout:
    """The layout that was recognised, and its images."""

    name: str
    images: list[Annotated]


def find_images(source: Source) -> Layout:
    """List the images of a source with their masks.

    Raises:
        DataError: No image files, or none of the layouts.
    """
    entries = source.entries()
    if not entries:
        raise DataError(f"Expected image files (PNG, TIFF, JPEG) in {source.title}; found none.")
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
    # Folders that hold at least one whole `<id>`: what else is called `images` below them is meant so too.
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
    """`inputs/*` with `masks/*` of the same stem, plain or under `train/` and `test/`."""
    found = []
    for images_name in ("inputs", "images"):
        found += _pairs(entries, images_name, "masks", MaskForm.BINARY)
    return found


def _labelled(entries: list[str]) -> list[Annotated]:
    """`images/*` with `labels/*` of the same stem, plain or under `train/` and `test/`."""
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
    """The file name without suffix, and without the `_mask` or `_label` that some tools add."""
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
