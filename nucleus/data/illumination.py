"""Uneven light: recognised in an image, and evened for the network.

Two kinds, told apart by which part of the image is smooth. Where the dark tenth of the grey values rises smoothly from
one side to the other, light was added, as haze and out-of-focus fluorescence do: it is subtracted. Where the bright
tenth does, light was lost, as in a bright field with a vignette: the image is divided by it.

The light is a polynomial of second degree (Likar et al. 2000, https://doi.org/10.1046/j.1365-2818.2000.00669.x), fitted
to percentiles of 8 x 8 blocks, in which single blocks full of nuclei count little. It is evened only if it explains
almost all of how these percentiles differ, and if it differs by almost as much as nuclei do from their background. So
most images stay as they are, to the bit; of the 531 of DSB2018, two are evened, which have haze. docs/models.md has
what it is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import RgbImage

__all__ = ["Illumination", "LightKind", "uneven_light"]

LightKind = Literal["haze", "shade"]

_BLOCKS = 8
_SMALLEST_SIDE = 64
"""Smaller images have too few pixels in a block."""
_MOST_PIXELS = 1 << 20
_PERCENT: dict[LightKind, float] = {"haze": 10, "shade": 90}
_EXPLAINED = 0.85
"""Smallest part of the variance between blocks that the polynomial explains; of DSB2018's even images at most .67."""
_LEAST_RANGE = 0.4
"""Smallest difference of the light within the image, as a part of the contrast of what is left."""
_LARGEST_REST = 0.085
"""Largest spread of the blocks around the polynomial, as a part of the same contrast: what is itself smooth and bright,
such as one blurred nucleus (.096 and more), is no light."""
_CONTRAST_PERCENT = 0.5
_ROUNDS = 6
_NO_VARIANCE, _ROUNDING = 1e-9, 1e-6
_FULL_RANGE = 255.0
_MOST_GAIN = 8.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Illumination:
    """The uneven light of an image, or of a part of it.

    Attributes:
        kind: `haze`, light that was added, or `shade`, light that was lost.
        coefficients: Of 1, x, y, xy, x² and y² (rows) for each of three channels (columns), which give grey values; x
            and y go from -1 to 1 over the whole image.
        shape: Height and width of the whole image, px.
        level: Grey value of each channel that the light gets everywhere.
        corner: Row and column of the image at which the part begins, px.
    """

    kind: LightKind
    coefficients: Floats
    shape: tuple[int, int]
    level: Floats
    corner: tuple[float, float] = (0.0, 0.0)

    def part(self, row: float, column: float) -> "Illumination":
        """Return the light of a part that begins at a row and a column of this one, px."""
        return replace(self, corner=(self.corner[0] + row, self.corner[1] + column))

    def even(
        self, pixels: RgbImage, row: float = 0, column: float = 0, steps: tuple[float, float] = (1.0, 1.0)
    ) -> RgbImage:
        """Return pixels with even light.

        Args:
            pixels: h x w x 3, uint8.
            row: Row of the first of them, image px from the corner of the part.
            column: Column of the first of them.
            steps: Image px per pixel, by rows and by columns.

        Returns:
            The same shape, uint8.
        """
        corner, height, width = (self.corner[0] + row, self.corner[1] + column), *pixels.shape[:2]
        y = 2 * (corner[0] + (np.arange(height) + 0.5) * steps[0]) / self.shape[0] - 1
        x = 2 * (corner[1] + (np.arange(width) + 0.5) * steps[1]) / self.shape[1] - 1
        light = (_terms(y, x) @ self.coefficients).astype(np.float32)
        level = self.level.astype(np.float32)
        if self.kind == "haze":
            found = pixels - light + level
        else:
            found = pixels * (level / np.maximum(light, level / _MOST_GAIN))
        return np.asarray(np.clip(np.rint(found), 0, _FULL_RANGE), np.uint8)


def uneven_light(values: NDArray[np.uint8], shape: tuple[int, int]) -> Illumination | None:
    """Return the light of an image if it is uneven, else None.

    Args:
        values: The image, or a regular sample of its pixels, h x w x C (1 or 3), uint8.
        shape: Height and width of the image, px.
    """
    every = max(1, int(np.sqrt(values.shape[0] * values.shape[1] / _MOST_PIXELS)))
    pixels = np.broadcast_to(values[::every, ::every], (*values[::every, ::every].shape[:2], 3))
    if min(pixels.shape[:2]) < _SMALLEST_SIDE:
        return None
    grey = pixels.mean(axis=2) if values.shape[2] > 1 else pixels[..., 0].astype(np.float64)
    blocks = dict(zip(_PERCENT, _percentiles(grey, list(_PERCENT.values())), strict=True))
    lights = {kind: _Light(found) for kind, found in blocks.items() if _may_explain(found)}
    kind = max(lights, key=lambda each: lights[each].explained, default=None)
    if kind is None or not lights[kind].is_uneven(grey):
        return None
    if kind == "haze":
        return _haze(pixels, shape)
    return _shade(pixels, lights[kind], shape)


def _may_explain(blocks: Floats) -> bool:
    """Return whether any polynomial explains enough: least squares explain most, and take a hundredth of the fit."""
    values = blocks.ravel() - blocks.mean()
    rest = values - _BASIS @ (_BASIS.T @ values)
    return bool(1 - rest @ rest / max(float(values @ values), _NO_VARIANCE * values.size) >= _EXPLAINED - _ROUNDING)


