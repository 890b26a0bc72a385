"""What a TIFF file says of itself, and whether it is one image that every decoder reads alike."""

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
_OME_SIZE = re.compile(r'PhysicalSize([XY])="([^"]*)"')  # enough of its XML, and no parser that a bad file could harm
_OME_UNIT = re.compile(r'PhysicalSizeXUnit="([^"]*)"')
_MICROMETRES = {"µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_SQUARE = 0.01
"""Sides of a pixel that differ by less, as a fraction, are alike."""
_SIDE_IMAGES = frozenset({"thumbnail", "label", "macro", "overview"})
"""What slide scanners add to the image itself."""
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _CMYK = 0, 1, 5
_ALPHA = (1, 2)


@dataclass(frozen=True)
class TiffFacts:
    """What a TIFF file says of itself.

    Attributes:
        channel_pages: The page of each channel, where channels have pages of their own; else empty.
        pixel_size: Micrometres, or None.
    """

    channel_pages: tuple[int, ...] = ()
    pixel_size: float | None = None


def tiff_facts(source: Path | BinaryIO, name: str) -> TiffFacts:
    """Read a TIFF file's header.

    Args:
        source: The file, or its content.
        name: What messages call it.

    Raises:
        ImageError: It is damaged, holds several images, planes or times, or pixels that decoders do not agree on.
        OSError: It cannot be read.
    """
    try:
        with tifffile.TiffFile(source) as file:
            return TiffFacts(_channel_pages(file, name), _pixel_size(file))
    except (ImageError, OSError):
        raise
    except Exception as error:  # tifffile raises whatever a damaged header leads it to
        raise ImageError(f"Expected a TIFF file at {name}; its header cannot be read: {error}.") from error


def _channel_pages(file: tifffile.TiffFile, name: str) -> tuple[int, ...]:
    """The page of each channel where they have pages of their own. Raises `ImageError` for what is no one image."""
    images = [series for series in file.series if series.name.lower() not in _SIDE_IMAGES]
    if len(images) != 1:
        raise ImageError(f"Expected one image in {name}; found {len(images)}. Save each as a file of its own.")
    (series,) = images
    sizes = {axis: size for axis, size in zip(series.axes, series.shape, strict=True) if size > 1}
    if set(sizes) - set("YXSC"):
        raise ImageError(
            f"Expected one image in {name}; found a stack with axes {series.axes} of {series.shape}. "
            "Save its planes as files of their own."
        )
    if any(page is None or page.parent is not file for page in series.pages):
        raise ImageError(
            f"Expected a whole image in {name}; it is one of several files of an OME-TIFF. Save it as a single file."
        )
    _check_samples(series.keyframe, name)
    if sizes.get("C", 1) > 1 and len(series.pages) == sizes["C"]:
        return tuple(page.index for page in series.pages)
    return ()


def _check_samples(page: tifffile.TiffPage, name: str) -> None:
    """Raise `ImageError` for pixels that the decoders do not agree on."""
    grey = page.photometric in {_WHITE_IS_ZERO, _BLACK_IS_ZERO}
    alpha = page.samplesperpixel == 2 and len(page.extrasamples) == 1 and page.extrasamples[0] in _ALPHA
    if (grey and page.samplesperpixel > 1 and not alpha) or page.samplesperpixel > 4:
        raise ImageError(
            f"Expected grey or RGB pixels in {name}; found {page.samplesperpixel} samples a pixel. Save each channel "
            "as a page of its own (axes CYX)."
        )
    if page.photometric == _CMYK:
        raise ImageError(f"Expected grey or RGB pixels in {name}; found CMYK inks. Save it as RGB.")
    if page.photometric == _WHITE_IS_ZERO and page.bitspersample > 8:
        raise ImageError(
            f"Expected 0 to be black in {name}; found a TIFF of {page.bitspersample} bits where it is white."
        )


def _pixel_size(file: tifffile.TiffFile) -> float | None:
    """Micrometres, from OME's or ImageJ's description; plain resolution tags are too often the screen's.

    None also where pixels are not square.
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
    """The side of square pixels from their width and height, if these are numbers above 0 and the unit is known."""
    unit = html.unescape(unit).replace("\\u00B5", "µ").replace("\u03bc", "µ")
    try:
        width, height = (float(side) for side in sides)
    except ValueError:
        return None
    usable = math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0
    if unit not in _MICROMETRES or not usable or abs(width - height) > _SQUARE * width:
        return None
    return width * _MICROMETRES[unit]
