"""Images as the network sees them (`ScaledImage`): normalised, and rescaled from the level of the file that fits."""

from copy import copy

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.illumination import uneven_light
from nucleus.data.images import RgbImage
from nucleus.data.normalization import (
    BLOCK,
    IntensitySample,
    intensity_sample,
    joined_samples,
    noise_and_range,
    noise_left,
    normalization_table,
    rgb8,
    stretch_of,
    stretched_sample,
)
from nucleus.data.pixel_files import ReadPart
from nucleus.model.tiling import Region
from nucleus.predict.source import ImageSource, SourceLevel

__all__ = ["ScaledImage"]

_SAMPLE_PIXELS = 1 << 22
"""Percentiles of larger images are taken from about this many pixels, every k-th by row and column."""

_STRONG_NOISE = 0.04
"""Part of the range above which noise is smoothed; no image of DSB2018 is above .038."""
_MOST_SMOOTHING = 3.0
_LEAST_SMOOTHING = 0.5
"""Standard deviation below which a Gaussian changes next to nothing: reduced levels have averaged the noise, px."""


class ScaledImage:
    """An image as the network sees it: normalised and rescaled.

    If the image is reduced and its file has reduced copies, they are looked at, so that fewer pixels are read.

    Grey values are stretched to a range of the whole image, which is read once for that purpose. For 8-bit RGB images
    below 4096 x 4096 px the result is identical, to the bit, to `nucleus.data.normalization.normalize`, which training
    uses; for larger images the range is that of a sample. Before, light that is clearly uneven is evened and, if
    asked for, an image in which noise is strong is smoothed, by the median of 3 x 3 px and a Gaussian.

    Args:
        source: The image.
        normalization: Options of the stretch of grey values.
        scale: Network pixels per image pixel.
        as_is: Whether uneven light (`nucleus.data.illumination`) stays.
        denoise: Whether strong noise is smoothed.

    Attributes:
        source: The image.
        light: The uneven light that the network does not see; None if it is even.
        smoothing: Standard deviation of the Gaussian that the image is smoothed by, px; 0 for none.
        scale: Network pixels per image pixel.
        shape: Height and width in network pixels.
        values: Network values of the whole image, h x w x channels, if they are known already; else None.

    Raises:
        ImageError: The image is damaged, or has values that are not finite.
    """

    def __init__(
        self,
        source: ImageSource,
        normalization: NormalizationOptions,
        scale: float = 1.0,
        *,
        as_is: bool = False,
        denoise: bool = False,
    ) -> None:
        self.source = source
        sample = _sample_of(source, source.read)
        self._stretch = stretch_of(sample)
        sample = stretched_sample(sample, self._stretch)
        self.light = None if as_is else uneven_light(sample.values, self.source_shape)
        self.smoothing = _smoothing(*noise_and_range(sample)) if denoise else 0.0
        if self.light is not None or self.smoothing:
            sample = _sample_of(source, self._restored)
        self._table = normalization_table(sample, normalization, noise_left(sample) if self.smoothing else 0.0)
        self._scale_to(scale)

    def _scale_to(self, scale: float) -> None:
        self.scale = scale
        self.shape = (max(1, round(self.source.height * scale)), max(1, round(self.source.width * scale)))
        self.values: NDArray[np.float32] | None = None

    def at(self, scale: float, part: Region | None = None) -> "ScaledImage":
        """Return the image at another scale, or a part of it (in image pixels), with the grey values of the whole."""
        other = copy(self)
        if part is not None and part != self.whole:
            other.source = self.source.cropped(part)
            other.light = self.light and self.light.part(part.rows.start, part.columns.start)
        other._scale_to(scale)
        return other

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

    def _restored(self, rows: slice, columns: slice, level: SourceLevel | None = None) -> RgbImage:
        """Return pixels of the image, or of a level, smoothed and with even light, not normalised or rescaled."""
        level = level or self.source.level_at(1.0)
        sigmas = [self.smoothing / step for step in level.steps]
        parts = (rows, columns)
        grown = list(map(_grown, parts, sigmas, level.shape))
        pixels = rgb8(level.read(*grown), self._stretch)
        if min(sigmas) >= _LEAST_SMOOTHING:
            pixels = cv2.GaussianBlur(cv2.medianBlur(pixels, 3), (0, 0), sigmas[1], sigmaY=sigmas[0])
        first, last = (part.start - wider.start for part, wider in zip(parts, grown, strict=True))
        pixels = pixels[first : first + rows.stop - rows.start, last : last + columns.stop - columns.start]
        if self.light is None:
            return pixels
        row, column = (
            part.start * step - corner for part, step, corner in zip(parts, level.steps, level.corner, strict=True)
        )
        return self.light.even(pixels, row, column, level.steps)

    def read(self, rows: slice, columns: slice) -> RgbImage:
        """Return network pixels, h x w x 3, uint8, normalised."""
        if self.scale == 1:
            return np.asarray(self._table[self._restored(rows, columns)])
        level = self.source.level_at(self.scale)
        scales = self.scale * level.steps[0], self.scale * level.steps[1]
        corner = level.corner[0] / level.steps[0], level.corner[1] / level.steps[1]
        first, last = map(_needed, (rows, columns), scales, corner, level.shape)
        pixels = self._table[self._restored(first, last, level)]
        if min(scales) < 1:  # prevents aliasing
            sigmas = (0.5 / scales[1], 0.5 / scales[0])
            pixels = cv2.GaussianBlur(pixels, (0, 0), *sigmas)
        shape = rows.stop - rows.start, columns.stop - columns.start
        offset = (
            rows.start / scales[0] + corner[0] - first.start,
            columns.start / scales[1] + corner[1] - last.start,
        )
        return np.asarray(_resampled(pixels, shape, (1 / scales[0], 1 / scales[1]), offset), np.uint8)

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
        return np.asarray(_resampled(values, wanted.shape, (self.scale, self.scale), (down, across)), np.float32)

    def covering(self, wanted: Region) -> Region:
        """Return the region in network pixels that covers a region in image pixels."""
        if self.scale == 1:
            return wanted
        return Region(self._cover(wanted.rows, self.shape[0]), self._cover(wanted.columns, self.shape[1]))

    def _cover(self, part: slice, length: int) -> slice:
        first, last = int(part.start * self.scale) - 2, int(part.stop * self.scale) + 3
        return slice(max(0, first), min(length, last))


