"""The forms of an answer, and the choice among them by the header Accept: JSON, GeoJSON, and labels as TIFF or PNG."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

from nucleus.data.images import encode_png
from nucleus.errors import RequestError
from nucleus.predict.formats import ENDINGS, open_outlines, result_path, write_labels
from nucleus.predict.image_files import stem_of
from nucleus.predict.measurement import MeasuredPart
from nucleus.serve.computation import Found, FoundImage
from nucleus.text import plural

__all__ = ["MEDIA_TYPES", "chosen_type", "represented"]

_JSON, _GEOJSON, _TIFF, _PNG = "application/json", "application/geo+json", "image/tiff", "image/png"
_MOST_LABELS = np.iinfo(np.uint16).max


def chosen_type(accept: str | None) -> str:
    """Return the media type that a client prefers among `MEDIA_TYPES`; JSON if it has no preference.

    Args:
        accept: The header Accept (RFC 9110, 12.5.1), or None.

    Raises:
        RequestError: It accepts none of them (406).
    """
    ranges = [_range(part) for part in (accept or "").split(",") if part.strip()] or [("*/*", 1.0)]
    quality = {name: _quality(name, ranges) for name in MEDIA_TYPES}
    best = max(quality, key=lambda name: quality[name])  # the first of equal ones
    if quality[best] == 0:
        raise RequestError(
            f"Expected Accept with one of {', '.join(MEDIA_TYPES)}; found {(accept or '')[:200]!r}. Ask for one.", 406
        )
    return best


def _range(text: str) -> tuple[str, float]:
    """Return the media range and the quality of a part of Accept."""
    name, *parameters = (part.strip() for part in text.split(";"))
    given = next((part[2:] for part in parameters if part[:2].lower() == "q="), "1")
    try:
        return name.lower(), min(1.0, max(0.0, float(given)))
    except ValueError:
        return name.lower(), 0.0


def _quality(name: str, ranges: list[tuple[str, float]]) -> float:
    """Return the quality of a media type: that of the most specific range which it is in."""
    for wanted in (name, f"{name.partition('/')[0]}/*", "*/*"):
        found = [quality for each, quality in ranges if each == wanted]
        if found:
            return max(found)
    return 0.0


def represented(found: Found, media_type: str, seconds: float, folder: Path) -> bytes:
    """Return a result in a form.

    Args:
        found: The result.
        media_type: One of `MEDIA_TYPES`.
        seconds: How long it took.
        folder: Empty folder for temporary files.

    Raises:
        RequestError: The form holds the labels of one image, and there are several; or too many for it (422).
        ImageError: The image is too large for the form.
    """
    return MEDIA_TYPES[media_type](found, seconds, folder)


def _json(found: Found, seconds: float, _folder: Path) -> bytes:
    sizes = {image.frame.shape for image in found.images}
    height, width = sizes.pop() if len(sizes) == 1 else (None, None)
    answer: dict[str, Any] = {
        "nuclei": found.nuclei,
        "model": str(found.model),
        "width": width,
        "height": height,
        "seconds": round(seconds, 3),
        "images": [image.row for image in found.images],
        "table": [row for image in found.images for row in image.rows],
    }
    return to_json(answer, inf_nan_mode="null")


def _geojson(found: Found, _seconds: float, folder: Path) -> bytes:
    """Return what `nucleus predict --format geojson` writes; of several images, the features of all."""
    contents = [_outlines(image, repr(found.model), folder) for image in found.images]
    if len(contents) == 1:
        return contents[0]
    features = [feature for content in contents for feature in json.loads(content)["features"]]
    return to_json({"type": "FeatureCollection", "features": features})


def _outlines(image: FoundImage, source: str, folder: Path) -> bytes:
    stem = folder / stem_of(image.output)
    with open_outlines("geojson", stem, image.frame, source) as add:
        add(MeasuredPart(image.frame, image.labels.labels, image.rows))
    return result_path(stem, ENDINGS["geojson"]).read_bytes()


def _tiff(found: Found, _seconds: float, folder: Path) -> bytes:
    image = _only(found, _TIFF)
    path = result_path(folder / "answer", ENDINGS["labels"])
    write_labels(path, image.labels, image.frame)
    return path.read_bytes()


def _png(found: Found, _seconds: float, _folder: Path) -> bytes:
    image = _only(found, _PNG)
    if image.labels.count > _MOST_LABELS:
        raise RequestError(
            f"Expected at most {_MOST_LABELS:,} nuclei for {_PNG}, whose labels have 16 bits; found "
            f"{image.labels.count:,}. Ask for {_TIFF}.",
            422,
        )
    return encode_png(image.labels.labels.astype(np.uint16))


def _only(found: Found, media_type: str) -> FoundImage:
    if len(found.images) > 1:
        raise RequestError(
            f"Expected one image for {media_type}; found {plural(len(found.images), 'plane')}. Choose one by z and t, "
            f"or ask for {_JSON} or {_GEOJSON}.",
            422,
        )
    return found.images[0]


MEDIA_TYPES: dict[str, Callable[[Found, float, Path], bytes]] = {
    _JSON: _json,
    _GEOJSON: _geojson,
    _TIFF: _tiff,
    _PNG: _png,
}
"""Media types of answers, from the most to the least preferred by the service."""
