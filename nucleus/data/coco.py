"""COCO instances: the objects of each image of a JSON file, as shapes in pixels of the image."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.data.annotations import read_json
from nucleus.data.masks import Remarks
from nucleus.data.shapes import Polygons, Runs, Shape
from nucleus.errors import DataError, ImageError

__all__ = ["CocoImage", "coco_shapes", "read_coco"]

_NUCLEUS = re.compile("nucle", re.IGNORECASE)
_BITS, _MORE, _SIGN, _FIRST, _LAST = 5, 0x20, 0x10, 48, 111
"""COCO's compressed counts: characters from 48 on with 5 bits each, one that says that more follow, and a sign."""
_LONGEST = 7
"""Characters of one count."""
_LEAST_NUMBERS = 6
_WHOLE_CROWDS = "Objects of COCO with iscrowd 1 in one part, as CVAT marks masks, count as a nucleus each"


@dataclass(frozen=True)
class CocoImage:
    """The record of an image, with its objects.

    Attributes:
        file_name: Its `file_name`, with forward slashes.
        size: Height and width, px; None where the record does not state them.
        objects: Its annotations.
        document: Name of the JSON file.
        passed: Names of objects of categories that are no nuclei, which were left out.
    """

    file_name: str
    size: tuple[int, int] | None
    objects: list[dict[str, Any]]
    document: str
    passed: list[str] = field(default_factory=list)


def read_coco(data: bytes, name: str) -> list[CocoImage] | None:
    """Read a COCO file; return None if it is another JSON document.

    If some categories are called nuclei and others are not, only objects of the former are kept.

    Raises:
        DataError: The file is damaged, or contradicts itself: an image twice, an object without image.
    """
    if b'"annotations"' not in data:
        return None
    try:
        document = read_json(data, name)
    except ImageError as error:
        raise DataError(str(error)) from error
    if not isinstance(document, dict) or not {"images", "annotations"} <= set(document):
        return None
    images, objects = (_records(document, key, name) for key in ("images", "annotations"))
    found = _images(images, name)
    wanted = _wanted_categories(document, name)
    for item in objects:
        image = found.get(_key(item.get("image_id")))
        if image is None:
            raise DataError(
                f"Expected an image for each object of {name}; object {item.get('id')} has image_id "
                f"{item.get('image_id')!r}, which no image has. Export the file again."
            )
        if wanted is None or _key(item.get("category_id")) in wanted:
            image.objects.append(item)
        else:
            image.passed.append(_title(item, name))
    return list(found.values())


def _records(document: dict[str, Any], key: str, name: str) -> list[dict[str, Any]]:
    records = document[key]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"Expected a list of records as {key!r} in {name}; found something else. Export it again.")
    return records


def _images(records: Sequence[dict[str, Any]], name: str) -> dict[str, CocoImage]:
    found: dict[str, CocoImage] = {}
    names = set()
    for record in records:
        file_name, key = record.get("file_name"), _key(record.get("id"))
        if not isinstance(file_name, str) or not file_name:
            raise DataError(f"Expected a file_name for each image of {name}; image {key} has none. Export it again.")
        if key in found or file_name in names:
            raise DataError(
                f"Expected each image once in {name}; found two of id {key}, or of file_name {file_name!r}. Correct "
                "the file, or export it again."
            )
        names.add(file_name)
        size = (record.get("height"), record.get("width"))
        whole = all(isinstance(side, int | float) and side > 0 and side % 1 == 0 for side in size)  # 512.0 too
        found[key] = CocoImage(file_name.replace("\\", "/"), size if whole else None, [], name)  # type: ignore[arg-type]
    return found


def _key(number: Any) -> str:
    """Return an id as text: the same number is the same id, also if it is stored as text."""
    return str(number)


def _wanted_categories(document: dict[str, Any], name: str) -> set[str] | None:
    """Return the ids of categories called nuclei, or None if all or none are called so."""
    categories = _records({"categories": document.get("categories") or []}, "categories", name)
    nuclei = {_key(item.get("id")) for item in categories if _NUCLEUS.search(str(item.get("name")))}
    return nuclei if 0 < len(nuclei) < len(categories) else None


def _title(item: dict[str, Any], name: str) -> str:
    return f"object {item.get('id')} of {name}"


