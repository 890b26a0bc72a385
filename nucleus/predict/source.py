"""Images in files and arrays, read in parts (`ImageSource`), and rescaled for the network (`ScaledImage`)."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.images import RgbImage, colours_of, decode_raw
from nucleus.data.normalization import (
    BLOCK,
    IntensitySample,
    intensity_sample,
    joined_samples,
    normalization_table,
    rgb8,
    stretch_of,
    stretched_sample,
)
from nucleus.data.tiff import TIFF_SUFFIXES, TiffFacts, tiff_facts
from nucleus.errors import ImageError
from nucleus.model.tiling import Region

os.environ.setdefault("VIPS_BLOCK_UNTRUSTED", "1")  # formats whose decoders are not safe with malicious files
import pyvips

__all__ = ["ImageSource", "ScaledImage", "array_source", "channel_count", "image_source", "open_source"]

_WHOLE_PIXELS = 1 << 24
"""Images of up to this many pixels are decoded whole, by the decoder of the import."""
_BAND_PIXELS = 1 << 24
_SAMPLE_PIXELS = 1 << 22
"""Percentiles of larger images are taken from about this many pixels, every k-th by row and column."""
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
ReadPart = Callable[[slice, slice], NDArray[Any]]


@dataclass(frozen=True)
class ImageSource:
    """An image that can be read in parts.

    Attributes:
        name: Name of the image in tables and messages.
        height: Height, px.
        width: Width, px.
        read: Function that reads rows and columns, h x w x 1 (grey) or h x w x 3 (RGB), in the depth of the image.
        read_channels: Function that reads the same part with all channels, even if `read` reads only one of them.
        pixel_size: Side of a pixel, micrometres; None if unknown.
    """

    name: str
    height: int
    width: int
    read: ReadPart
    read_channels: ReadPart
    pixel_size: float | None = None

    def bands(self, multiple: int) -> Iterator[slice]:
        """Yield the rows of the image from the top, about 16 million pixels at a time, in multiples of `multiple`."""
        band = max(1, _BAND_PIXELS // self.width // multiple) * multiple
        return (slice(top, min(top + band, self.height)) for top in range(0, self.height, band))


def image_source(image: str | Path | ArrayLike, channel: int | None = None) -> ImageSource:
    """Open an image: a file (`open_source`) or an array (`array_source`). Raises `ImageError`."""
    return open_source(Path(image), channel) if isinstance(image, str | Path) else array_source(image, channel=channel)


def array_source(pixels: ArrayLike, name: str = "image", channel: int | None = None) -> ImageSource:
    """Return the source of an image in memory.

    Args:
        pixels: H x W (grey), or H x W x C with C = 1 (grey), 3 (RGB) or 4 (RGB and alpha, which is dropped); with any
            other C, `channel` is needed. Integers or floats of any depth, or bool.
        name: Name of the image in tables and messages.
        channel: Channel to segment, from 0; None segments grey and RGB images as a whole.

    Raises:
        ImageError: The array has another shape or type, or it has several channels and `channel` is None.
    """
    array = np.asarray(pixels)
    if array.dtype.kind not in "buif" or array.ndim not in {2, 3} or 0 in array.shape:
        raise ImageError(
            f"Expected {name} to be an array of numbers, H x W or H x W x C; found shape {array.shape} of {array.dtype}"
            + (". Pass one plane of it." if array.ndim > 3 else ".")
        )
    if array.dtype == np.float16:
        array = array.astype(np.float32)  # percentiles need more digits
    stored = array if array.ndim == 3 else array[..., np.newaxis]
    stored = stored[..., :3] if stored.shape[2] == 4 else stored
    if channel is None and stored.shape[2] not in {1, 3}:
        hint = " If its channels come first, pass np.moveaxis(image, 0, -1)." if array.shape[0] < array.shape[2] else ""
        raise ImageError(
            f"Expected one channel of {name}, which has {stored.shape[2]} (shape {array.shape}, read as H x W x C); "
            f"found no choice among them. Add: channel=0.{hint}"
        )

    def read(rows: slice, columns: slice) -> NDArray[Any]:
        return stored[rows, columns]

    source = ImageSource(name, stored.shape[0], stored.shape[1], read, read)
    return source if channel is None else _one_channel(source, channel)


def open_source(path: Path, channel: int | None = None) -> ImageSource:
    """Open an image file.

    Small images are decoded whole. For larger ones, libvips decodes only the parts that are read (tiled TIFF), or
    unpacks the image to a temporary file (other formats).

    Args:
        path: PNG, TIFF, OME-TIFF, JPEG, BMP or WebP file.
        channel: Channel to segment, from 0; None segments grey and RGB images as a whole.

    Raises:
        ImageError: The file is not an image or damaged, has several planes or times, or has several channels and
            `channel` is None.
    """
    with _readable(path):
        facts = _facts_of(path)
        if facts.channel_pages:
            chosen = _choice(facts, channel, path)
            pages = [_large(path, page) for page in facts.channel_pages]
            source = replace(pages[chosen], read_channels=_together(pages))
        else:
            source = _whole(path) if _is_small(path) else _large(path, 0)
            source = source if channel is None else _one_channel(source, channel)
        return replace(source, pixel_size=facts.pixel_size)


def channel_count(path: Path) -> int:
    """Return the number of channels that `read_channels` of a file reads, from its header. Raises `ImageError`."""
    with _readable(path):
        pages = _facts_of(path).channel_pages
        header = _header(path)
        return len(pages) or (_channels(_whole(path)) if header is None else _bands(header))


def _facts_of(path: Path) -> TiffFacts:
    return tiff_facts(path, str(path)) if path.suffix.lower() in TIFF_SUFFIXES else TiffFacts()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise `ImageError` for a file name that libvips cannot open, and for errors of the file system."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = str(path).encode(errors="backslashreplace").decode()
        raise ImageError(f"Expected a file name in UTF-8; found {shown}. Rename the file.") from error
    try:
        yield
    except OSError as error:
        raise ImageError(f"Cannot read {path}: {error.strerror or error}.") from error


def _choice(facts: TiffFacts, channel: int | None, path: Path) -> int:
    count = len(facts.channel_pages)
    if channel is None or not 0 <= channel < count:
        found = "no choice among them" if channel is None else f"the choice {channel}"
        raise ImageError(
            f"Expected one channel of {path}, which has {count}; found {found}. Add: --channel 0 (in Python: channel=0)"
        )
    return channel


def _together(pages: Sequence[ImageSource]) -> ReadPart:
    return lambda rows, columns: np.concatenate([page.read(rows, columns) for page in pages], axis=2)


def _is_small(path: Path) -> bool:
    header = _header(path)
    return header is None or header.width * header.height <= _WHOLE_PIXELS


def _whole(path: Path) -> ImageSource:
    """Decode a whole image."""
    return array_source(colours_of(decode_raw(path.read_bytes(), str(path)), str(path)), path.name)


def _one_channel(source: ImageSource, channel: int) -> ImageSource:
    channels = _channels(source)
    if not 0 <= channel < channels:
        raise ImageError(f"Expected channel {channel} in {source.name}; it has {channels}, counted from 0.")
    return replace(source, read=lambda rows, columns: source.read(rows, columns)[..., channel : channel + 1])


def _header(path: Path) -> Any | None:
    """Open an image with libvips, without decoding it; return None for formats that only OpenCV reads."""
    try:
        return pyvips.Image.new_from_file(str(path))
    except pyvips.Error:
        return None


def _large(path: Path, page: int) -> ImageSource:
    """Open an image that libvips reads in parts."""
    tiff = path.suffix.lower() in TIFF_SUFFIXES
    # For libvips, missing tiles of a TIFF are only a warning.
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
    """Return the number of channels without alpha."""
    return 3 if image.bands >= 3 else 1


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


class ScaledImage:
    """An image as the network sees it: normalised and rescaled.

    Grey values are stretched to a range of the whole image, which is read once for that purpose. For 8-bit RGB images
    below 4096 x 4096 px the result is identical, to the bit, to `nucleus.data.normalization.normalize`, which training
    uses; for larger images the range is that of a sample.

    Args:
        source: The image.
        normalization: Options of the stretch of grey values.
        scale: Network pixels per image pixel.

    Attributes:
        source: The image.
        scale: Network pixels per image pixel.
        shape: Height and width in network pixels.

    Raises:
        ImageError: The image is damaged, or has values that are not finite.
    """

    def __init__(self, source: ImageSource, normalization: NormalizationOptions, scale: float = 1.0) -> None:
        self.source = source
        self.scale = scale
        sample = _sample_of(source)
        self._stretch = stretch_of(sample)
        self._table = normalization_table(stretched_sample(sample, self._stretch), normalization)
        self.shape = (max(1, round(source.height * scale)), max(1, round(source.width * scale)))

    @property
    def source_shape(self) -> tuple[int, int]:
        """Height and width of the image, px."""
        return self.source.height, self.source.width

    @property
    def whole(self) -> Region:
        """Region of the whole image, in image pixels."""
        return Region(slice(0, self.source.height), slice(0, self.source.width))

    def rgb(self, rows: slice, columns: slice) -> RgbImage:
        """Return image pixels for display, h x w x 3, uint8, not normalised or rescaled."""
        return rgb8(self.source.read(rows, columns), self._stretch)

    def read(self, rows: slice, columns: slice) -> RgbImage:
        """Return network pixels, h x w x 3, uint8, normalised."""
        if self.scale == 1:
            return np.asarray(self._table[self.rgb(rows, columns)])
        first, last = self._needed(rows, self.source.height), self._needed(columns, self.source.width)
        pixels = self._table[self.rgb(first, last)]
        if self.scale < 1:  # prevents aliasing
            pixels = cv2.GaussianBlur(pixels, (0, 0), 0.5 / self.scale)
        shape = rows.stop - rows.start, columns.stop - columns.start
        offset = rows.start / self.scale - first.start, columns.start / self.scale - last.start
        return np.asarray(_resampled(pixels, shape, 1 / self.scale, offset), np.uint8)

    def back(self, values: NDArray[np.float32], covering: Region, wanted: Region) -> NDArray[np.float32]:
        """Resample network values to image pixels.

        Args:
            values: Network values in the region `covering`, h x w x C.
            covering: Region in network pixels, from the method `covering`.
            wanted: Region in image pixels.

        Returns:
            Values in the region `wanted`, float32.
        """
        if self.scale == 1:
            return values
        down = wanted.rows.start * self.scale - covering.rows.start
        across = wanted.columns.start * self.scale - covering.columns.start
        return np.asarray(_resampled(values, wanted.shape, self.scale, (down, across)), np.float32)

    def covering(self, wanted: Region) -> Region:
        """Return the region in network pixels that covers a region in image pixels."""
        if self.scale == 1:
            return wanted
        return Region(self._cover(wanted.rows, self.shape[0]), self._cover(wanted.columns, self.shape[1]))

    def _cover(self, part: slice, length: int) -> slice:
        first, last = int(part.start * self.scale) - 2, int(part.stop * self.scale) + 3
        return slice(max(0, first), min(length, last))

    def _needed(self, part: slice, length: int) -> slice:
        margin = 2 + round(2 / self.scale)
        first, last = int(part.start / self.scale) - margin, int(part.stop / self.scale) + margin
        return slice(max(0, first), min(length, last))


def _resampled(
    pixels: NDArray[np.generic], shape: tuple[int, int], step: float, offset: tuple[float, float]
) -> NDArray[np.generic]:
    """Resample pixels (h x w x C) to another grid by bilinear interpolation; edge pixels are repeated outside.

    Pixel i of the result has its centre at (i + 0.5) * step + offset - 0.5 of the input, by rows and by columns.
    """
    dy, dx = (value + step / 2 - 0.5 for value in offset)
    matrix = np.array([[step, 0, dx], [0, step, dy]], np.float64)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    found = cv2.warpAffine(pixels, matrix, shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(found).reshape(*shape, -1)


def _sample_of(source: ImageSource) -> IntensitySample:
    """Return a sample of every k-th pixel by row and column; of all pixels of small images."""
    every = max(1, int(np.sqrt(source.height * source.width / _SAMPLE_PIXELS)))
    columns = slice(0, source.width)
    bands = source.bands(every * BLOCK)
    return joined_samples(intensity_sample(source.read(rows, columns), every, source.name) for rows in bands)
