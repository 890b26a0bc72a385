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
_CHANNEL = re.compile(r"<(?:\w+:)?Channel(?=[\s/>])([^<>]*)")
_ATTRIBUTE = re.compile(r"(\w+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)')")
_FILE = re.compile(r'FileName="([^"]*)"')
_ELSEWHERE = re.compile(r'<(?:\w+:)?BinaryOnly(?=\s)[^<>]*\sMetadataFile="([^"]*)"')
_OME_SIZE = re.compile(r'PhysicalSize([XY])="([^"]*)"')
_OME_UNIT = re.compile(r'PhysicalSizeXUnit="([^"]*)"')
_MICROMETRES = {"µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
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
    return set(map(html.unescape, _FILE.findall(file.ome_metadata or ""))) if file.is_ome else set()


def metadata_file(file: tifffile.TiffFile) -> str | None:
    """Return the name of the file that describes the planes in a file of a larger OME-TIFF; None if it does itself."""
    found = _ELSEWHERE.search(file.ome_metadata or "") if file.is_ome else None
    return found and html.unescape(found[1])


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
    found = []
    for tag in _CHANNEL.findall(text):
        values = {key: html.unescape(double or single) for key, double, single in _ATTRIBUTE.findall(tag)}
        found.append(values.get("Name", ""))
    return found


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
        sizes = dict(_OME_SIZE.findall(text))
        unit = _OME_UNIT.search(text)
        return _micrometres([sizes.get("X", ""), sizes.get("Y", sizes.get("X", ""))], unit[1] if unit else "µm")
    if file.is_lsm and file.lsm_metadata:
        return _micrometres([file.lsm_metadata.get(f"VoxelSize{axis}", "") for axis in "XY"], "m")
    tags = file.pages.first.tags
    found = [tags.get(name) for name in ("XResolution", "YResolution")]
    if file.imagej_metadata is None or None in found:
        return None
    sides = [tag.value[1] / tag.value[0] if tag.value[0] else "" for tag in found]
    return _micrometres(sides, str(file.imagej_metadata.get("unit", "")))


def _micrometres(sides: Sequence[Any], unit: str) -> float | None:
    """Return the side of square pixels in micrometres; None for other units or invalid numbers."""
    unit = html.unescape(unit).replace("\\u00B5", "µ").replace("\u03bc", "µ")
    try:
        width, height = (float(side) for side in sides)
    except ValueError:
        return None
    usable = math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0
    if unit not in _MICROMETRES or not usable or abs(width - height) > _SQUARE * width:
        return None
    return width * _MICROMETRES[unit]
