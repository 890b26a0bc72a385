"""The layouts in which images and their masks are recognised, by the names of folders and files."""

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import PurePosixPath

from nucleus.data.coco import CocoImage, read_coco
from nucleus.data.masks import MaskForm
from nucleus.data.sources import Source
from nucleus.errors import DataError
from nucleus.text import plural

__all__ = ["Annotated", "Layout", "find_images"]

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
_OUTLINES = re.compile(r"\.geojson(\.gz)?$|(\.rois)?\.zip$|\.roi$", re.IGNORECASE)
_ROI_WORDS = re.compile(r"^roi[-_ ]?set$|^(roi[-_ ]?set|rois?)[-_ .]+|[-_ .]+(roi[-_ ]?set|rois?)$", re.IGNORECASE)
_OUTLINE_FOLDERS = {
    *("annotations", "annotation", "outlines", "outline", "geojson", "qupath", "detections", "rois", "roi", "roisets"),
    *("labels", "label", "masks", "mask"),
}
"""Folders beside that of the images in which files of outlines may lie, in lower case."""
_COCO_NAMES = re.compile("annot|coco|instances", re.IGNORECASE)
_COCO = "coco"
"""Name of the layout in which one file is of many images."""
_MOST_JSON = 50
"""With more JSON files than this, only those with one of the usual names of COCO files are read."""
_IMAGE_WORDS = re.compile(r"^(images?|imgs?|im)[-_ .]+|[-_ .]+(images?|imgs?)$", re.IGNORECASE)


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
        record: The image's record in its COCO file.
    """

    title: str
    image: str
    masks: tuple[str, ...]
    form: MaskForm
    given_split: str | None = None
    problem: str | None = None
    record: CocoImage | None = None


@dataclass(frozen=True)
class Layout:
    """A recognised layout.

    Attributes:
        name: Name of the layout: a key of `_LAYOUTS`, `outlines` or `coco`.
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
    files = source.annotations()
    for name, recognise in _LAYOUTS.items():
        images = recognise(entries)
        if images:
            return _layout(source, name, _with_rivals(images, files), entries, files)
    if images := _outlined(entries, files):
        return _layout(source, "outlines", images, entries, files)
    images, missing = _listed(source, entries, files)
    if images:
        found = _layout(source, _COCO, images, entries, files)
        return replace(found, left_out=found.left_out | missing)
    raise DataError(
        f"Expected one of these layouts in {source.title}: <id>/images/*.png + <id>/masks/*.png (Kaggle); "
        "inputs/ or images/ + masks/ (binary masks), or images/ + labels/ (integer labels), also under train/ and "
        "test/; a.png + a_masks.png (Cellpose); a.png + a.geojson or a.geojson.gz (QuPath); a.png + a.zip, "
        "a_RoiSet.zip or a.roi (ImageJ); images + a COCO file (.json) beside or above them. "
        f"Found {len(entries)} image files in none of them, such as {entries[0]!r}. {_nearest(entries)}"
    )


def _layout(source: Source, name: str, images: list[Annotated], entries: list[str], files: list[str]) -> Layout:
    if name != _COCO:
        images = _with_masks_of_their_own(images)
    used = {mask for image in images for mask in image.masks}
    left_out = {path: reason for path, reason in source.left_out().items() if path not in used}
    strays = {file: _NO_IMAGE for file in files if file not in used and _is_stray(file)}
    return Layout(name, images, left_out | _not_used(entries, images) | strays)


def _with_masks_of_their_own(images: list[Annotated]) -> list[Annotated]:
    """Return images with a problem where two, such as `a.png` and `a.tif`, have the same mask: one of them is wrong."""
    owners: dict[str, list[str]] = defaultdict(list)
    for image in images:
        for mask in image.masks:
            owners[mask].append(image.image)

    def problem(image: Annotated) -> str | None:
        shared = next((mask for mask in image.masks if len(owners[mask]) > 1), None)
        found = shared and f"Expected one image for {shared}; found {' and '.join(owners[shared][:2])}. Rename one."
        return image.problem or found

    return [replace(image, problem=problem(image)) for image in images]


_NO_IMAGE = "Expected the outlines of an image of this layout; found no image that this file belongs to."


def _is_stray(file: str) -> bool:
    """Return whether a file that was not used holds outlines, as its name shows."""
    name = PurePosixPath(file).name
    if name.lower().endswith((".zip", ".json")):
        return bool((_ROI_WORDS if name.lower().endswith(".zip") else _COCO_NAMES).search(name.rpartition(".")[0]))
    return True


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


def _outlined(entries: list[str], files: list[str]) -> list[Annotated]:
    """`<name>.*` with `<name>.geojson`, `<name>.geojson.gz`, `<name>_RoiSet.zip` or `<name>.roi`.

    The outlines lie in the folder of the image, or in one beside it, such as `annotations/`.
    """
    found = []
    for images in _by_folder(entries).values():
        outlines = _outlines_of(images, files)
        if any(outlines.values()):
            found += [_with_outlines(image, outlines[image]) for image in images]
    return found


