"""Decoding of images of any depth to 8-bit RGB, or to the values that are stored; and kinds of images."""

import io
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nucleus.errors import ImageError

__all__ = [
    "IMAGE_SUFFIXES",
    "Kind",
    "StoredImage",
    "Stretch",
    "colours_of",
    "decode_image",
    "decode_raw",
    "encode_png",
    "kind_of",
    "read_stored",
    "rgb8",
    "stretch_of",
    "to_rgb8",
]


IMAGE_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".webp"})
_FULL_RANGE = 255
# In DSB2018 the medians of dark-field images are below 50, those of all others above 120; the colourfulness of grey
# images is 0, that of stained images above 11.
_BRIGHT_MEDIAN = 90.0
_COLOURFUL = 6.0

RgbImage = NDArray[np.uint8]
LabelImage = NDArray[np.uint16]


class Kind(StrEnum):
    """Kind of microscope image."""

    DARK_FIELD = "dark-field"
    """Bright nuclei on a dark background: fluorescence."""
    BRIGHT_FIELD = "bright-field"
    """Grey nuclei on a bright background."""
    STAIN = "stain"
    """Coloured nuclei on a bright background: H&E and other stains."""


@dataclass(frozen=True)
class Stretch:
    """Linear stretch of intensities to 0..255.

    Attributes:
        low: Intensity that is mapped to 0.
        high: Intensity that is mapped to 255.
    """

    low: float
    high: float


def decode_raw(data: bytes, name: str) -> NDArray[Any]:
    """Decode an image file with OpenCV, unchanged: H x W or H x W x C, channels in OpenCV's order (BGR).

    Raises:
        ImageError: OpenCV cannot read the bytes as an image, or the image has no pixels.
    """
    if not data:
        raise ImageError(f"Expected an image in {name}; the file is empty (0 bytes).")
    try:
        raw = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ImageError(f"Expected an image in {name}; OpenCV cannot decode it: {error.err}.") from error
    if raw is None or raw.size == 0:
        raise ImageError(
            f"Expected an image (PNG, TIFF, JPEG, BMP, WebP) in {name}; found {len(data)} bytes of something else, "
            "or of a damaged image. Save it again from its source."
        )
    return np.asarray(raw)


def decode_image(data: bytes, name: str) -> RgbImage:
    """Decode an image file to RGB, H x W x 3, uint8. Raises `ImageError`."""
    return to_rgb8(decode_raw(data, name), name)


def to_rgb8(raw: NDArray[Any], name: str = "image") -> RgbImage:
    """Convert an image decoded by OpenCV to 8-bit RGB, H x W x 3.

    Grey values are repeated in three channels, and an alpha channel is dropped. Other depths than 8 bits are stretched
    as described in `stretch_of`.

    Raises:
        ImageError: Wrong number of dimensions or channels, or values that are not finite.
    """
    colours = colours_of(raw, name)
    return rgb8(colours, stretch_of(colours, name))


def colours_of(raw: NDArray[Any], name: str) -> NDArray[Any]:
    """Return the grey (H x W x 1) or RGB (H x W x 3) channels of an image decoded by OpenCV, in its own depth.

    Raises:
        ImageError: Wrong number of dimensions or channels.
    """
    if raw.ndim == 2:
        raw = raw[..., np.newaxis]
    if raw.ndim != 3 or not 1 <= raw.shape[2] <= 4:
        raise ImageError(f"Expected 1 to 4 channels in {name}; found an array of shape {raw.shape}.")
    return raw[..., :1] if raw.shape[2] <= 2 else raw[..., 2::-1]


def stretch_of(pixels: NDArray[Any], name: str = "image") -> Stretch | None:
    """Return the stretch that maps intensities of any depth to 0..255; None if they fit already.

    It goes from the 0.1st to the 99.9th percentile of all channels together, because cameras of 12 or 14 bits use only
    the lower part of 16 bits. Integers that fit into 8 bits are kept.

    Raises:
        ImageError: Some values are not finite.
    """
    if pixels.dtype in (np.uint8, np.bool_):
        return None
    if not np.isfinite(pixels).all():
        raise ImageError(f"Expected finite values in {name}; found NaN or infinity. Replace them first.")
    if np.issubdtype(pixels.dtype, np.integer) and pixels.min() >= 0 and pixels.max() <= _FULL_RANGE:
        return None
    low, high = (float(value) for value in np.percentile(pixels, (0.1, 99.9)))
    if high <= low:  # almost all pixels are equal
        low, high = float(pixels.min()), float(pixels.max())
    return Stretch(low, high)


