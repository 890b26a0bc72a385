"""The layouts in which images and their masks are recognised, by the names of folders and files."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from pathlib import PurePosixPath

from nucleus.data.sources import Source
from nucleus.errors import DataError
from nucleus.text import plural

__all__ = ["Annotated", "Layout", "MaskForm", "find_images"]

_IMAGES, _INPUTS, _MASKS, _LABELS = "images", "inputs", "masks", "labels"
_ROLES = {
    **dict.fromkeys(("images", "image", "imgs", "img"), _IMAGES),
    **dict.fromkeys(("inputs", "input"), _INPUTS),
    **dict.fromkeys(("masks", "mask"), _MASKS),
    **dict.fromkeys(("labels", "label"), _LABELS),
}
"""What a folder holds, by its name in lower case."""
_SPLITS = {"train", "test"}
_NO_IDS = _SPLITS | {"val", "valid", "validation"}
_MASK_WORDS = re.compile(r"^(masks?|labels?)[-_ .]+|[-_ .]+(cp_)?(masks?|labels?)$", re.IGNORECASE)
_IMAGE_WORDS = re.compile(r"^(images?|imgs?|im)[-_ .]+|[-_ .]+(images?|imgs?)$", re.IGNORECASE)


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
        left_out: Reason for each path of the source that could not be read or belongs to no image.
    """

    name: str
    images: list[Annotated]
    left_out: dict[str, str] = field(default_factory=dict)


def find_images(source: Source) -> Layout:
    """List the images of a source with their masks.

    Raises:
        DataError: There are no image files, or they follow none of the layouts.
    """
    entries = source.entries()
    if not entries:
        raise DataError(
            f"Expected image files (PNG, TIFF, JPEG, BMP, WebP) in {source.title}; found none{_found_instead(source)}"
        )
    for name, recognise in _LAYOUTS.items():
        images = recognise(entries)
        if images:
            return Layout(name, images, source.left_out() | _not_used(entries, images))
    raise DataError(
        f"Expected one of these layouts in {source.title}: <id>/images/*.png + <id>/masks/*.png (Kaggle); "
        "inputs/ or images/ + masks/ (binary masks), or images/ + labels/ (integer labels), also under train/ and "
        "test/; a.png + a_masks.png (Cellpose). "
        f"Found {len(entries)} image files in none of them, such as {entries[0]!r}. {_nearest(entries)}"
    )


def _found_instead(source: Source) -> str:
    """Return the end of a sentence that says that a source has no images: what it has instead."""
    archives, unread = source.archives(), source.left_out()
    if archives:
        return (
            f", but {plural(len(archives), 'archive')} within it, such as {archives[0]!r}. Unpack this archive, and "
            "import the folder or the zip that has the images."
        )
    reasons = [f"{path}: {reason}" for path, reason in list(unread.items())[:3]]
    return ". " + " ".join(reasons) if reasons else "."


def _not_used(entries: list[str], images: list[Annotated]) -> dict[str, str]:
    """Return a reason for each folder with image files that are neither an image of the layout nor its mask."""
    used = {entry for image in images for entry in (image.image, *image.masks)}
    named = {PurePosixPath(image.image).parent for image in images if image.problem}
    reasons = {}
    for folder, files in _by_folder(entry for entry in entries if entry not in used).items():
        if folder not in named:
            reasons[str(folder)] = (
                f"Expected images with their masks; {plural(len(files), 'file')} of this folder belong to none, such "
                f"as {files[0]!r}."
            )
    return reasons


def _nearest(entries: list[str]) -> str:
    """Return what to change so that a source follows the layout that it resembles most."""
    sets = _sets(entries)
    folders = _by_folder(entries)
    for parent, parts in sets.items():
        beside = sorted(f.name for f in folders if f.parent == parent and f.name.lower() not in _ROLES)
        rename = f", or rename {beside[0]!r} if it holds them" if beside else ""
        here = f"{' and '.join(sorted(parts))}/" + ("" if parent == PurePosixPath() else f" in {str(parent)!r}")
        if not {_IMAGES, _INPUTS} & set(parts):
            return f"Nearest: {here}. Put the images into images/ beside it{rename}."
        if not {_MASKS, _LABELS} & set(parts):
            return f"Nearest: {here}. Put the masks into labels/ or masks/ beside it{rename}."
        return "Nearest: images with masks beside them, but no two have the same name. Name each mask as its image."
    for name in sorted({part for folder in folders for part in folder.parts}):
        if close := get_close_matches(name.lower(), _ROLES, 1, 0.75):
            return f"Nearest: {name!r}, which resembles {close[0]!r}. Rename it."
    return "Put the images into images/, and their label images into labels/ under the same names."


def _by_folder(entries: Iterable[str]) -> dict[PurePosixPath, list[str]]:
    folders: dict[PurePosixPath, list[str]] = defaultdict(list)
    for entry in entries:
        folders[PurePosixPath(entry).parent].append(entry)
    return folders


def _sets(entries: list[str]) -> dict[PurePosixPath, dict[str, list[str]]]:
    """Return the entries of folders with known names, by the folder that they lie in and by what they hold."""
    sets: dict[PurePosixPath, dict[str, list[str]]] = {}
    for folder, found in _by_folder(entries).items():
        role = _ROLES.get(folder.name.lower())
        if role is not None:
            sets.setdefault(folder.parent, {}).setdefault(role, []).extend(found)
    return sets


