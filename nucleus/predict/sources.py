"""Image files of any size, read by parts: their pixels in the depth that they have."""

import html
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

__all__ = ["ImageSource", "array_source", "channel_count", "open_source"]

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
_OME_SIZE = re.compile(r'PhysicalSize([XY])="([^"]*)"')  # enough of its XML, and no parser that a bad file could harm
_OME_UNIT = re.compile(r'PhysicalSizeXUnit="([^"]*)"')
_MICROMETRES = {"µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_SQUARE = 0.01
"""Sides of a pixel that differ by less, as a fraction, are alike."""
_SIDE_IMAGES = frozenset({"thumbnail", "label", "macro", "overview"})
"""What slide scanners add to the image itself."""
_WHITE_IS_ZERO, _BLACK_IS_ZERO = 0, 1
_ALPHA = (1, 2)


ReadPart = Callable[[slice, slice], NDArray[Any]]


@dataclass(frozen=True)
class ImageSource:
    """An image that can be read by parts.

    Attributes:
        name: Names it in tables and messages.
        height: Pixels.
        width: Pixels.
        read: Gives rows and columns, h x w x 1 (grey) or 3 (RGB), in the depth of the file.
        read_channels: Gives the same with all channels of the file, of which `read` may give one.
        pixel_size: Side of a pixel in micrometres, if the file says so.
    """

    name: str
    height: int
    width: int
    read: ReadPart
    read_channels: ReadPart
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

    def read(rows: slice, columns: slice) -> NDArray[Any]:
        return pixels[rows, columns]

    return ImageSource(name, pixels.shape[0], pixels.shape[1], read, read)


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
    with _readable(path):
        facts = _facts(path)
        if facts.channel_pages:
            chosen = _choice(facts, channel, path)
            pages = [_large(path, page) for page in facts.channel_pages]
            source = replace(pages[chosen], read_channels=_together(pages))
        else:
            source = _whole(path) if _is_small(path) else _large(path, 0)
            source = source if channel is None else _one_channel(source, channel)
        return replace(source, pixel_size=facts.pixel_size)


def channel_count(path: Path) -> int:
    """How many channels `read_channels` of a file gives, from its header. Raises `ImageError`."""
    with _readable(path):
        pages = _facts(path).channel_pages
        header = _header(path)
        return len(pages) or (_channels(_whole(path)) if header is None else _bands(header))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise `ImageError` for a name that libvips cannot take, and for errors of the file system."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = str(path).encode(errors="backslashreplace").decode()
        raise ImageError(f"Expected a file name in UTF-8; found {shown}. Rename the file.") from error
    try:
        yield
    except OSError as error:
        raise ImageError(f"Cannot read {path}: {error.strerror or error}.") from error


def _facts(path: Path) -> _TiffFacts:
    """What a TIFF file says of itself; of other files nothing is asked."""
    if path.suffix.lower() not in _TIFF_SUFFIXES:
        return _TiffFacts()
    try:
        with tifffile.TiffFile(path) as file:
            return _TiffFacts(_channel_pages(file, path), _pixel_size(file))
    except (ImageError, OSError):
        raise
    except Exception as error:  # tifffile raises whatever a damaged header leads it to
        raise ImageError(f"Expected a TIFF file at {path}; its header cannot be read: {error}.") from error


def _channel_pages(file: tifffile.TiffFile, path: Path) -> tuple[int, ...]:
    """The page of each channel where they have pages of their own. Raises `ImageError` for what is no one image."""
    images = [series for series in file.series if series.name.lower() not in _SIDE_IMAGES]
    if len(images) != 1:
        raise ImageError(f"Expected one image in {path}; found {len(images)}. Save each as a file of its own.")
    (series,) = images
    sizes = {axis: size for axis, size in zip(series.axes, series.shape, strict=True) if size > 1}
    if set(sizes) - set("YXSC"):
        raise ImageError(
            f"Expected one image in {path}; found a stack with axes {series.axes} of {series.shape}. "
            "Save its planes as files of their own."
        )
    if any(page is None or page.parent is not file for page in series.pages):
        raise ImageError(
            f"Expected a whole image in {path}; it is one of several files of an OME-TIFF. Save it as a single file."
        )
    _check_samples(series.keyframe, path)
    if sizes.get("C", 1) > 1 and len(series.pages) == sizes["C"]:
        return tuple(page.index for page in series.pages)
    return ()


def _check_samples(page: tifffile.TiffPage, path: Path) -> None:
    """Raise `ImageError` for pixels that the decoders do not agree on."""
    grey = page.photometric in {_WHITE_IS_ZERO, _BLACK_IS_ZERO}
    alpha = page.samplesperpixel == 2 and len(page.extrasamples) == 1 and page.extrasamples[0] in _ALPHA
    if (grey and page.samplesperpixel > 1 and not alpha) or page.samplesperpixel > 4:
        raise ImageError(
            f"Expected grey or RGB pixels in {path}; found {page.samplesperpixel} samples a pixel. Save each channel "
            "as a page of its own (axes CYX)."
        )
    if page.photometric == _WHITE_IS_ZERO and page.bitspersample > 8:
        raise ImageError(
            f"Expected 0 to be black in {path}; found a TIFF of {page.bitspersample} bits where it is white."
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


def _choice(facts: _TiffFacts, channel: int | None, path: Path) -> int:
    count = len(facts.channel_pages)
    if channel is None or not 0 <= channel < count:
        found = "no choice among them" if channel is None else f"the choice {channel}"
        raise ImageError(f"Expected one channel of {path}, which has {count}; found {found}. Add: --channel 0")
    return channel


def _together(pages: Sequence[ImageSource]) -> ReadPart:
    return lambda rows, columns: np.concatenate([page.read(rows, columns) for page in pages], axis=2)


def _is_small(path: Path) -> bool:
    header = _header(path)
    return header is None or header.width * header.height <= _WHOLE_PIXELS


def _whole(path: Path) -> ImageSource:
    """An image that is decoded at once."""
    return array_source(colours_of(decode_raw(path.read_bytes(), str(path)), str(path)), path.name)


def _one_channel(source: ImageSource, channel: int) -> ImageSource:
    channels = _channels(source)
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
        image = image.extract_band(0, n=_bands(image))
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

    return ImageSource(path.name, image.height, image.width, read, read)


def _channels(source: ImageSource) -> int:
    return int(source.read(slice(0, 1), slice(0, 1)).shape[2])


def _bands(image: Any) -> int:
    """Channels without alpha."""
    return 3 if image.bands >= 3 else 1


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