def rgb8(pixels: NDArray[Any], stretch: Stretch | None) -> RgbImage:
    """Convert grey or RGB of any depth (H x W x 1 or 3) to 8-bit RGB, H x W x 3."""
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * _FULL_RANGE
    if stretch is not None:
        scale = _FULL_RANGE / (stretch.high - stretch.low) if stretch.high > stretch.low else 0.0
        pixels = np.rint((pixels.astype(np.float32) - np.float32(stretch.low)) * np.float32(scale))
    if pixels.dtype != np.uint8:
        pixels = np.clip(pixels, 0, _FULL_RANGE).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)


def encode_png(pixels: NDArray[Any]) -> bytes:
    """Encode 8-bit RGB (H x W x 3) or grey or 16-bit labels (H x W) as PNG. Raises `ImageError` for other pixels."""
    stored = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    done, data = cv2.imencode(".png", stored)
    if not done:
        raise ImageError(f"Expected pixels that PNG can store; found shape {pixels.shape} and type {pixels.dtype}.")
    return bytes(data)


def kind_of(image: RgbImage) -> Kind:
    """Return the kind of an image (H x W x 3, uint8), from the median of its grey values and its colourfulness.

    Colourfulness is the mean over all pixels of the difference between the largest and the smallest channel.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if float(np.median(grey)) < _BRIGHT_MEDIAN:
        return Kind.DARK_FIELD
    colourfulness = float((image.max(axis=2).astype(np.int16) - image.min(axis=2)).mean())
    return Kind.STAIN if colourfulness >= _COLOURFUL else Kind.BRIGHT_FIELD


@dataclass(frozen=True)
class StoredImage:
    """The pixels of an image file as they are stored: not turned, not inverted, indices of a palette, not its colours.

    Attributes:
        pixels: H x W x C, all stored channels (RGB order, then extra ones such as alpha), in the depth of the file.
        colours: Number of leading channels that are colour: 1 or 3; the others are alpha or extra channels.
        alpha: Index of the channel that the file declares as alpha, or None.
        palette: K x 3 RGB colours of a palette image, or None; `pixels` then has one channel of indices.
        white_is_zero: Whether 0 is white (TIFF's MINISWHITE).
        lossy: Whether the compression changed values.
        pages: Number of full-size pages in the file.
        orientation: Value of the Orientation tag, 1 if absent; the pixels are not turned by it.
    """

    pixels: NDArray[Any]
    colours: int = 1
    alpha: int | None = None
    palette: NDArray[Any] | None = None
    white_is_zero: bool = False
    lossy: bool = False
    pages: int = 1
    orientation: int = 1


def read_stored(data: bytes, name: str) -> StoredImage:
    """Decode an image file to the values that it stores. Raises `ImageError`."""
    if not data:
        raise ImageError(f"Expected an image in {name}; the file is empty (0 bytes).")
    try:
        return _stored_tiff(data) if data[:2] in (b"II", b"MM") else _stored_other(data)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ImageError(
            f"Expected an image (PNG, TIFF, JPEG, BMP, WebP) in {name}; found {len(data)} bytes of something else, "
            "or of a damaged image. Save it again from its source."
        ) from error


def _stored_tiff(data: bytes) -> StoredImage:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        pixels = page.asarray()
        if page.samplesperpixel > 1 and page.planarconfig == _SEPARATE:
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.ndim == 2:
            pixels = pixels[..., np.newaxis]
        colours = 3 if page.photometric in _COLOUR_PHOTOMETRICS else 1
        alphas = [colours + place for place, kind in enumerate(page.extrasamples) if kind in _ALPHA]
        orientation = page.tags.get(_ORIENTATION)
        return StoredImage(
            pixels=pixels,
            colours=colours,
            alpha=alphas[0] if alphas else None,
            palette=None if page.colormap is None else np.asarray(page.colormap).T,
            white_is_zero=page.photometric == 0,
            lossy=page.compression in _LOSSY,
            pages=sum(each.shape[:2] == page.shape[:2] for each in file.pages),
            orientation=1 if orientation is None else int(orientation.value),
        )


def _stored_other(data: bytes) -> StoredImage:
    with Image.open(io.BytesIO(data)) as file:
        palette = np.reshape(file.getpalette() or [], (-1, 3)).astype(np.uint8) if file.mode == "P" else None
        deep = file.mode == "RGB" and file.format == "PNG"
        pixels = decode_raw(data, "")[..., ::-1] if deep else np.asarray(file)
        if pixels.ndim == 2:
            pixels = pixels[..., np.newaxis]
        return StoredImage(
            pixels=pixels,
            colours=3 if pixels.shape[2] > 2 else 1,
            alpha=pixels.shape[2] - 1 if file.mode in ("LA", "RGBA") else None,
            palette=palette,
            lossy=file.format == "JPEG",
            orientation=int(file.getexif().get(_ORIENTATION, 1)),
        )


_SEPARATE, _ORIENTATION = 2, 274
_COLOUR_PHOTOMETRICS = (2, 6)
_ALPHA = (1, 2)
_LOSSY = (6, 7)
