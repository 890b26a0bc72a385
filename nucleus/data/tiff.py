"""TIFF metadata: channels and pixel size, and the check that a file is a single image that all decoders agree on."""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import tifffile

from nucleus.errors import ImageError

__all__ = ["TIFF_SUFFIXES", "TiffFacts", "tiff_facts"]

TIFF_SUFFIXES = frozenset({".tif", ".tiff"})
_OME_SIZE = re.compile(r'PhysicalSize([XY])="([^"]*)"')  # instead of an XML parser, which a malicious file could harm
_OME_UNIT = re.compile(r'PhysicalSizeXUnit="([^"]*)"')
_MICROMETRES = {"µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_SQUARE = 0.01
"""Pixels are square if their sides differ by less than this fraction."""
_SIDE_IMAGES = frozenset({"thumbnail", "label", "macro", "overview"})
"""Names of the images that slide scanners add to the main one."""
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _CMYK = 0, 1, 5
_ALPHA = (1, 2)


@dataclass(frozen=True)
class TiffFacts:
    """Metadata of a TIFF file.

    Attributes:
        channel_pages: Page of each channel if the channels are stored in separate pages, else empty.
        pixel_size: Side of a pixel, micrometres; None if unknown.
    """

    channel_pages: tuple[int, ...] = ()
    pixel_size: float | None = None


def tiff_facts(source: Path | BinaryIO, name: str) -> TiffFacts:
    """Read the header of a TIFF file.

    Args:
        source: The file, or its content.
        name: Name of the file in error messages.

    Raises:
        ImageError: The file is damaged, contains several images, planes or time points, or a pixel format that decoders
            interpret differently.
        OSError: The file cannot be read.
    """
    try:
        with tifffile.TiffFile(source) as file:
            return TiffFacts(_channel_pages(file, name), _pixel_size(file))
    except (ImageError, OSError):
        raise
    except Exception as error:  # tifffile raises many kinds of errors for damaged headers
        raise ImageError(f"Expected a TIFF file at {name}; its header cannot be read: {error}.") from error


def _channel_pages(file: tifffile.TiffFile, name: str) -> tuple[int, ...]:
    """Return the page of each channel if they are in separate pages. Raises `ImageError` for more than one image."""
    images = [series for series in file.series if series.name.lower() not in _SIDE_IMAGES]
    if len(images) != 1:
        raise ImageError(f"Expected one image in {name}; found {len(images)}. Save each as a separate file.")
    (series,) = images
    sizes = {axis: size for axis, size in zip(series.axes, series.shape, strict=True) if size > 1}
    if set(sizes) - set("YXSC"):
        raise ImageError(
            f"Expected one image in {name}; found a stack with axes {series.axes} of {series.shape}. "
            "Save its planes as separate files."
        )
    if any(page is None or page.parent is not file for page in series.pages):
        raise ImageError(
            f"Expected a complete image in {name}; it is one of several files of an OME-TIFF. Save them as one file."
        )
    _check_samples(series.keyframe, name)
    if sizes.get("C", 1) > 1 and len(series.pages) == sizes["C"]:
        return tuple(page.index for page in series.pages)
    return ()


def _check_samples(page: tifffile.TiffPage, name: str) -> None:
    """Raise `ImageError` for a pixel format that decoders interpret differently."""
    grey = page.photometric in {_WHITE_IS_ZERO, _BLACK_IS_ZERO}
    alpha = page.samplesperpixel == 2 and len(page.extrasamples) == 1 and page.extrasamples[0] in _ALPHA
    if (grey and page.samplesperpixel > 1 and not alpha) or page.samplesperpixel > 4:
        raise ImageError(
            f"Expected grey or RGB pixels in {name}; found {page.samplesperpixel} samples per pixel. Save each channel "
            "as a separate page (axes CYX)."
        )
    if page.photometric == _CMYK:
        raise ImageError(f"Expected grey or RGB pixels in {name}; found CMYK inks. Save it as RGB.")
    if page.photometric == _WHITE_IS_ZERO and page.bitspersample > 8:
        raise ImageError(
            f"Expected 0 to be black in {name}; found a TIFF of {page.bitspersample} bits where 0 is white."
        )


def _pixel_size(file: tifffile.TiffFile) -> float | None:
    """Return the pixel size in micrometres from the metadata of OME or ImageJ; None if unknown or not square.

    Plain resolution tags are ignored, because they often describe a screen.
    """
    if file.is_ome and file.ome_metadata:
        sizes = dict(_OME_SIZE.findall(file.ome_metadata))
        unit = _OME_UNIT.search(file.ome_metadata)
        return _micrometres([sizes.get("X", ""), sizes.get("Y", sizes.get("X", ""))], unit[1] if unit else "µm")
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
