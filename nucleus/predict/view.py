"""An image as the network sees it: of 8 bits, stretched, at the scale that the network was trained on."""

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.images import RgbImage, rgb8, stretch_of
from nucleus.data.normalization import histogram_of, normalization_table
from nucleus.model.tiling import Region
from nucleus.predict.sources import ImageSource

__all__ = ["NetworkView"]

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
        sample = _sample(source)
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


def _sample(source: ImageSource) -> NDArray[np.generic]:
    """Every k-th pixel by row and column, h x w x channels; every pixel of small images."""
    every = max(1, int(np.sqrt(source.height * source.width / _SAMPLE_PIXELS)))
    columns = slice(0, source.width)
    return np.concatenate([source.read(rows, columns)[::every, ::every] for rows in source.bands(every)])
