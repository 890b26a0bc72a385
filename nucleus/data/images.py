"""Decoding of images and masks: images of any depth to 8-bit RGB, masks to integer labels; and kinds of images."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.data.normalization import intensity_sample, rgb8, stretch_of
from nucleus.errors import ImageError

__all__ = [
    "IMAGE_SUFFIXES",
    "Kind",
    "colours_of",
    "decode_image",
    "decode_raw",
    "encode_png",
    "kind_of",
    "labels_from_binary",
    "labels_from_label_image",
    "labels_from_masks",
    "to_rgb8",
]


IMAGE_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".webp"})
_MAX_LABELS = np.iinfo(np.uint16).max

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
    as `nucleus.data.normalization` describes.

    Raises:
        ImageError: Wrong number of dimensions or channels, or values that are not finite.
    """
    colours = colours_of(raw, name)
    return rgb8(colours, stretch_of(intensity_sample(colours, name=name)))


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


def labels_from_masks(masks: Iterable[tuple[str, bytes]], shape: tuple[int, int]) -> LabelImage:
    """Merge one binary mask per nucleus to labels 1..K; where masks overlap, the first one keeps the pixel.

    Args:
        masks: Name and file content of each mask, in the order of the labels.
        shape: Height and width of the image.

    Raises:
        ImageError: A mask cannot be read, or has another size than the image.
    """
    labels = np.zeros(shape, np.uint16)
    count = 0
    for name, data in masks:
        mask = _foreground(_one_channel(decode_raw(data, name), name))
        _check_size(mask, shape, name)
        mask &= labels == 0
        if mask.any():
            count += 1
            _check_count(count, name)
            labels[mask] = count
    return labels


def labels_from_binary(data: bytes, name: str, shape: tuple[int, int]) -> LabelImage:
    """Label the connected components (8-connectivity) of a binary mask. Raises `ImageError`."""
    mask = _foreground(_one_channel(decode_raw(data, name), name))
    _check_size(mask, shape, name)
    count, components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    _check_count(count - 1, name)
    return np.asarray(components).astype(np.uint16)


def labels_from_label_image(data: bytes, name: str, shape: tuple[int, int]) -> LabelImage:
    """Read an integer label image and renumber its labels 1..K in the order of their values.

    Raises:
        ImageError: More than one channel, values that are not integers or are negative, or another size than the image.
    """
    raw = _one_channel(decode_raw(data, name), name)
    _check_size(raw, shape, name)
    if not np.isfinite(raw).all() or (raw < 0).any() or (raw != np.rint(raw)).any():
        raise ImageError(f"Expected integers of at least 0 as labels in {name}; found other values ({raw.dtype}).")
    values, inverse = np.unique(raw, return_inverse=True)
    offset = 0 if values[0] == 0 else 1
    _check_count(len(values) - 1 + offset, name)
    return (inverse.reshape(raw.shape) + offset).astype(np.uint16)


def encode_png(pixels: NDArray[Any]) -> bytes:
    """Encode 8-bit RGB (H x W x 3) or grey or 16-bit labels (H x W) as PNG. Raises `ImageError` for other pixels."""
    stored = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    done, data = cv2.imencode(".png", stored)
    if not done:
        raise ImageError(f"Expected pixels that PNG can store; found shape {pixels.shape} and type {pixels.dtype}.")
    return bytes(data)


def _one_channel(raw: NDArray[Any], name: str) -> NDArray[Any]:
    if raw.ndim == 2:
        return raw
    colours = raw[..., :1] if raw.shape[2] <= 2 else raw[..., :3]
    if (colours != colours[..., :1]).any():
        raise ImageError(f"Expected one channel in the mask {name}; found {raw.shape[2]} that differ.")
    return np.asarray(colours[..., 0])


def _foreground(mask: NDArray[Any]) -> NDArray[np.bool_]:
    """Return the pixels above half of the maximum, which suits 0/1 and 0/255 masks, also after lossy compression."""
    return np.asarray(mask > mask.max() / 2)


def _check_size(mask: NDArray[Any], shape: tuple[int, int], name: str) -> None:
    if mask.shape[:2] != shape:
        raise ImageError(
            f"Expected the mask {name} to be as large as its image, {shape[1]} x {shape[0]} px (width x height); "
            f"found {mask.shape[1]} x {mask.shape[0]}."
        )


def _check_count(count: int, name: str) -> None:
    if count > _MAX_LABELS:
        raise ImageError(f"Expected at most {_MAX_LABELS} nuclei in one image ({name}). Cut it into tiles first.")


def kind_of(image: RgbImage) -> Kind:
    """Return the kind of an image (H x W x 3, uint8), from the median of its grey values and its colourfulness.

    Colourfulness is the mean over all pixels of the difference between the largest and the smallest channel.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if float(np.median(grey)) < _BRIGHT_MEDIAN:
        return Kind.DARK_FIELD
    colourfulness = float((image.max(axis=2).astype(np.int16) - image.min(axis=2)).mean())
    return Kind.STAIN if colourfulness >= _COLOURFUL else Kind.BRIGHT_FIELD
