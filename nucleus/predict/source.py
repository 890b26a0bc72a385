"""Image files of any size, read by parts: their pixels in the depth that they have."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.images import RgbImage, colours_of, decode_raw, rgb8, stretch_of
from nucleus.data.normalization import histogram_of, normalization_table
from nucleus.data.tiff import TIFF_SUFFIXES, TiffFacts, tiff_facts
from nucleus.errors import ImageError
from nucleus.model.tiling import Region

os.environ.setdefault("VIPS_BLOCK_UNTRUSTED", "1")  # formats whose decoders are not hardened against bad files
import pyvips

__all__ = ["ImageSource", "NetworkView", "array_source", "channel_count", "open_source"]


_WHOLE_PIXELS = 1 << 24
"""Smaller images are decoded at once, by the decoder that the import uses."""
_BAND_PIXELS = 1 << 24
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
    """How many channels `read_channels` of a file gives, from its header. Raises `ImageError`."""
    with _readable(path):
        pages = _facts_of(path).channel_pages
        header = _header(path)
        return len(pages) or (_channels(_whole(path)) if header is None else _bands(header))


def _facts_of(path: Path) -> TiffFacts:
    return tiff_facts(path, str(path)) if path.suffix.lower() in TIFF_SUFFIXES else TiffFacts()


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


def _choice(facts: TiffFacts, channel: int | None, path: Path) -> int:
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
    tiff = path.suffix.lower() in TIFF_SUFFIXES
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


_SAMPLE_PIXELS = 1 << 22
"""Percentiles of larger images are taken from about as many pixels, every k-th by row and column."""


class NetworkView:
    """What the network sees of an image.

    Args:
        source: The image.
        normalization: How its grey values are stretched; decided by the whole image, read once for it.
        scale: Pixels of the network a pixel of the image.

    Attributes:
        source: The image.
        scale: Pixels of the network a pixel of the image.
        shape: Height and width in the network's pixels.
    """

    def __init__(self, source: ImageSource, normalization: NormalizationOptions, scale: float = 1.0) -> None:
        self.source = source
        self.scale = scale
        sample = _sample_of(source)
        self._stretch = stretch_of(sample, source.name)
        self._table = normalization_table(histogram_of(rgb8(sample, self._stretch)), normalization)
        self.shape = (max(1, round(source.height * scale)), max(1, round(source.width * scale)))

    @property
    def source_shape(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.source.height, self.source.width

    def rgb(self, rows: slice, columns: slice) -> RgbImage:
        """Pixels of the image itself, h x w x 3, of 8 bits but not normalised: for pictures."""
        return rgb8(self.source.read(rows, columns), self._stretch)

    def read(self, rows: slice, columns: slice) -> RgbImage:
        """Pixels as the network sees them, h x w x 3."""
        if self.scale == 1:
            return np.asarray(self._table[self.rgb(rows, columns)])
        first, last = self._needed(rows, self.source.height), self._needed(columns, self.source.width)
        pixels = self._table[self.rgb(first, last)]
        if self.scale < 1:  # what is finer than the new pixels would become noise
            pixels = cv2.GaussianBlur(pixels, (0, 0), 0.5 / self.scale)
        shape = rows.stop - rows.start, columns.stop - columns.start
        offset = rows.start / self.scale - first.start, columns.start / self.scale - last.start
        return np.asarray(_resampled(pixels, shape, 1 / self.scale, offset), np.uint8)

    def back(self, values: NDArray[np.float32], covering: Region, wanted: Region) -> NDArray[np.float32]:
        """The network's values at the image's own pixels.

        Args:
            values: h x w x C, at `covering`.
            covering: The region in the network's pixels, from `covering`.
            wanted: The region of the image.
        """
        if self.scale == 1:
            return values
        down = wanted.rows.start * self.scale - covering.rows.start
        across = wanted.columns.start * self.scale - covering.columns.start
        return np.asarray(_resampled(values, wanted.shape, self.scale, (down, across)), np.float32)

    def covering(self, wanted: Region) -> Region:
        """The region of the network's pixels that covers one of the image."""
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
    """Sample pixels (h x w x C) on another grid, bilinearly; beyond the edge they go on as they end.

    Pixel i of the result has its centre at (i + 0.5) * step + offset - 0.5 of the input, by rows and by columns.
    """
    dy, dx = (value + step / 2 - 0.5 for value in offset)
    matrix = np.array([[step, 0, dx], [0, step, dy]], np.float64)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    found = cv2.warpAffine(pixels, matrix, shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(found).reshape(*shape, -1)


def _sample_of(source: ImageSource) -> NDArray[np.generic]:
    """Every k-th pixel by row and column, h x w x channels; every pixel of small images."""
    every = max(1, int(np.sqrt(source.height * source.width / _SAMPLE_PIXELS)))
    columns = slice(0, source.width)
    return np.concatenate([source.read(rows, columns)[::every, ::every] for rows in source.bands(every)])
