"""Changes that other microscopes, cameras and stains make to an image: pure functions of the image and a seed.

An image is H x W x 3, uint8; labels are H x W, uint16. What is random in a change depends on its seed alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.names import Kind
from nucleus.data.images import LabelImage, RgbImage

__all__ = ["AXES", "DIAMETERS", "Axis", "busiest_crop", "median_diameter", "resampled"]

DIAMETERS = (4, 5, 7, 10, 14, 20, 28, 40, 57, 80, 113, 150, 200)
"""Median diameters of nuclei that images are resampled to, px."""

# Optical densities of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001), a row each.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)

Pixels = NDArray[Any]
Change = Callable[[RgbImage, int], Pixels]


@dataclass(frozen=True)
class Axis:
    """A kind of change in several strengths.

    Attributes:
        title: Name in tables and figures, with the unit of the strengths.
        strengths: The strengths, from the weakest on.
        change: Changes an image by a strength; the last argument is the seed.
        kinds: Kinds of image that it is made for.
    """

    title: str
    strengths: tuple[float, ...]
    change: Callable[[RgbImage, float, int], Pixels]
    kinds: frozenset[Kind] = frozenset(Kind)


def noise(image: RgbImage, sigma: float, seed: int) -> RgbImage:
    """Normally distributed noise with this standard deviation, grey values of 255."""
    return _rounded(image + np.random.default_rng(seed).normal(0, sigma, image.shape))


def blur(image: RgbImage, sigma: float, _: int) -> RgbImage:
    """A Gaussian blur with this standard deviation, px."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.uint8)


def gamma(image: RgbImage, exponent: float, _: int) -> RgbImage:
    """Brightness to the power of the exponent."""
    return _rounded(255 * (image / 255.0) ** exponent)


def inversion(image: RgbImage, part: float, _: int) -> RgbImage:
    """Dark for bright; a part of 0 changes nothing, 1 inverts."""
    return _rounded((1 - part) * image + part * (255.0 - image))


def contrast(image: RgbImage, factor: float, _: int) -> RgbImage:
    """The distance of each value from the mean, times the factor: few grey levels are left."""
    mean = image.mean()
    return _rounded(mean + factor * (image - mean))


def gradient(image: RgbImage, height: float, seed: int) -> RgbImage:
    """A ramp of light across the image, `height` times its range of values high, in a random direction."""
    rows, columns = _places(image.shape)
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * columns + np.sin(angle) * rows
    ramp = (ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6)
    return _fitted(image + height * float(np.ptp(image)) * ramp[..., np.newaxis])


def vignette(image: RgbImage, loss: float, _: int) -> RgbImage:
    """Light that falls off from the centre, where it is whole, to the corners, which lose this part of it."""
    rows, columns = _places(image.shape)
    return _rounded(image * (1 - loss * (rows**2 + columns**2) / 2)[..., np.newaxis])


def depth(image: RgbImage, bits: float, _: int) -> Pixels:
    """The image as a camera of 8 to 16 bits stores it, in the lower bits of 16; 32 are floats from 0 to 1."""
    if bits == 32:
        return (image / 255.0).astype(np.float32)
    return image if bits == 8 else np.rint(image / 255.0 * (2**bits - 1)).astype(np.uint16)


def stain(image: RgbImage, strength: float, seed: int) -> RgbImage:
    """Other amounts of haematoxylin, eosin and a third stain: densities times 1 +- strength, plus +- strength / 5.

    In optical density, as Tellez et al. 2018 (https://doi.org/10.1109/TMI.2018.2820199); uniformly distributed.
    """
    rng = np.random.default_rng(seed)
    densities = -np.log((image + 1.0) / 256) @ np.linalg.inv(_STAINS)
    changed = densities * (1 + strength * rng.uniform(-1, 1, 3)) + strength / 5 * rng.uniform(-1, 1, 3)
    return _rounded(256 * np.exp(-(changed @ _STAINS)) - 1)


AXES = {
    "noise": Axis("noise, standard deviation in 255", (5, 10, 20, 40), noise),
    "blur": Axis("blur, standard deviation in px", (1, 2, 3, 4), blur),
    "gamma": Axis("gamma", (0.33, 0.5, 0.7, 1.5, 2, 3), gamma),
    "inversion": Axis("inversion", (1,), inversion),
    "contrast": Axis("contrast, factor", (0.1, 0.25, 0.5), contrast),
    "gradient": Axis("background gradient, of the range", (0.25, 0.5, 1, 2), gradient),
    "vignette": Axis("vignette, light lost in corners", (0.25, 0.5, 0.75, 0.9), vignette),
    "depth": Axis("bits", (8, 10, 12, 16, 32), depth),
    "stain": Axis("stain amounts (HED)", (0.1, 0.2, 0.4, 0.6), stain, frozenset({Kind.STAIN})),
}


def _rounded(values: NDArray[np.floating]) -> RgbImage:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _fitted(values: NDArray[np.floating]) -> RgbImage:
    """Scale values to at most 255, as an exposure that is not overexposed."""
    return _rounded(values * min(1.0, 255 / max(float(values.max()), 1e-6)))


def _places(shape: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Row and column of each pixel, from -1 to 1."""
    rows, columns = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    return rows, columns


def median_diameter(labels: LabelImage) -> float:
    """Median diameter of the nuclei, of circles of the same area, px; 0 without nuclei."""
    areas = np.bincount(labels.ravel())[1:]
    areas = areas[areas > 0]
    return float(np.median(np.sqrt(4 * areas / np.pi))) if areas.size else 0.0


def busiest_crop(labels: LabelImage, side: int) -> tuple[slice, slice]:
    """The window of at most `side` x `side` px that covers the most nuclei, by their centres; the first of equals."""
    height, width = labels.shape
    if height <= side and width <= side:
        return slice(0, height), slice(0, width)
    centres = np.zeros(labels.shape, np.float64)
    for label in np.unique(labels[labels > 0]):
        ys, xs = np.nonzero(labels == label)
        centres[int(ys.mean()), int(xs.mean())] = 1
    sums = cv2.integral(centres)
    high, wide = min(side, height), min(side, width)
    counts = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    y, x = np.unravel_index(int(np.argmax(counts)), counts.shape)
    return slice(int(y), int(y) + high), slice(int(x), int(x) + wide)


def resampled(image: RgbImage, labels: LabelImage, factor: float) -> tuple[RgbImage, LabelImage]:
    """The image at another scale; each nucleus is resampled by itself, so that its outline stays smooth."""
    size = tuple(max(1, round(side * factor)) for side in labels.shape[::-1])
    smooth = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    resize = partial(cv2.resize, dsize=size, interpolation=smooth)
    found = np.zeros(size[::-1], labels.dtype)
    best = np.full(size[::-1], 0.5, np.float32)
    soft = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    for label in np.unique(labels[labels > 0]):
        cover = cv2.resize((labels == label).astype(np.float32), size, interpolation=soft)
        mine = cover >= best
        found[mine], best[mine] = label, cover[mine]
    return np.asarray(resize(image), np.uint8), found
