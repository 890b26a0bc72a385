"""Ranges of intensities: from any depth to 8 bits, and from 8 bits to what the network sees.

Two steps use one rule. Import and prediction stretch images of more than 8 bits to 8 bits (`stretch_of`, `rgb8`).
Training and prediction then normalize the 8-bit image with the options of the model (`normalize`). The rule, `robust`:

1. The range goes from the low to the high percentile of all channels together, so that colours keep their proportions.
   Hot pixels do not count: each pixel is replaced by the median of its 3 x 3 neighbours first.
2. If less than the rest is brighter than the background, the 99th percentile of what is brighter is the upper end: one
   nucleus in a large field is enough. The same holds for dark nuclei on a bright field.
3. A few objects at least three times as bright as all others, on at most 2 % of the image, are debris: they do not
   count, and are clipped. If they are flat, as saturated blocks and borders are, they may cover up to 20 %.
4. The range is at least `noise` standard deviations of the noise, so that an image of noise alone has no contrast. The
   noise is the standard deviation in the flattest blocks of the image (20th percentile over blocks of 8 x 8 px). Where
   the values are normally distributed, all is noise, also if neighbouring pixels are alike.

Each step follows the offset and the gain of the camera, so the depth in which an image is stored does not decide what
is found. `docs/segmentation.md` has the measurements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.errors import ImageError

__all__ = [
    "BLOCK",
    "IntensitySample",
    "Stretch",
    "intensity_sample",
    "joined_samples",
    "noise_and_range",
    "noise_left",
    "normalization_table",
    "normalize",
    "rgb8",
    "stretch_of",
    "stretched_sample",
]

_LEVELS = 256
_FULL_RANGE = 255
_DEPTH_OPTIONS = NormalizationOptions(low=0.1, high=99.9, smallest_range=1)
"""Options of the stretch to 8 bits: wider than those of a model, which normalizes the result."""
BLOCK = 8
"""Side of the blocks in which noise is measured, px."""
_FLATTEST = 20
_MOST_BLOCKS = 1 << 16
_WIDE_BLOCK, _FLATTEST_WIDE, _WIDE_FACTOR = 24, 5, 1.25
"""Side of the blocks in which the noise of smoothed images is measured, px; the percentile that is taken; and the mean
deviation of noise alone as a multiple of it."""
_BLURRED_FACTOR = 2.0
"""Blurred noise looks more like nuclei than noise of single pixels does."""
_NORMAL_SKEWNESS = 0.4
_NORMAL_KURTOSIS = 0.8
"""Largest differences to a normal distribution; no image of DSB2018 is below .6 and 1."""
_CLEAR_OF_BACKGROUND = 4.0
"""Pixels this many standard deviations of the noise above the low percentile are foreground."""
_FOREGROUND_PERCENT = 99
_MUCH_FOREGROUND = 0.2
"""Where more than this share is foreground, the high percentile of the image lies in it, and the rule need not look."""
_SMALLEST_AREA = 12
"""Of foreground, px."""
_OBJECT_AREA = 50
"""Objects smaller than this say nothing about debris, px."""
_DEBRIS_FACTOR = 3.0
_DEBRIS_SHARE = 0.02
"""Debris covers at most this share of the image."""
_FLAT_SHARE = 0.2
"""Flat debris covers at most this share: more, and the flattest blocks no longer show the noise."""
_FLAT = 0.6
"""At least this share of the pixels of flat debris, and of nuclei that touch it, has the highest value of the image."""
_CLEAR_OF_NOISE = 20.0
"""Debris is told from objects this many standard deviations above the background, not from specks of noise."""
_BRIGHT_FIELD_FACTOR = 10
"""In a bright field, dark foreground has at least this many times the area of bright foreground."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Stretch:
    """Linear stretch of intensities to 0..255.

    Attributes:
        low: Intensity that is mapped to 0.
        high: Intensity that is mapped to 255.
    """

    low: float
    high: float


@dataclass(frozen=True)
class IntensitySample:
    """Pixels of an image from which its range is derived.

    Attributes:
        raw: Every k-th pixel by row and column, h x w x C.
        values: The same pixels without hot pixels (median of 3 x 3 px of the image), h x w x C.
        blocks: Blocks of 8 x 8 px of one channel, N x 64.
        area: Pixels of the image per pixel of the sample, k * k.
    """

    raw: NDArray[Any]
    values: NDArray[Any]
    blocks: NDArray[Any]
    area: int = 1


