"""What the stored pixels of a mask are: labels, or a binary mask. Their values decide, not the name of a folder."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import StoredImage
from nucleus.errors import ImageError
from nucleus.lazy import skimage

__all__ = ["SIMILAR_AREA", "SPECK_AREA", "MaskContent", "border_of", "content_of"]

SIMILAR_AREA = 0.25
"""A part of a nucleus counts as separate if its area is at least this fraction of the largest part."""
_DIVIDED = 0.25
"""Largest fraction of divided labels; in masks of classes, almost every value is divided."""
_PARTS = 2
"""Labels have fewer parts than this on average, the smallest ones included."""
_FLAT = 1 / 16
"""Largest range of the brightness, as a fraction of its maximum, in the neighbourhood of a pixel that is not on an
edge."""
_DARK, _BRIGHT = 0.1, 0.9
"""Flat areas of a binary mask are at most or at least this bright."""
_BLACK = 0.05
"""Largest brightness of the background, where smoothing, compression or a sigmoid left it above 0."""
_BETWEEN = 0.05
"""Largest area of other flat areas, as a fraction of the bright ones."""
_ONE_LEVEL = 0.01
"""If the pixels between dark and bright all have one value, it is a class of its own, unless they are fewer."""
_HOT = 1.25
_HOT_AREA = 4
"""Pixels this much brighter than 99 % of the foreground, in groups of at most this area, are defects."""
_HUE = 0.2
SPECK_AREA = 4
"""Nuclei have at least this area, px."""


@dataclass(frozen=True)
class MaskContent:
    """Content of a mask file.

    Attributes:
        numbers: H x W, int32, 0 background. Labels 1..K in the order of their values; 1 in a binary mask.
        binary: Whether it is a binary mask.
        divided: Number of labels with separate parts of similar size.
    """

    numbers: NDArray[np.int32]
    binary: bool
    divided: int = 0


@dataclass(frozen=True)
class _Levels:
    """Distinct values of a mask.

    Attributes:
        numbers: H x W, int32: 0 background, 1..`count` the other values in their order.
        count: Number of values besides the background.
        pixels: The mask, H x W x 1 or 3.
        background: Value of the background.
        text: The values in words.
    """

    numbers: NDArray[np.int32]
    count: int
    pixels: NDArray[Any]
    background: Any
    text: str

    @property
    def coloured(self) -> bool:
        """Whether the values are colours."""
        return bool(self.pixels.shape[2] > 1)

    def brightness(self) -> NDArray[np.float32]:
        """Return how far each pixel is above the background, by its brightest channel: H x W, float32."""
        return np.asarray(self.pixels.max(axis=2).astype(np.float32) - np.float32(self.background))


def content_of(stored: StoredImage, name: str) -> MaskContent:
    """Return what a mask holds.

    Two values are a binary mask. More are labels if each forms one area (fragments aside), and a binary mask if they
    are edges between dark and bright, as after smoothing or JPEG compression.

    Raises:
        ImageError: It can be neither: several pages or channels, no background, values that JPEG changed, classes
            instead of nuclei, noise.
    """
    if stored.pages > 1:
        raise ImageError(
            f"Expected one page in the mask {name}; found {stored.pages}. Save one label image, or put one file per "
            "nucleus into <id>/masks/."
        )
    pixels = _opaque(stored, name)
    if not np.isfinite(pixels).all():
        raise ImageError(f"Expected finite values in the mask {name}; found NaN or infinity. Set them to 0.")
    levels = _grey_levels(pixels, name) if pixels.shape[2] == 1 else _colour_levels(pixels, name)
    if levels.count <= 1:
        return MaskContent(levels.numbers, binary=True)
    areas = None if stored.lossy or not _are_integers(pixels) else _Areas.of(levels)
    if areas is not None and areas.are_labels(coloured=levels.coloured):
        return MaskContent(levels.numbers, binary=False, divided=areas.divided)
    mask = _without_edges(levels.brightness())
    if mask is None or not _one_hue(levels, mask):
        raise ImageError(_refusal(levels, areas, name, lossy=stored.lossy))
    return MaskContent(mask.astype(np.int32), binary=True)


def _opaque(stored: StoredImage, name: str) -> NDArray[Any]:
    """Return the grey or colour channels, H x W x 1 or 3, 0 where they are transparent; or alpha, if only it varies."""
    pixels, colours = stored.pixels, stored.pixels[..., : stored.colours]
    others = [pixels[..., i] for i in range(stored.colours, pixels.shape[2]) if i != stored.alpha]
    if any((other != other[:1, :1]).any() for other in others):
        raise ImageError(
            f"Expected one channel, or colours, in the mask {name}; found {pixels.shape[2]} channels that differ. Save "
            "the labels as a single channel."
        )
    if (colours == colours[..., :1]).all():
        colours = colours[..., :1]
    if stored.alpha is None:
        return np.asarray(colours)
    alpha = pixels[..., stored.alpha]
    if (alpha == alpha[0, 0]).all():
        return np.asarray(colours)
    seen = colours[alpha > 0]
    if (seen == seen[0]).all():
        return np.asarray(alpha[..., np.newaxis])
    return np.where(alpha[..., np.newaxis] > 0, colours, 0)


def _are_integers(pixels: NDArray[Any]) -> bool:
    return bool(pixels.dtype.kind in "bui" or (pixels == np.rint(pixels)).all())


def _grey_levels(pixels: NDArray[Any], name: str) -> _Levels:
    values, numbers, counts = _distinct(pixels[..., 0])
    background = _background(values, counts, name)  # the lowest value, so its number is 0
    text = f"{len(values)} values from {values[0]} to {values[-1]}"
    return _Levels(numbers, len(values) - 1, pixels, background, text)


def _distinct(pixels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int64]]:
    """Return the distinct values in order, the place of each pixel's value among them, and their counts."""
    if pixels.dtype.kind in "bu" and pixels.dtype.itemsize <= 2:  # counting is many times as fast as sorting
        counts = np.bincount(pixels.ravel(), minlength=256)
        found = np.flatnonzero(counts)
        place_of = np.zeros(len(counts), np.int32)
        place_of[found] = np.arange(len(found))
        if pixels.dtype.itemsize == 1:  # most masks; a sixth of the time of indexing
            return found, np.asarray(cv2.LUT(pixels.astype(np.uint8), place_of), np.int32), counts[found]
        return found, place_of[pixels.astype(np.intp)], counts[found]
    values, places, counts = np.unique(pixels, return_inverse=True, return_counts=True)
    return values, places.reshape(pixels.shape).astype(np.int32), counts


