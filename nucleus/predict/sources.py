"""Image files of any size, read by parts: their pixels in the depth that they have."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from nucleus.data.images import colours_of, decode_raw
from nucleus.errors import ImageError

os.environ.setdefault("VIPS_BLOCK_UNTRUSTED", "1")  # formats whose decoders are not hardened against bad files
import pyvips

__all__ = ["ImageSource", "array_source", "open_source"]

_WHOLE_PIXELS = 1 << 24
"""Smaller images are decoded at once, by the decoder that the import uses."""
_BAND_PIXELS = 1 << 24
_TIFF_SUFFIXES = frozenset({".tif", ".tiff"})
_DTYPES = {
    "uchar": np.uint8,
    "char": np.int8,
    "ushort": np.uint16,
    "short": np.int16,
    "uint": np.uint32,
    "int": np.int32,
    "float": np.float32,
    "double": np.float64,
}
_OME_SIZE = {  # enough of its XML, and no parser that a bad file could harm
    "size": re.compile(r'PhysicalSizeX="([0-9.eE+-]+)"'),
    "unit": re.compile(r'PhysicalSizeXUnit="([^"]+)"'),
}
_MICROMETRES = {"µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}


@dataclass(frozen=True)
class ImageSource:
    """An image that can be read by parts.

    Attributes:
        name: Names it in tables and messages.
        height: Pixels.
        width: Pixels.
        read: Gives rows and columns, h x w x 1 (grey) or 3 (RGB), in the depth of the file.
        pixel_size: Side of a pixel in micrometres, if the file says so.
    """

    name: str
    height: int
    width: int
    read: Callable[[slice, slice], NDArray[Any]]
    pixel_size: float | None = None

    def bands(self, multiple: int) -> Iterator[slice]:
        """Rows of the image from the top, some 16 million pixels at a time; each but the last a multiple of rows."""
        band = max(1, _BAND_PIXELS // self.width // multiple) * multiple
        return (slice(top, min(top + band, self.height)) for top in range(0, self.height, band))


@dataclass(frozen=True)
class _TiffFacts:
    """What a TIFF file says of itself.

    Attributes:
        channel_pages: The page of each channel, where channels have pages of their own; else empty.
        pixel_size: Micrometres, or None.
    """

    channel_pages: tuple[int, ...] = ()
    pixel_size: float | None = None


def array_source(pixels: NDArray[Any], name: str = "image") -> ImageSource:
    """An image in memory, H x W x 1 or 3."""
    return ImageSource(name, pixels.shape[0], pixels.shape[1], lambda rows, columns: pixels[rows, columns])


def open_source(path: Path, channel: int | None = None) -> ImageSource:
    """Open an image file.

    Small images are decoded at once; of larger ones only what is asked for is (tiled TIFF), or libvips unpacks them to
    a temporary file.

    Args:
        path: PNG, TIFF, OME-TIFF, JPEG, BMP or WebP.
        channel: Which channel to take, from 0; without it, grey and RGB images are taken whole.

    Raises:
        ImageError: No image, a damaged one, or one with several channels, planes or times and no choice among them.
    """
    try:
        facts = _tiff_facts(path) if path.suffix.lower() in _TIFF_SUFFIXES else _TiffFacts()
        header = _header(path)
        if facts.channel_pages:
            source = _large(path, _page_of(facts, channel, path))
        elif header is None or header.width * header.height <= _WHOLE_PIXELS:
            source = array_source(colours_of(decode_raw(path.read_bytes(), str(path)), str(path)), path.name)
        else:
            source = _large(path, 0)
    except OSError as error:
        raise ImageError(f"Cannot read {path}: {error.strerror or error}.") from error
    if channel is not None and not facts.channel_pages:
        source = _one_channel(source, channel)
    return replace(source, pixel_size=facts.pixel_size)


def _tiff_facts(path: Path) -> _TiffFacts:
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            sizes = {axis: size for axis, size in zip(series.axes, series.shape, strict=True) if size > 1}
            stacked = set(sizes) - set("YXSC")
            if stacked:
                raise ImageError(
                    f"Expected one image in {path}; found a stack with axes {series.axes} of {series.shape}. "
                    "Save its planes as files of their own."
                )
            pages: tuple[int, ...] = ()
            if sizes.get("C", 1) > 1 and len(series.pages) == sizes["C"]:
                pages = tuple(page.index for page in series.pages)
            return _TiffFacts(pages, _pixel_size(file))
    except tifffile.TiffFileError as error:
        raise ImageError(f"Expected a TIFF file at {path}; {error}.") from error


def _pixel_size(file: tifffile.TiffFile) -> float | None:
    """Micrometres, from OME's or ImageJ's description; plain resolution tags are too often the screen's."""
    if file.is_ome and file.ome_metadata:
        size, unit = (_OME_SIZE[key].search(file.ome_metadata) for key in ("size", "unit"))
        factor = _MICROMETRES.get(unit[1] if unit else "µm")
        return float(size[1]) * factor if size and factor else None
    unit = (file.imagej_metadata or {}).get("unit", "")
    resolution = file.pages.first.tags.get("XResolution")
    if unit not in _MICROMETRES or resolution is None or not resolution.value[0]:
        return None
    return _MICROMETRES[unit] * float(resolution.value[1]) / float(resolution.value[0])


def _page_of(facts: _TiffFacts, channel: int | None, path: Path) -> int:
    count = len(facts.channel_pages)
    if channel is None or not 0 <= channel < count:
        found = "no choice among them" if channel is None else f"the choice {channel}"
        raise ImageError(f"Expected one channel of {path}, which has {count}; found {found}. Add: --channel 0")
    return facts.channel_pages[channel]


def _one_channel(source: ImageSource, channel: int) -> ImageSource:
    channels = source.read(slice(0, 1), slice(0, 1)).shape[2]
    if not 0 <= channel < channels:
        raise ImageError(f"Expected channel {channel} in {source.name}; it has {channels}, counted from 0.")
    return replace(source, read=lambda rows, columns: source.read(rows, columns)[..., channel : channel + 1])


def _header(path: Path) -> Any | None:
    """The image as libvips sees it, nothing decoded yet; None for formats that only OpenCV knows."""
    try:
        return pyvips.Image.new_from_file(str(path))
    except pyvips.Error:
        return None


def _large(path: Path, page: int) -> ImageSource:
    """An image read by parts through libvips."""
    tiff = path.suffix.lower() in _TIFF_SUFFIXES
    # A TIFF's missing tiles are only a warning to libvips.
    options = {"fail_on": "warning", "page": page} if tiff else {"fail_on": "truncated"}
    try:
        image = pyvips.Image.new_from_file(str(path), access="random", **options)
        if image.interpretation == "cmyk":
            image = image.colourspace("srgb")
        image = image.extract_band(0, n=3 if image.bands >= 3 else 1)
        region = pyvips.Region.new(image)
    except pyvips.Error as error:
        raise ImageError(f"Expected an image in {path}; libvips cannot read it: {_reason(error)}.") from error

    def read(rows: slice, columns: slice) -> NDArray[Any]:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        try:
            data = region.fetch(columns.start, rows.start, width, height)
        except pyvips.Error as error:
            raise ImageError(f"Expected an image in {path}; a part is damaged: {_reason(error)}.") from error
        return np.frombuffer(data, _DTYPES[image.format]).reshape(height, width, image.bands)

    return ImageSource(path.name, image.height, image.width, read)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