def intensity_sample(pixels: NDArray[Any], every: int = 1, name: str = "image") -> IntensitySample:
    """Return the sample of an image, or of a band of its rows.

    Args:
        pixels: H x W x C, of any depth.
        every: Distance of the pixels of the sample, by row and column.
        name: Name of the image in error messages.

    Raises:
        ImageError: Some values are not finite.
    """
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ImageError(f"Expected finite values in {name}; found NaN or infinity. Replace them first.")
    if (pixels == pixels[..., :1]).all():  # grey
        pixels = pixels[..., :1]
    return IntensitySample(
        pixels[::every, ::every], _without_hot_pixels(pixels, every), _blocks(pixels, every), every * every
    )


def joined_samples(samples: Iterable[IntensitySample]) -> IntensitySample:
    """Return the sample of an image from those of its bands, from the top."""
    parts = list(samples)
    channels = max(part.raw.shape[2] for part in parts)

    def joined(pixels: list[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([np.broadcast_to(each, (*each.shape[:2], channels)) for each in pixels])

    raw, values = joined([part.raw for part in parts]), joined([part.values for part in parts])
    return IntensitySample(raw, values, np.concatenate([part.blocks for part in parts]), parts[0].area)


def stretched_sample(sample: IntensitySample, stretch: Stretch | None) -> IntensitySample:
    """Return the sample of the image that `rgb8` makes of an image."""
    raw, values = _levels8(sample.raw, stretch), _levels8(sample.values, stretch)
    return replace(sample, raw=raw, values=values, blocks=_levels8(sample.blocks, stretch))


def stretch_of(sample: IntensitySample) -> Stretch | None:
    """Return the stretch that maps intensities of any depth to 0..255; None for integers that fit already."""
    raw = sample.raw
    if raw.dtype in (np.uint8, np.bool_):
        return None
    if np.issubdtype(raw.dtype, np.integer) and raw.min() >= 0 and raw.max() <= _FULL_RANGE:
        return None
    found = _robust_range(sample, _DEPTH_OPTIONS)
    if found.high > found.low:
        return found
    return Stretch(float(raw.min()), float(raw.max()))  # almost all pixels are equal


def rgb8(pixels: NDArray[Any], stretch: Stretch | None) -> NDArray[np.uint8]:
    """Convert grey or RGB of any depth (H x W x 1 or 3) to 8-bit RGB, H x W x 3."""
    found = _levels8(pixels, stretch)
    return np.ascontiguousarray(np.repeat(found, 3, axis=2) if found.shape[2] == 1 else found)


def _levels8(pixels: NDArray[Any], stretch: Stretch | None) -> NDArray[np.uint8]:
    """Return pixels of any depth and shape, stretched, clipped and rounded to 8 bits."""
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * _FULL_RANGE
    if stretch is not None:
        scale = _FULL_RANGE / (stretch.high - stretch.low) if stretch.high > stretch.low else 0.0
        narrow = pixels.dtype in (np.uint16, np.int16, np.float32)
        kind: type[np.floating] = np.float32 if narrow else np.float64
        pixels = np.rint((pixels.astype(kind) - kind(stretch.low)) * kind(scale))
    if pixels.dtype != np.uint8:
        pixels = np.clip(pixels, 0, _FULL_RANGE)
    return np.asarray(pixels, np.uint8)


def normalization_table(
    sample: IntensitySample, options: NormalizationOptions, least_noise: float = 0.0
) -> NDArray[np.uint8]:
    """Return the table from old to new values (256, uint8) of an 8-bit image, from the sample of the whole image.

    Args:
        sample: The sample.
        options: Options of the model.
        least_noise: Standard deviation of the noise, if the sample shows less.
    """
    levels = np.arange(_LEVELS, dtype=np.float32)
    if options.method == "none":
        return levels.astype(np.uint8)
    robust = options.method == "robust"
    found = _robust_range(sample, options, least_noise) if robust else _percentile_range(sample.raw, options)
    scale = np.float32(_FULL_RANGE / max(found.high - found.low, options.smallest_range))
    return np.asarray(np.rint(np.clip((levels - np.float32(found.low)) * scale, 0, _FULL_RANGE)), np.uint8)


def normalize(image: NDArray[np.uint8], options: NormalizationOptions) -> NDArray[np.uint8]:
    """Normalize an image (H x W x 3, uint8)."""
    if options.method == "none":
        return image
    return np.asarray(normalization_table(intensity_sample(image), options)[image])


def noise_and_range(sample: IntensitySample) -> tuple[float, float]:
    """Return the standard deviation of the noise, and the range that the image would have without it."""
    found = _robust_range(sample, NormalizationOptions(noise=0.0))
    return _noise_of(sample), found.high - found.low


def noise_left(smoothed: IntensitySample) -> float:
    """Return the standard deviation of the noise that is left in a smoothed image, in which neighbours are alike.

    It is that of the flattest of blocks so large that they show it: the 5th percentile over blocks of 24 x 24 px.
    """
    blocks = _blocks(smoothed.values, 1, _WIDE_BLOCK)
    return _WIDE_FACTOR * _nearest_rank(blocks.astype(np.float32).std(axis=1), _FLATTEST_WIDE)


def _robust_range(sample: IntensitySample, options: NormalizationOptions, least_noise: float = 0.0) -> Stretch:
    """Return the range of the rule described in the docstring of this module."""
    noise = max(_noise_of(sample), least_noise)
    found = _percentile_range(sample.values, options)
    bright = _levels_above(sample.values, found.low)
    debris, foreground = _debris_and_foreground(bright, noise, sample.area)
    if debris.any():
        found = replace(found, high=_percentile_range(sample.values[~debris], options).high)
    high = found.high
    if foreground.any():
        high = max(high, found.low + _nearest_rank(bright[foreground], _FOREGROUND_PERCENT))
    low = min(found.low, _low_of_dark_nuclei(sample, noise))
    return Stretch(low, max(high, low + options.noise * noise))


def _percentile_range(values: NDArray[Any], options: NormalizationOptions) -> Stretch:
    """Return the low and the high percentile (nearest rank) of all channels together."""
    if values.dtype == np.uint8:
        below = np.cumsum(np.bincount(values.ravel(), minlength=_LEVELS))
        ranks = [max(int(below[-1]) * round(percent * 1000) // 100_000, 1) for percent in (options.low, options.high)]
        low, high = np.searchsorted(below, ranks)
        return Stretch(float(low), float(high))
    return Stretch(_nearest_rank(values, options.low), _nearest_rank(values, options.high))


def _nearest_rank(values: NDArray[Any], percent: float) -> float:
    """Return a percentile: the smallest value with at least `percent` of all values at or below it."""
    rank = max(values.size * round(percent * 1000) // 100_000, 1) - 1
    return float(np.partition(values.ravel(), rank)[rank])


def _noise_of(sample: IntensitySample) -> float:
    """Return the standard deviation of the noise: that of the flattest blocks, or of all values if all are noise."""
    blocks = sample.blocks
    wide = blocks.astype(np.float64 if blocks.dtype.itemsize > 2 else np.float32)
    noise = _nearest_rank(wide.std(axis=1), _FLATTEST)
    values = sample.values.astype(np.float64)
    if not _is_normal(values.mean(axis=2)):
        return noise
    return max(noise, _BLURRED_FACTOR * float(values.std(axis=(0, 1)).max()))


def _is_normal(values: NDArray[np.float64]) -> bool:
    """Return whether values are distributed as noise is: with the skewness (0) and the kurtosis (3) of a normal one."""
    centred = values - values.mean()
    square = centred * centred
    variance = square.mean()
    if variance == 0:
        return False
    skewness = (square * centred).mean() / variance**1.5
    kurtosis = (square * square).mean() / variance**2
    return bool(abs(skewness) < _NORMAL_SKEWNESS and abs(kurtosis - 3) < _NORMAL_KURTOSIS)


def _levels_above(values: NDArray[Any], low: float) -> Floats:
    """Return how far the brightest channel of each pixel is above a level, h x w."""
    return np.asarray(values.max(axis=2).astype(np.float64) - low, np.float32)


def _debris_and_foreground(bright: Floats, noise: float, area: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which pixels are debris, and which belong to other objects, if these are few (`_MUCH_FOREGROUND`)."""
    foreground = bright > _CLEAR_OF_BACKGROUND * noise
    highest = bright == bright.max()
    may_hold_debris = _stands_out(bright, bright.max())
    may_hold_flat_debris = may_hold_debris or _stands_out(bright[~highest], bright.max())
    nothing = np.zeros_like(foreground), np.zeros_like(foreground)
    if not may_hold_flat_debris and foreground.mean() > _MUCH_FOREGROUND:
        return nothing
    count, parts, facts, _ = cv2.connectedComponentsWithStats(foreground.astype(np.uint8), connectivity=8)
    areas = facts[:, cv2.CC_STAT_AREA] * area
    areas[0] = 0  # the background
    debris = np.zeros(count, np.bool_)
    if may_hold_flat_debris:
        objects = np.flatnonzero(areas >= _OBJECT_AREA)
        peaks = np.zeros(count, np.float32)
        np.maximum.at(peaks, parts[foreground].astype(np.intp), bright[foreground])
        found = objects[peaks[objects] >= _peak_of_debris(peaks[objects], noise)]
        flat = np.isin(parts[highest], found).sum() * area >= _FLAT * areas[found].sum()
        most = _FLAT_SHARE if flat else _DEBRIS_SHARE
        debris[found] = areas[found].sum() <= most * bright.size * area
    if not may_hold_debris and not debris.any() and foreground.mean() > _MUCH_FOREGROUND:
        return nothing
    return debris[parts], ((areas >= _SMALLEST_AREA) & ~debris)[parts]


def _stands_out(bright: Floats, highest: float) -> bool:
    """Return whether a level is so far above nearly all pixels that it may be debris."""
    return bool(bright.size and highest >= _DEBRIS_FACTOR * _nearest_rank(bright, 100 - 100 * _DEBRIS_SHARE))


def _peak_of_debris(peaks: Floats, noise: float) -> float:
    """Return the lowest peak of the objects that are debris; infinity if there are none."""
    ordered = np.sort(peaks)
    ours, next_higher = ordered[:-1], ordered[1:]
    below = np.arange(1, len(ordered))
    above = len(ordered) - below
    few = (above == 1) | (2 * above <= below)
    gaps = next_higher[few & (ours >= _CLEAR_OF_NOISE * noise) & (next_higher >= _DEBRIS_FACTOR * ours)]
    return float(gaps[0]) if len(gaps) else np.inf


def _low_of_dark_nuclei(sample: IntensitySample, noise: float) -> float:
    """Return the level of dark nuclei on a bright field; infinity in other images."""
    dark = sample.values.min(axis=2)
    middle = float(np.median(dark))
    margin = _CLEAR_OF_BACKGROUND * noise
    nuclei = dark < middle - margin
    brighter = np.count_nonzero(sample.values.max(axis=2) > middle + margin)
    found = np.count_nonzero(nuclei)
    if found * sample.area < _SMALLEST_AREA or found < _BRIGHT_FIELD_FACTOR * brighter:
        return np.inf
    return _nearest_rank(dark[nuclei], 100 - _FOREGROUND_PERCENT)


def _without_hot_pixels(pixels: NDArray[Any], every: int) -> NDArray[Any]:
    """Return the median of 3 x 3 px, per channel, of every k-th pixel by row and column."""
    if pixels.dtype == np.bool_:
        return pixels[::every, ::every]
    if pixels.dtype not in (np.uint8, np.uint16, np.float32):  # OpenCV has no median of other types
        offset = np.float64(pixels.min())
        near = (pixels.astype(np.float64) - offset).astype(np.float32)
        return _without_hot_pixels(near, every).astype(np.float64) + offset
    channels = (np.ascontiguousarray(channel) for channel in np.moveaxis(pixels, 2, 0))
    return np.stack([cv2.medianBlur(channel, 3)[::every, ::every] for channel in channels], axis=2)


def _blocks(pixels: NDArray[Any], every: int, side: int = BLOCK) -> NDArray[Any]:
    """Return blocks of `side` x `side` px (smaller in smaller images) of each channel, N x pixels of a block.

    Of large images it is every k-th block by row and column, at most about `_MOST_BLOCKS`.
    """
    height, width, channels = pixels.shape
    rows, columns = min(side, height), min(side, width)
    whole = pixels[: height // rows * rows, : width // columns * columns]
    divided = whole.reshape(height // rows, rows, width // columns, columns, channels)
    count = divided.shape[0] * divided.shape[2] * channels
    step = max(every, round((count / _MOST_BLOCKS) ** 0.5))
    return divided[::step, :, ::step].transpose(0, 2, 4, 1, 3).reshape(-1, rows * columns)