def _background(values: NDArray[Any], counts: NDArray[np.int64], name: str) -> Any:
    """Return the value of the background: 0 (almost, for probabilities), or an only negative value that covers more."""
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    negative = [value for value in found if value < 0]
    almost = not _are_integers(values) and values[0] <= _BLACK * values[-1]  # probabilities seldom reach 0
    if not negative and (0 in found or almost):
        return 0
    if len(negative) == 1 and found[negative[0]] > found.get(0, 0):
        return negative[0]
    if negative:
        raise ImageError(
            f"Expected 0 (or -1) as the background of the mask {name}, and labels above it; found values from "
            f"{values[0]} to {values[-1]}. Set what is no nucleus to 0."
        )
    raise ImageError(
        f"Expected a background of 0 in the mask {name}; found no pixel of 0, only values from {values[0]} to "
        f"{values[-1]}. Set what is no nucleus to 0."
    )


def _colour_levels(colours: NDArray[Any], name: str) -> _Levels:
    if colours.dtype.kind != "u" or colours.dtype.itemsize > 2:
        raise ImageError(
            f"Expected colours of 8 or 16 bits in the mask {name}; found {colours.dtype}. Save the labels as a single "
            "channel of integers."
        )
    red, green, blue = (colours[..., i].astype(np.int64) for i in range(3))
    values, numbers, _ = _distinct((red << 32) | (green << 16) | blue)
    if values[0] != 0:
        raise ImageError(
            f"Expected a black background in the mask {name}; found {len(values)} colours, none of them black. Make "
            "what is no nucleus black."
        )
    return _Levels(numbers, len(values) - 1, colours, 0, f"{len(values)} colours")