def _kaggle(entries: list[str]) -> list[Annotated]:
    """`<id>/images/<id>.png` with `<id>/masks/*.png`, at any depth."""
    sets = {
        parent: parts
        for parent, parts in _sets(entries).items()
        if parent.name and parent.name.lower() not in _NO_IDS and _IMAGES in parts
    }
    # Folders above at least one complete `<id>`: other folders called `images` below them belong to the layout too.
    above = {parent.parent for parent, parts in sets.items() if len(parts[_IMAGES]) == 1 and _MASKS in parts}
    found = [
        Annotated(
            parent.name,
            parts[_IMAGES][0],
            tuple(parts.get(_MASKS, ())),
            MaskForm.PER_NUCLEUS,
            problem=_not_one(parent, parts[_IMAGES]),
        )
        for parent, parts in sets.items()
        if len(parts[_IMAGES]) == 1 or parent.parent in above
    ]
    return found if any(image.masks for image in found) else []


def _not_one(parent: PurePosixPath, images: list[str]) -> str | None:
    if len(images) == 1:
        return None
    return f"Expected one image in {PurePosixPath(images[0]).parent} of {parent.name}; found {len(images)}."


def _paired(entries: list[str]) -> list[Annotated]:
    """`inputs/*` or `images/*` with `masks/*` of the same stem, at the top or under `train/` and `test/`."""
    return _pairs(entries, (_IMAGES, _INPUTS), _MASKS, MaskForm.BINARY)


def _labelled(entries: list[str]) -> list[Annotated]:
    """`images/*` with `labels/*` of the same stem, at the top or under `train/` and `test/`."""
    return _pairs(entries, (_IMAGES, _INPUTS), _LABELS, MaskForm.LABELS)


def _pairs(entries: list[str], images_roles: tuple[str, ...], masks_role: str, form: MaskForm) -> list[Annotated]:
    found = []
    for parent, parts in _sets(entries).items():
        images = sorted(entry for role in images_roles for entry in parts.get(role, ()))
        if images and masks_role in parts:
            split = parent.name.lower() if parent.name.lower() in _SPLITS else None
            found += _matched(images, parts[masks_role], form, split)
    return found


def _beside(entries: list[str]) -> list[Annotated]:
    """`<name>.*` with `<name>_masks.*` (labels) or `<name>_mask.*` (binary) in the same folder (Cellpose)."""
    found = []
    for files in _by_folder(entries).values():
        masks = {entry for entry in files if _bare(entry, _MASK_WORDS) != _stem(entry)}
        pairs = _matched([entry for entry in files if entry not in masks], sorted(masks), MaskForm.LABELS)
        if any(pair.masks for pair in pairs):
            found += [replace(pair, form=_form_of(pair.masks)) for pair in pairs]
    return found


def _form_of(masks: Iterable[str]) -> MaskForm:
    """Return what masks beside their images hold by the habits of the tools: `_mask` is binary, `_masks` are labels."""
    binary = any(re.search(r"^mask[-_ .]|[-_ .]mask$", _stem(mask), re.IGNORECASE) for mask in masks)
    return MaskForm.BINARY if binary else MaskForm.LABELS


def _matched(images: list[str], masks: list[str], form: MaskForm, split: str | None = None) -> list[Annotated]:
    """Return the images with the masks of the same name: first equal names, then without the words that tools add."""
    found: dict[str, list[str]] = {}
    for image_words, mask_words in ((None, None), (None, _MASK_WORDS), (_IMAGE_WORDS, _MASK_WORDS)):
        used = {mask for chosen in found.values() for mask in chosen}
        of_name: dict[str, list[str]] = defaultdict(list)
        for mask in masks:
            if mask not in used:
                of_name[_bare(mask, mask_words)].append(mask)
        names: dict[str, set[str]] = defaultdict(set)
        for image in images:
            names[_bare(image, image_words)].add(_stem(image))
        for image in images:
            name = _bare(image, image_words)
            if image not in found and name in of_name and len(names[name]) == 1:  # else it is unclear whose masks it is
                found[image] = of_name[name]
    return [_with_masks(image, found.get(image, []), form, split) for image in images]


def _with_masks(image: str, masks: list[str], form: MaskForm, split: str | None) -> Annotated:
    several = f"Expected one mask for {image}; found {' and '.join(masks[:2])}." if len(masks) > 1 else None
    return Annotated(PurePosixPath(image).stem, image, tuple(masks), form, split, several)


def _bare(entry: str, words: re.Pattern[str] | None) -> str:
    """Return the name of a file without suffix and without such words; they stay where nothing else would."""
    stem = _stem(entry)
    return (words and words.sub("", stem)) or stem


def _stem(entry: str) -> str:
    """Return the name of a file without suffix, in the composed form of Unicode: macOS writes the other one."""
    return unicodedata.normalize("NFC", PurePosixPath(entry).stem)


_LAYOUTS: dict[str, Callable[[list[str]], list[Annotated]]] = {
    "kaggle": _kaggle,
    "paired": _paired,
    "labelled": _labelled,
    "beside": _beside,
}