def _haze(pixels: NDArray[np.uint8], shape: tuple[int, int]) -> Illumination:
    """Return the haze of each channel; what is left of it everywhere is what leaves no pixel below 0."""
    percent = [_PERCENT["haze"]]
    lights = [_Light(*_percentiles(pixels[..., channel].astype(np.float64), percent)) for channel in range(3)]
    lowest = [
        np.percentile(pixels[..., channel] - light.at(pixels.shape[:2]), _CONTRAST_PERCENT)
        for channel, light in enumerate(lights)
    ]
    coefficients = np.stack([light.coefficients for light in lights], axis=1)
    return Illumination("haze", coefficients, shape, np.maximum(0.0, -np.array(lowest)))


def _shade(pixels: NDArray[np.uint8], light: "_Light", shape: tuple[int, int]) -> Illumination:
    """Return the shade, one for all channels, so that colours stay; the brightest place keeps its light, if it can."""
    found = light.at(pixels.shape[:2])
    highest = float(found.max())
    relative = pixels / np.maximum(found, highest / _MOST_GAIN)[..., np.newaxis]
    level = min(highest, _FULL_RANGE / max(float(np.percentile(relative, 100 - _CONTRAST_PERCENT)), 1e-6))
    return Illumination("shade", np.repeat(light.coefficients[:, np.newaxis], 3, axis=1), shape, np.full(3, level))


def _percentiles(grey: Floats, percents: Sequence[float]) -> Floats:
    """Return percentiles (first axis) of each block, all blocks of a size at once: a call of NumPy takes .1 ms."""
    found = np.empty((len(percents), _BLOCKS, _BLOCKS))
    for (rows, down), (columns, across) in product(*map(_of_one_size, grey.shape)):
        blocks = grey[down[:, np.newaxis, :, np.newaxis], across[np.newaxis, :, np.newaxis]]
        flat = blocks.reshape(len(rows), len(columns), -1)
        found[:, rows[:, np.newaxis], columns] = np.percentile(flat, percents, axis=2)
    return found


@lru_cache
def _of_one_size(length: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Return the blocks along an axis of each length that there is: their numbers, and the pixels of each."""
    ends = np.linspace(0, length, _BLOCKS + 1).astype(int)
    lengths = np.diff(ends)
    numbers = [np.flatnonzero(lengths == each) for each in np.unique(lengths)]
    return [(of, ends[of][:, np.newaxis] + np.arange(lengths[of[0]])) for of in numbers]


class _Light:
    """A polynomial fitted to a percentile of the grey values of each block, h x w."""

    def __init__(self, blocks: Floats) -> None:
        self._blocks = blocks
        self.coefficients = self._fit()
        self._rest = self._blocks - _BLOCK_TERMS @ self.coefficients
        self._spread = _spread(self._rest)

    def _fit(self) -> Floats:
        """Fit by least squares, again and again with less weight for blocks that are far off (Cauchy's weights)."""
        terms, values = _BLOCK_TERMS.reshape(-1, _BLOCK_TERMS.shape[2]), self._blocks.ravel()
        weights = np.ones_like(values)
        for _ in range(_ROUNDS):
            found = np.linalg.lstsq(terms * weights[:, np.newaxis], values * weights, rcond=None)[0]
            rest = values - terms @ found
            weights = 1 / np.sqrt(1 + (rest / (2 * _spread(rest) + 1e-3)) ** 2)
        return np.asarray(found)

    @property
    def explained(self) -> float:
        """Part of the variance between the blocks that the polynomial explains, at most 1."""
        return float(1 - self._rest.var() / max(self._blocks.var(), _NO_VARIANCE))

    def at(self, shape: tuple[int, ...]) -> Floats:
        """Return the polynomial at each pixel of an image of a shape."""
        y, x = ((np.arange(length) + 0.5) / length * 2 - 1 for length in shape)
        return np.asarray(_terms(y, x) @ self.coefficients)

    def is_uneven(self, grey: Floats) -> bool:
        """Return whether it differs within the image by much, compared with the contrast of what is left."""
        if self.explained < _EXPLAINED:
            return False
        light = self.at(grey.shape)
        low, high = np.percentile(grey - light, [_CONTRAST_PERCENT, 100 - _CONTRAST_PERCENT])
        contrast = max(float(high - low), 1.0)
        return bool(np.ptp(light) >= _LEAST_RANGE * contrast and self._spread <= _LARGEST_REST * contrast)


def _spread(rest: Floats) -> float:
    """Return the standard deviation of most values (from the median deviation), which a few others do not change."""
    return 1.4826 * float(np.median(np.abs(rest)))


def _terms(y: Floats, x: Floats) -> Floats:
    """Return 1, x, y, xy, x², y² at each row and column, h x w x 6."""
    across, down = np.meshgrid(x, y)
    return np.stack([np.ones_like(across), across, down, across * down, across * across, down * down], axis=-1)


_MIDDLES = (np.arange(_BLOCKS) + 0.5) / _BLOCKS * 2 - 1
_BLOCK_TERMS = _terms(_MIDDLES, _MIDDLES)
_BASIS = np.linalg.qr(_BLOCK_TERMS.reshape(_BLOCKS * _BLOCKS, -1))[0]
"""What polynomials of the blocks are made of, orthonormal."""