@dataclass(frozen=True)
class _Areas:
    """Connected areas of equal value (8-connectivity), besides the background.

    Attributes:
        values: Number of values.
        areas: Number of areas.
        specks: Number of areas under 4 px.
        solid: Number of values that fill a square of 2 x 2 px somewhere, or that the image's border cuts; those of
            noise and of edges do not.
        divided: Number of values with two or more areas of similar size.
    """

    values: int
    areas: int
    specks: int
    solid: int
    divided: int

    @classmethod
    def of(cls, levels: _Levels) -> "_Areas":
        """Measure the areas of all values."""
        numbers = levels.numbers
        areas = skimage.measure.label(numbers, background=0, connectivity=2)
        sizes = np.bincount(areas.ravel())
        owner = np.zeros(len(sizes), np.int64)
        owner[areas.ravel()] = numbers.ravel()
        sizes, owner = sizes[1:], owner[1:]
        largest = np.zeros(levels.count + 1, np.int64)
        np.maximum.at(largest, owner, sizes)
        parts = np.bincount(owner[sizes >= SIMILAR_AREA * largest[owner]])
        specks, divided = np.count_nonzero(sizes < SPECK_AREA), np.count_nonzero(parts > 1)
        return cls(levels.count, len(sizes), int(specks), _count_solid(numbers), int(divided))

    @property
    def are_classes(self) -> bool:
        """Whether these are solid areas, as labels are, but more of them than values."""
        return self.areas > self.values and 2 * self.specks < self.areas and 2 * self.solid > self.values

    def are_labels(self, *, coloured: bool) -> bool:
        """Return whether each value is a nucleus. A colour that occurs in several places may be that of several."""
        divided = 0 if coloured else _DIVIDED * self.values
        is_solid = 2 * self.solid > self.values
        return is_solid and self.areas < _PARTS * self.values and self.divided <= divided


def _count_solid(numbers: NDArray[np.int32]) -> int:
    first = numbers[:-1, :-1]
    same = (first == numbers[1:, 1:]) & (first == numbers[1:, :-1]) & (first == numbers[:-1, 1:])
    return int(np.count_nonzero(np.unique(np.concatenate([first[same], border_of(numbers)]))))


def border_of(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return the pixels of an image's border, each once."""
    return np.concatenate([pixels[0], pixels[1:, -1], pixels[-1, :-1], pixels[1:-1, 0]])


def _without_edges(brightness: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    """Return a binary mask from one with soft edges; None if it has flat areas that are neither dark nor bright."""
    hot = _hot_pixels(brightness)
    scaled = np.minimum(brightness / brightness[~hot].max(), 1).astype(np.float32)
    scaled[hot] = 0
    mask = scaled >= 1 / 2
    between = scaled[(scaled > _DARK) & (scaled < _BRIGHT)]
    if len(between) > _ONE_LEVEL * np.count_nonzero(mask) and (between == between[0]).all():
        return None
    square = np.ones((3, 3), np.uint8)
    flat = scaled[cv2.dilate(scaled, square) - cv2.erode(scaled, square) <= _FLAT]
    dark, bright = flat[flat <= _DARK], flat[flat >= _BRIGHT]
    if not (len(dark) and len(bright)) or np.median(dark) > _BLACK:
        return None
    if len(flat) - len(dark) - len(bright) > _BETWEEN * len(bright):
        return None
    return np.asarray(mask | (hot & (cv2.blur(mask.astype(np.float32), (3, 3)) > 1 / 2)))


def _hot_pixels(brightness: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the single pixels that are much brighter than the foreground."""
    high = np.percentile(brightness[brightness > 0], 99, method="lower")
    hot = np.asarray(brightness > _HOT * high)
    _, _, statistics, _ = cv2.connectedComponentsWithStats(hot.astype(np.uint8), connectivity=8)
    is_defect = (statistics[1:, cv2.CC_STAT_AREA] <= _HOT_AREA).all()
    return hot if is_defect else np.zeros_like(hot)


def _one_hue(levels: _Levels, mask: NDArray[np.bool_]) -> bool:
    """Return whether the bright pixels of a mask have one colour, apart from edges."""
    if not levels.coloured:
        return True
    brightness = levels.brightness()
    seen = levels.pixels[mask & (brightness >= _BRIGHT * brightness.max())].astype(np.float32)
    hue = seen / seen.max(axis=1, keepdims=True)
    return bool((np.abs(hue - np.median(hue, axis=0)) > _HUE).any(axis=1).mean() <= _BETWEEN)


def _refusal(levels: _Levels, areas: _Areas | None, name: str, *, lossy: bool) -> str:
    if lossy:
        return (
            f"Expected labels or a binary mask in {name}; found {levels.text} after lossy compression (JPEG), which "
            "changes labels. Save the labels as PNG or TIFF."
        )
    if areas is not None and areas.are_classes:
        return (
            f"Expected one value per nucleus in the mask {name}; found {levels.text}, which form {areas.areas} "
            "separate areas, as in a mask of classes. Give each nucleus a value of its own, or save one binary mask "
            "of all nuclei."
        )
    return (
        f"Expected labels (one value per nucleus) or a binary mask in {name}; found {levels.text} that are neither. "
        "Save the labels as integers without smoothing, or nuclei as 255 on 0."
    )