def coco_shapes(image: CocoImage, shape: tuple[int, int]) -> tuple[list[Shape], Remarks]:
    """Return the shapes of the objects of an image.

    Args:
        image: The record.
        shape: Height and width of the image, px.

    Raises:
        ImageError: The record states another size, or none; an object has no outline, is damaged, or is a crowd of
            several parts.
    """
    _check_size(image, shape)
    shapes: list[Shape] = []
    remarks: dict[str, list[str]] = defaultdict(list)
    for item in image.objects:
        title = f"{_title(item, image.document)} ({image.file_name})"
        shapes.append(_shape_of(item, title, shape))
        if item.get("iscrowd"):
            _check_crowd(shapes[-1], title, shape)
            remarks[_WHOLE_CROWDS].append(title)
    if not image.objects:
        remarks["Images without objects in COCO count as images without nuclei"].append(image.file_name)
    if image.passed:
        remarks["Objects of COCO of categories that are not called nuclei, passed over"] += image.passed
    return shapes, tuple((text, tuple(names)) for text, names in remarks.items())


def _check_size(image: CocoImage, shape: tuple[int, int]) -> None:
    height, width = shape
    if image.size == shape:
        return
    stated = "no height and width" if image.size is None else f"{image.size[1]} x {image.size[0]} px"
    raise ImageError(
        f"Expected {width} x {height} px (width x height) in the record of {image.file_name} in {image.document}, as "
        f"its image has; found {stated}. Export the annotations from this image."
    )


def _shape_of(item: dict[str, Any], title: str, shape: tuple[int, int]) -> Shape:
    outline = item.get("segmentation")
    if isinstance(outline, dict):
        return _runs(outline, title, shape)
    if not isinstance(outline, list) or not outline:
        raise ImageError(
            f"Expected an outline (segmentation) of each object; {title} has none, only a box perhaps. Export instance "
            "masks or polygons."
        )
    return Polygons(title, tuple((_polygon(numbers, title),) for numbers in outline))


def _polygon(numbers: Any, title: str) -> NDArray[np.float64]:
    try:
        points = np.array(numbers, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ImageError(f"Expected lists of numbers as polygons; {title} has others. Export it again.") from error
    if points.ndim != 1 or len(points) < _LEAST_NUMBERS or len(points) % 2:
        raise ImageError(
            f"Expected polygons [x1, y1, x2, y2, ...] of at least 3 points; {title} has one of {points.size} numbers. "
            "Remove it, or draw it again."
        )
    return points.reshape(-1, 2)


def _runs(outline: dict[str, Any], title: str, shape: tuple[int, int]) -> Runs:
    if outline.get("size") != list(shape):
        raise ImageError(
            f"Expected a mask of {shape[0]} x {shape[1]} (height x width), as its image is; {title} has "
            f"{str(outline.get('size'))[:40]}. Export the annotations from this image."
        )
    counts = outline.get("counts")
    try:
        lengths = _unpacked(counts) if isinstance(counts, str) else np.array(counts, np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ImageError(f"Expected run lengths (counts); those of {title} are damaged. Export it again.") from error
    size = shape[0] * shape[1]
    if lengths.ndim != 1 or (lengths < 0).any() or (lengths > size).any() or lengths.sum() != size:
        raise ImageError(
            f"Expected run lengths of {size} pixels in all, those of the image; those of {title} have others. Export "
            "it again."
        )
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    starts, ends = bounds[1:-1:2], bounds[2::2]
    return Runs(title, starts[starts < ends], ends[starts < ends], shape[0])


def _unpacked(text: str) -> NDArray[np.int64]:
    """Decode COCO's compressed counts. From the third on, they are differences to the count before the last."""
    counts: list[int] = []
    value = place = 0
    for character in text:
        bits = ord(character) - _FIRST
        if not _FIRST <= ord(character) <= _LAST or place >= _LONGEST:
            raise ValueError(f"not a count: {character!r}")
        value |= (bits & (_MORE - 1)) << (_BITS * place)
        place += 1
        if not bits & _MORE:
            if bits & _SIGN:
                value -= 1 << (_BITS * place)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = place = 0
    if place:
        raise ValueError("the last count breaks off")
    return np.array(counts, np.int64)


def _check_crowd(shape: Shape, title: str, size: tuple[int, int]) -> None:
    """Raise `ImageError` if a crowd has several parts: nobody knows how many nuclei it has."""
    if isinstance(shape, Runs):
        mask = np.zeros(size, np.uint8)
        mask[shape.pixels()] = 1
        parts = cv2.connectedComponents(mask, connectivity=8)[0] - 1
    else:
        parts = len(shape.parts) if isinstance(shape, Polygons) else 1
    if parts > 1:
        raise ImageError(
            f"Expected single nuclei; {title} is a crowd (iscrowd 1) of {parts} parts. Outline its nuclei one by one."
        )
