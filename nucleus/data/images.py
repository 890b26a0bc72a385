"""Image files: their stored values, and images of any depth as 8-bit RGB; and kinds of images."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.names import Kind
from nucleus.data.normalization import intensity_sample, rgb8, stretch_of
from nucleus.data.pixel_files import Content, PixelFacts, PixelFile, seen_pixels
from nucleus.data.rasters import open_bmp, open_jpeg, open_png, open_webp
from nucleus.data.slides import is_slide, open_slide
from nucleus.data.stacks import Stack
from nucleus.data.tiff import open_tiff, open_tiff_stacks
from nucleus.errors import ImageError

__all__ = [
    "IMAGE_SUFFIXES",
    "StoredImage",
    "check_colours",
    "decode_image",
    "decode_pixels",
    "encode_png",
    "kind_of",
    "open_pixels",
    "open_stacks",
    "pixel_sum",
    "read_stored",
    "stored_pixels",
]


IMAGE_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".tf2", ".tf8", ".btf", ".lsm", ".jpg", ".jpeg", ".bmp", ".webp"})

_DECODERS = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), open_png),
    (re.compile(rb"\xff\xd8\xff"), open_jpeg),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), open_tiff),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), open_webp),
    (re.compile(rb"BM.{16}", re.DOTALL), open_bmp),
)
_OTHER_FORMATS = {
    "GIF": re.compile(rb"GIF8"),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    "HEIF or AVIF": re.compile(rb"....ftyp", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "Photoshop": re.compile(rb"8BPS"),
    "PDF": re.compile(rb"%PDF"),
    "SVG or XML": re.compile(rb"\s*<(svg|\?xml)"),
    "HDF5": re.compile(rb"\x89HDF"),
    "Zeiss CZI": re.compile(rb"ZISRAWFILE"),
    "Nikon ND2": re.compile(rb"\xda\xce\xbe\x0a"),
    "Leica LIF": re.compile(rb"\x70\0\0\0....\x2a", re.DOTALL),
    "Olympus OIB or Zeiss ZVI": re.compile(rb"\xd0\xcf\x11\xe0"),
    "Netpbm": re.compile(rb"P[1-7]\s"),
    "OpenEXR": re.compile(rb"v/1\x01"),
}
_HEAD = 32
_MOST_PIXELS = 1 << 30
"""Larger images are only read in parts."""

# In DSB2018 the medians of dark-field images are below 50, those of all others above 120; the colourfulness of grey
# images is 0, that of stained images above 11.
_BRIGHT_MEDIAN = 90.0
_COLOURFUL = 6.0

RgbImage = NDArray[np.uint8]
LabelImage = NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class StoredImage(PixelFacts):
    """The pixels of an image file as they are stored: not turned, not inverted, indices of a palette for its colours.

    Attributes:
        pixels: H x W x C, all stored channels (RGB order, then extra ones such as alpha), in the depth of the file.
    """

    pixels: NDArray[Any]


def open_pixels(content: Content, name: str) -> PixelFile:
    """Read the header of an image file, whatever its name.

    Args:
        content: A PNG, TIFF, JPEG, BMP or WebP file, or its bytes.
        name: Name of the file in messages.

    Raises:
        ImageError: The file is not such an image, is damaged, or has pixels of a kind that is not read.
        OSError: The file cannot be read.
    """
    head = _head(content)
    for pattern, decoder in _DECODERS:
        if pattern.match(head):
            return decoder(content, name)
    raise ImageError(_no_image(content, head, name))


def open_stacks(content: Content, name: str) -> list[Stack]:
    """Read the header of an image file as the images that it holds, each of one or more times and depths.

    Args:
        content: A PNG, TIFF, JPEG, BMP or WebP file, or its bytes. TIFF may be OME-TIFF, an ImageJ hyperstack or LSM.
            Also the file of a whole slide, but not its bytes.
        name: Name of the file in messages.

    Raises:
        ImageError: The file is not such an image, is damaged, is an animation, or has pixels of a kind that is not
            read.
        MissingPackageError: It is a whole slide, and OpenSlide is not installed.
        OSError: The file cannot be read.
    """
    if isinstance(content, Path) and is_slide(content):
        return [open_slide(content, name)]
    if _is_tiff(content):
        return open_tiff_stacks(content, name)
    file = open_pixels(content, name)
    if file.several is not None:
        raise ImageError(file.several)
    return [Stack(name=name, times=1, depths=1, plane=lambda _time, _depth: file)]


def _is_tiff(content: Content) -> bool:
    head = _head(content)
    return any(decoder is open_tiff and pattern.match(head) for pattern, decoder in _DECODERS)


def _head(content: Content) -> bytes:
    if not isinstance(content, Path):
        return content[:_HEAD]
    with content.open("rb") as file:
        return file.read(_HEAD)


def _no_image(content: Content, head: bytes, name: str) -> str:
    """Return why a file that no decoder knows is not an image."""
    if not head:
        return f"Expected an image in {name}; the file is empty (0 bytes)."
    other = next((kind for kind, pattern in _OTHER_FORMATS.items() if pattern.match(head)), None)
    if other is not None:
        return f"Expected a PNG, TIFF, JPEG, BMP or WebP image in {name}; found {other}. Convert it to PNG or TIFF."
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    return (
        f"Expected an image (PNG, TIFF, JPEG, BMP, WebP) in {name}; found {size} bytes of something else, or of a "
        "damaged image. Save it again from its source."
    )


def read_stored(data: bytes, name: str) -> StoredImage:
    """Read all pixels of an image file as they are stored; of several pages, those of the first image.

    Args:
        data: Content of a PNG, TIFF, JPEG, BMP or WebP file.
        name: Name of the file in messages; it decides nothing.

    Raises:
        ImageError: The file is not an image, is damaged, or has pixels of a kind that is not read.
    """
    return stored_pixels(open_pixels(data, name))


def stored_pixels(file: PixelFile) -> StoredImage:
    """Read all pixels of an opened image as they are stored. Raises `ImageError` if it is damaged or too large."""
    height, width, _ = file.shape
    if height * width > _MOST_PIXELS:
        raise ImageError(
            f"Expected at most {_MOST_PIXELS:,} px in {file.name}, which is read as a whole; found {width} x {height} "
            "(width x height). Cut it into tiles first."
        )
    pixels = np.empty(file.shape, file.dtype)
    file.fill(pixels)
    return StoredImage(pixels=pixels, **vars(file.facts))


def decode_image(data: bytes, name: str) -> RgbImage:
    """Decode an image file to RGB (`decode_pixels`). Raises `ImageError`."""
    return decode_pixels(open_pixels(data, name))


def decode_pixels(file: PixelFile) -> RgbImage:
    """Decode an opened image file to RGB as eyes see it, H x W x 3, uint8.

    Palettes are applied, white is high, alpha and extra channels are left out; see `rgb8` for other depths.

    Raises:
        ImageError: The file is not a single grey or RGB image, or is damaged.
    """
    name = file.name
    if file.several is not None:
        raise ImageError(file.several)
    if file.choose:
        channels = file.shape[2]
        raise ImageError(f"Expected a grey or RGB image in {name}; found {channels} channels. Save only one of them.")
    stored = stored_pixels(file)
    check_colours([stored.pixels], stored.colours, name, "Save channel {channel} as a grey image.")
    pixels = seen_pixels(stored.pixels, stored, name)
    return rgb8(pixels, stretch_of(intensity_sample(pixels, name=name)))


def check_colours(bands: Iterable[NDArray[Any]], colours: int, name: str, fix: str) -> None:
    """Raise `ImageError` if the image is in an alpha or extra channel: all colours are constant, but that one is not.

    Args:
        bands: Stored pixels in parts, h x w x C; read until colours vary, which is in the first one of most images.
        colours: Number of leading channels that are colour.
        name: Name of the file in messages.
        fix: What the message advises; `{channel}` in it becomes the number of the channel with the image.
    """
    first: NDArray[Any] | None = None
    other: set[int] = set()
    for band in bands:
        first = band[0, 0] if first is None else first
        varying = {channel for channel, value in enumerate(first) if (band[..., channel] != value).any()}
        if varying & set(range(colours)):
            return
        other |= varying
    if other:
        raise ImageError(
            f"Expected an image in the colours of {name}; they are the same in all pixels, but channel {min(other)} "
            f"(alpha or an extra one) is not. {fix.format(channel=min(other))}"
        )


def encode_png(pixels: NDArray[Any]) -> bytes:
    """Encode 8-bit RGB (H x W x 3) or grey or 16-bit labels (H x W) as PNG. Raises `ImageError` for other pixels."""
    stored = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    done, data = cv2.imencode(".png", stored)
    if not done:
        raise ImageError(f"Expected pixels that PNG can store; found shape {pixels.shape} and type {pixels.dtype}.")
    return bytes(data)


def pixel_sum(pixels: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's shape and values."""
    digest = hashlib.sha256(repr((pixels.shape, pixels.dtype.str)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def kind_of(image: RgbImage) -> Kind:
    """Return the kind of an image (H x W x 3, uint8), from the median of its grey values and its colourfulness.

    Colourfulness is the mean over all pixels of the difference between the largest and the smallest channel.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if float(np.median(grey)) < _BRIGHT_MEDIAN:
        return Kind.DARK_FIELD
    colourfulness = float((image.max(axis=2).astype(np.int16) - image.min(axis=2)).mean())
    return Kind.STAIN if colourfulness >= _COLOURFUL else Kind.BRIGHT_FIELD