def _outlines_of(images: Iterable[str], files: list[str]) -> dict[str, list[str]]:
    """Return the files of outlines of each image of a folder, by the names of both."""
    named: dict[tuple[PurePosixPath, str], list[str]] = defaultdict(list)
    folders = {PurePosixPath(file).parent for file in files}
    for file in files:
        if (name := _outlined_name(file)) is not None:
            named[PurePosixPath(file).parent, name].append(file)
    found = {}
    images = list(images)
    for image in images:
        path = PurePosixPath(image)
        beside = [f for f in folders if f.parent == path.parent.parent and f.name.lower() in _OUTLINE_FOLDERS]
        names = {_stem(image), unicodedata.normalize("NFC", path.name), *([""] if len(images) == 1 else [])}
        places = {path.parent, *beside}
        found[image] = sorted(file for place in places for name in names for file in named.get((place, name), []))
    return found


def _outlined_name(file: str) -> str | None:
    """Return the name of the image of a file of outlines, empty for a bare `RoiSet.zip`; None for another file."""
    name = unicodedata.normalize("NFC", PurePosixPath(file).name)
    ending = _OUTLINES.search(name)
    if ending is None:
        return None
    stem = name[: ending.start()]
    return stem if _form_of_outlines(file) is MaskForm.GEOJSON else _ROI_WORDS.sub("", stem)


def _form_of_outlines(file: str) -> MaskForm:
    return MaskForm.GEOJSON if file.lower().endswith((".geojson", ".gz")) else MaskForm.ROIS


def _with_outlines(image: str, files: list[str]) -> Annotated:
    form = _form_of_outlines(files[0]) if files else MaskForm.GEOJSON
    return replace(_with_masks(image, files, form, _split_of(image)), problem=_rivals(image, files))


def _rivals(image: str, files: Iterable[str]) -> str | None:
    both = list(files)[:2]
    fix = "Keep one of them beside the image."
    return f"Expected one annotation for {image}; found {' and '.join(both)}. {fix}" if len(both) > 1 else None


def _split_of(image: str) -> str | None:
    """Return the split of an image by the folder that it or its folder lies in."""
    folder = PurePosixPath(image).parent
    return next((name.lower() for name in (folder.name, folder.parent.name) if name.lower() in _SPLITS), None)


def _with_rivals(images: list[Annotated], files: list[str]) -> list[Annotated]:
    """Return images with masks, with a problem where they have a file of outlines too."""
    if not files:
        return images
    folders = _by_folder(image.image for image in images)
    outlines = {image: found for members in folders.values() for image, found in _outlines_of(members, files).items()}
    return [
        replace(image, problem=_rivals(image.image, [image.masks[0], *outlines[image.image]]))
        if image.masks and not image.problem
        else image
        for image in images
    ]


def _listed(source: Source, entries: list[str], files: list[str]) -> tuple[list[Annotated], dict[str, str]]:
    """Return the images that COCO files name, and a reason for each that is not there.

    A `file_name` is looked up beside the COCO file, in the folder above and at the top, then by its last part alone.
    Only files of the source are found, whatever the name says.
    """
    documents = [file for file in files if file.lower().endswith(".json")]
    if len(documents) > _MOST_JSON:
        documents = [file for file in documents if _COCO_NAMES.search(PurePosixPath(file).name)]
    known = {unicodedata.normalize("NFC", entry): entry for entry in entries}
    found: dict[str, Annotated] = {}
    missing = {}
    for document in documents:
        for record in read_coco(source.read(document), document) or []:
            matches = _named_by(record, document, known)
            if not matches:
                missing[record.file_name] = f"Expected this image, which {document} names; it is not in {source.title}."
            for match in matches[:1]:
                found[match] = _with_record(match, record, matches, found.get(match))
    return list(found.values()), missing


def _named_by(record: CocoImage, document: str, known: dict[str, str]) -> list[str]:
    name = unicodedata.normalize("NFC", record.file_name)
    folder = PurePosixPath(document).parent
    for base in (folder, folder.parent, PurePosixPath()):
        path = posixpath.normpath(str(base / name))
        if path in known:
            return [known[path]]
    last = PurePosixPath(name).name
    below = "" if folder.parent == PurePosixPath() else f"{folder.parent}/"
    return [entry for path, entry in known.items() if PurePosixPath(path).name == last and path.startswith(below)]


def _with_record(image: str, record: CocoImage, matches: list[str], other: Annotated | None) -> Annotated:
    problem = None
    if other is not None and other.record is not None:
        problem = (
            f"Expected one record for {image}; found {other.record.file_name} in {other.record.document} and "
            f"{record.file_name} in {record.document}. Remove one of them."
        )
    elif len(matches) > 1:
        problem = (
            f"Expected one image called {record.file_name}, as {record.document} names it; found {matches[0]} and "
            f"{matches[1]}. Write the folder of each image into file_name."
        )
    words = set(re.split(r"[-_ .]", PurePosixPath(record.document).stem.lower())) & _SPLITS
    split = _split_of(image) or (words.pop() if len(words) == 1 else None)
    return Annotated(PurePosixPath(image).stem, image, (record.document,), MaskForm.COCO, split, problem, record)


_LAYOUTS: dict[str, Callable[[list[str]], list[Annotated]]] = {
    "kaggle": _kaggle,
    "paired": _paired,
    "labelled": _labelled,
    "beside": _beside,
}