def _smoothing(noise: float, full: float) -> float:
    """Return the standard deviation of the Gaussian for the noise and the range of an image, px; 0 for weak noise."""
    share = noise / max(full, 1.0)
    return min(_MOST_SMOOTHING, 1 + 5 * share) if share > _STRONG_NOISE else 0.0


def _grown(part: slice, sigma: float, length: int) -> slice:
    """Return the pixels along one axis that a median and a Gaussian need for a part of them."""
    margin = int(np.ceil(3 * sigma)) + 2 if sigma else 0
    return slice(max(0, part.start - margin), min(length, part.stop + margin))


def _needed(part: slice, scale: float, corner: float, length: int) -> slice:
    """Return the pixels of a level that network pixels are computed from, along one axis.

    Args:
        part: Network pixels.
        scale: Network pixels per pixel of the level.
        corner: Place of the first network pixel in the level, px.
        length: Length of the level, px.
    """
    margin = 2 + round(2 / scale)
    first, last = int(part.start / scale + corner) - margin, int(part.stop / scale + corner) + margin
    return slice(min(max(0, first), length - 1), max(1, min(length, last)))


def _resampled(
    pixels: NDArray[np.generic], shape: tuple[int, int], steps: tuple[float, float], offset: tuple[float, float]
) -> NDArray[np.generic]:
    """Resample pixels (h x w x C) to another grid by bilinear interpolation; edge pixels are repeated outside.

    Pixel i of the result has its centre at (i + 0.5) * step + offset - 0.5 of the input, by rows and by columns.
    """
    dy, dx = (value + step / 2 - 0.5 for value, step in zip(offset, steps, strict=True))
    matrix = np.array([[steps[1], 0, dx], [0, steps[0], dy]], np.float64)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    found = cv2.warpAffine(pixels, matrix, shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(found).reshape(*shape, -1)


def _sample_of(source: ImageSource, read: ReadPart) -> IntensitySample:
    """Return a sample of every k-th pixel by row and column that `read` returns; of all pixels of small images."""
    every = max(1, int(np.sqrt(source.height * source.width / _SAMPLE_PIXELS)))
    columns = slice(0, source.width)
    bands = source.bands(every * BLOCK)
    return joined_samples(intensity_sample(read(rows, columns), every, source.name) for rows in bands)
