"""What the metadata of a TIFF (OME, ImageJ, LSM) say about its images: sizes of pixels, and names of channels."""

import html
import math
import re
from collections.abc import Sequence
from typing import Any

import tifffile

__all__ = ["channel_names", "files_of", "image_texts", "metadata_file", "pixel_size_of"]

# Regular expressions instead of an XML parser, which a malicious file could harm.
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_IMAGE = re.compile(r"<(?:\w+:)?Image(?=[\s>])")
_IMAGE_END = re.compile(r"</(?:\w+:)?Image\s*>")
_TAG = r"""<(?:\w+:)?{}(?=[\s/>])((?:[^<>"']|"[^"<]*"|'[^'<]*')*)"""
_CHANNEL, _PIXELS = re.compile(_TAG.format("Channel")), re.compile(_TAG.format("Pixels"))
_UUID, _ELSEWHERE = re.compile(_TAG.format("UUID")), re.compile(_TAG.format("BinaryOnly"))
_ATTRIBUTE = re.compile(r"(\w+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)')")
_MICROMETRES = {
    "µm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometers": 1.0,
    "Å": 1e-4,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
}
"""No inches: ImageJ takes those of screens and printers over from plain resolution tags."""
_SQUARE = 0.01
"""Pixels are square if their sides differ by less than this fraction."""


def image_texts(file: tifffile.TiffFile) -> list[str]:
    """Return the OME-XML of each image of a file (`TiffFile.series`); empty for files that are not OME-TIFF.

    If it describes another number of images than the file has, which one is which is not known: each is then empty.
    """
    count = len(file.series)
    text = (file.ome_metadata or "") if file.is_ome else ""
    parts = [_IMAGE_END.split(part)[0] for part in _IMAGE.split(_COMMENT.sub("", text))[1:]]
    return parts if len(parts) == count else [""] * count


def files_of(file: tifffile.TiffFile) -> set[str]:
    """Return the names of the files that an OME-TIFF says its pages are in."""
    found = _attributes(_UUID, (file.ome_metadata or "") if file.is_ome else "")
    return {values["FileName"] for values in found if "FileName" in values}


def metadata_file(file: tifffile.TiffFile) -> str | None:
    """Return the name of the file that describes the planes in a file of a larger OME-TIFF; None if it does itself."""
    found = _attributes(_ELSEWHERE, (file.ome_metadata or "") if file.is_ome else "")
    return next((values["MetadataFile"] for values in found if "MetadataFile" in values), None)


def _attributes(tag: re.Pattern[str], text: str) -> list[dict[str, str]]:
    """Return the attributes of each tag of a kind in OME-XML."""
    return [
        {key: html.unescape(double or single) for key, double, single in _ATTRIBUTE.findall(found)}
        for found in tag.findall(text)
    ]


def channel_names(file: tifffile.TiffFile, text: str, count: int) -> tuple[str, ...]:
    """Return the names of the channels of an image; empty if the file names none, or another number of them.

    Args:
        file: The file.
        text: OME-XML of the image, from `image_texts`.
        count: Number of channels.
    """
    names = _ome_names(text) or _imagej_labels(file, count) or _lsm_names(file)
    return tuple(names) if len(names) == count and any(names) else ()


def _ome_names(text: str) -> list[str]:
    """Return the names in OME-XML, with an empty text for a channel without one."""
    return [values.get("Name", "") for values in _attributes(_CHANNEL, text)]


def _imagej_labels(file: tifffile.TiffFile, count: int) -> list[str]:
    """Return the labels of the planes of an ImageJ file, if all planes of a channel have the same one."""
    labels = [str(label) for label in (file.imagej_metadata or {}).get("Labels", [])] if file.is_imagej else []
    repeated = labels[:count] * (len(labels) // count)
    return labels[:count] if repeated == labels and len(set(labels)) == count else []


def _lsm_names(file: tifffile.TiffFile) -> list[str]:
    colours = ((file.lsm_metadata if file.is_lsm else None) or {}).get("ChannelColors") or {}
    return [str(name) for name in colours.get("ColorNames", [])]


def pixel_size_of(file: tifffile.TiffFile, text: str) -> float | None:
    """Return the side of a pixel in micrometres from OME, LSM or ImageJ; None if unknown or not square.

    Plain resolution tags are ignored, because they often describe a screen.

    Args:
        file: The file.
        text: OME-XML of the image, from `image_texts`.
    """
    if file.is_ome and file.ome_metadata:
        pixels = next(iter(_attributes(_PIXELS, text)), {})
        width = pixels.get("PhysicalSizeX", ""), pixels.get("PhysicalSizeXUnit", "µm")
        height = width
        if "PhysicalSizeY" in pixels:
            height = pixels["PhysicalSizeY"], pixels.get("PhysicalSizeYUnit", width[1])
        return _micrometres([width, height])
    if file.is_lsm and file.lsm_metadata:
        return _micrometres([(file.lsm_metadata.get(f"VoxelSize{axis}", ""), "m") for axis in "XY"])
    tags = file.pages.first.tags
    found = [tags.get(name) for name in ("XResolution", "YResolution")]
    if file.imagej_metadata is None or None in found:
        return None
    unit = str(file.imagej_metadata.get("unit", ""))
    units = unit, str(file.imagej_metadata.get("yunit", unit))
    sides = [tag.value[1] / tag.value[0] if tag.value[0] else "" for tag in found]
    return _micrometres(list(zip(sides, units, strict=True)))


def _micrometres(sides: Sequence[tuple[Any, str]]) -> float | None:
    """Return the side of square pixels in micrometres; None for other units or invalid numbers.

    Args:
        sides: Width and height, each with its unit.
    """
    units = [html.unescape(unit).replace("\\u00B5", "µ").replace("\u03bc", "µ") for _, unit in sides]
    if not set(units) <= set(_MICROMETRES):
        return None
    try:
        width, height = (float(side) * _MICROMETRES[unit] for (side, _), unit in zip(sides, units, strict=True))
    except ValueError:
        return None
    usable = math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0
    return width if usable and abs(width - height) <= _SQUARE * width else None
