"""Augmentation of a crop with OpenCV: few calls on 8-bit pixels and tables, each of which releases Python's lock.

What is done to a crop is in `AugmentOptions`; `augmented` does it in this order: window, scale, turn, grey, invert,
stains, powers, contrast and brightness, shading, blur, noise. As long as the pixels have 8 bits, a change that maps
each value alone is a table of 256; grey crops have one channel until channels differ.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import AugmentOptions
from nucleus.data.images import LabelImage, RgbImage

__all__ = ["CHOICES", "ReadWindow", "augmented", "drawn_choices"]

CHOICES = (
    *("scale", "top", "left", "turn", "flip", "invert", "grey", "contrast", "brightness"),
    *("gamma", "stain_0", "stain_1", "stain_2", "blur", "noise"),
    *("hed_0", "hed_1", "hed_2", "shift_0", "shift_1", "shift_2", "shading", "sigma"),
    *("noise_0", "noise_1", "noise_2"),
)
"""Names of the numbers in [0, 1) that decide all changes of a crop, but for its smooth fields."""
_NUMBER_BYTES, _NUMBER_UNIT = 4, 2.0**-32
_CHANNELS = 3
_FULL_RANGE = 255.0
_LEVELS = np.arange(256, dtype=np.float32) / np.float32(_FULL_RANGE)
_TO_GREY = np.full((1, _CHANNELS), 1 / _CHANNELS, np.float32)
_FIELD_SIDE = 3
"""Smooth fields are interpolated between this many random values per side."""
_FIELDS = 2
_HED_TO_RGB = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
"""Optical density of haematoxylin, eosin and diaminobenzidine in red, green and blue (Ruifrok & Johnston 2001)."""
_RGB_TO_HED = np.linalg.inv(_HED_TO_RGB)
_LOG_SHARES = np.log((np.arange(256, dtype=np.float32) + 1) / (_FULL_RANGE + 1))
_COLOURED = 8.0
"""Crops are coloured if their channels differ by at least this much, on average, in 255."""
_SHIFT_OF_HED = 0.2
_BLUR_RADIUS = 6
_NOISE_VALUES = 1 << 20
_KEYS_CUBIC = -0.5
_LEAST_REDUCTION = 1.02
_TURNS = {1: cv2.ROTATE_90_COUNTERCLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_CLOCKWISE}

Pixels = NDArray[np.uint8]
"""H x W for grey pixels, else H x W x 3."""
Floats = NDArray[np.float32]
Choices = dict[str, float]
ReadWindow = Callable[[slice, slice], tuple[Pixels, LabelImage]]
"""Function that reads image (H x W if it is grey, else H x W x 3) and labels in a window of rows and columns."""


def drawn_choices(key: tuple[int, ...]) -> tuple[Choices, Floats]:
    """Draw what decides all changes of a crop.

    Args:
        key: Integers of 64 bits that determine all random numbers.

    Returns:
        A number in [0, 1) for each choice, and values of the smooth fields, 2 x 3 x 3, in [-1, 1).
    """
    count = len(CHOICES) + _FIELDS * _FIELD_SIDE**2
    # A sponge function takes a tenth of the time of a generator of NumPy, which is slow to seed.
    found = hashlib.shake_128(struct.pack(f"<{len(key)}q", *key)).digest(_NUMBER_BYTES * count)
    numbers = np.frombuffer(found, "<u4") * _NUMBER_UNIT
    choices = dict(zip(CHOICES, numbers[: len(CHOICES)].tolist(), strict=True))
    fields = (2 * numbers[len(CHOICES) :] - 1).astype(np.float32)
    return choices, fields.reshape(_FIELDS, _FIELD_SIDE, _FIELD_SIDE)


def augmented(
    read: ReadWindow,
    shape: tuple[int, int],
    table: NDArray[np.uint8],
    drawn: tuple[Choices, Floats],
    crop: int,
    options: AugmentOptions,
) -> tuple[RgbImage, LabelImage]:
    """Cut a crop from an image and change it.

    Args:
        read: Reads the pixels of a window.
        shape: Height and width of the image.
        table: Normalized value of each value of the image, 256.
        drawn: Random numbers, of `drawn_choices`.
        crop: Side of the crop, px.
        options: Augmentation.

    Returns:
        Image, crop x crop x 3, and labels, crop x crop.
    """
    choices, fields = drawn
    image, labels = _window(read, shape, choices, round(crop / 2 ** (options.scale * _centred(choices["scale"]))))
    image = _resized(np.asarray(cv2.LUT(image, table), np.uint8), crop)
    labels = cv2.resize(labels, (crop, crop), interpolation=cv2.INTER_NEAREST_EXACT)
    if options.flips:
        image, labels = _turned(image, choices), _turned(labels, choices)
    return _changed(image, choices, fields, options), np.ascontiguousarray(labels)


def _window(read: ReadWindow, shape: tuple[int, int], choices: Choices, side: int) -> tuple[Pixels, LabelImage]:
    """Read a square window at a random place, mirrored where the image is smaller."""
    rows, columns = (_place(length, side, choices[name]) for length, name in zip(shape, ("top", "left"), strict=True))
    image, labels = read(rows, columns)
    below, right = (max(side - length, 0) for length in shape)
    if not below and not right:
        return image, labels
    image, labels = (
        cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REFLECT_101) for pixels in (image, labels)
    )
    return image, labels


def _place(length: int, side: int, choice: float) -> slice:
    """Return where a window lies along an axis."""
    free = max(length - side, 0)
    start = min(int(choice * (free + 1)), free)
    return slice(start, start + min(side, length))


def _resized(image: Pixels, crop: int) -> Pixels:
    """Resize bilinearly; reduced pixels are averages, by a filter with the variance of the triangle of that width."""
    reduction = image.shape[0] / crop
    if reduction > _LEAST_REDUCTION:
        image = cv2.GaussianBlur(image, *_filter_of(reduction), borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(cv2.resize(image, (crop, crop), interpolation=cv2.INTER_LINEAR), np.uint8)


def _filter_of(reduction: float) -> tuple[tuple[int, int], float]:
    """Return size and standard deviation of the Gaussian before a bilinear reduction.

    Together they have the variance of a triangle of half-width `reduction`, which is reduction^2 / 6.
    """
    variance = (reduction**2 - 1) / 6
    if variance <= 1 / 2:  # three values: variance / 2, the rest, variance / 2
        return (3, 3), (-0.5 / np.log(variance / 2 / (1 - variance))) ** 0.5
    side = 2 * int(np.ceil(2.5 * variance**0.5)) + 1
    return (side, side), variance**0.5


def _turned(pixels: NDArray[Any], choices: Choices) -> NDArray[Any]:
    turn = int(choices["turn"] * 4)
    if turn:
        pixels = cv2.rotate(pixels, _TURNS[turn])
    return pixels if choices["flip"] < 0.5 else cv2.flip(pixels, 1)


def _changed(image: Pixels, choices: Choices, fields: Floats, options: AugmentOptions) -> RgbImage:
    """Change the intensities of a crop, channel by channel: one at a time stays in the processor's cache."""
    if image.ndim == 3 and choices["grey"] < options.grey:
        image = np.asarray(cv2.transform(image, _TO_GREY), np.uint8)
    if choices["invert"] < options.invert:
        image = np.asarray(cv2.bitwise_not(image), np.uint8)
    planes = _with_powers(image, choices, options)
    contrast = 1 + options.contrast * _centred(choices["contrast"])
    brightness = _FULL_RANGE * options.brightness * _centred(choices["brightness"])
    offset = (1 - contrast) * sum(cv2.mean(plane)[0] for plane in planes) / len(planes) + brightness
    if options.shading:
        planes = _shaded(planes, (contrast, offset), options.shading * choices["shading"], fields)
        contrast, offset = 1.0, 0.0
    if options.blur and choices["blur"] < options.blur:
        planes = _blurred(planes, 0.5 + (options.blur_sigma - 0.5) * choices["sigma"])
    if options.noise:
        planes = planes if len(planes) == _CHANNELS else planes * _CHANNELS
        noise = [_noise(planes[0].shape, choices[f"noise_{channel}"]) for channel in range(_CHANNELS)]
        strength = _FULL_RANGE * options.noise * choices["noise"]
    else:  # twice half of the values: the only way of OpenCV to multiply, add, round and clip at once
        noise, strength = planes, contrast / 2
        contrast /= 2
    found = [
        cv2.addWeighted(plane, contrast, other, strength, offset, dtype=cv2.CV_8U)
        for plane, other in zip(planes, noise, strict=True)
    ]
    return np.asarray(cv2.merge(found if len(found) == _CHANNELS else found * _CHANNELS), np.uint8)


def _centred(choice: float) -> float:
    """Map [0, 1] to [-1, 1]."""
    return 2 * choice - 1


def _with_powers(image: Pixels, choices: Choices, options: AugmentOptions) -> list[Floats]:
    """Change stains, and raise the channels to powers; return the channels, or one if they are equal."""
    powers = [
        2 ** (options.gamma * _centred(choices["gamma"]) + options.stain * _centred(choices[f"stain_{channel}"]))
        for channel in range(_CHANNELS)
    ]
    planes = [image] if image.ndim == 2 else list(cv2.split(image))
    if options.hed and _is_coloured(planes):
        stained = cv2.split(_restained(image, choices, options.hed))
        if not (options.gamma or options.stain):
            return list(stained)
        return [_power(plane, power) for plane, power in zip(stained, powers, strict=True)]
    if options.stain and len(planes) == 1:
        planes = planes * _CHANNELS
    tables = [_FULL_RANGE * _LEVELS ** np.float32(power) for power in powers[: len(planes)]]
    return [cv2.LUT(plane, table) for plane, table in zip(planes, tables, strict=True)]


def _power(plane: Floats, power: float) -> Floats:
    shares = cv2.max(plane, 0) * np.float32(1 / _FULL_RANGE)
    return np.asarray(cv2.pow(shares, power) * np.float32(_FULL_RANGE), np.float32)


def _is_coloured(planes: Sequence[Pixels]) -> bool:
    if len(planes) == 1:
        return False
    red, green, blue = planes
    highest, lowest = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
    return cv2.mean(cv2.subtract(highest, lowest))[0] > _COLOURED


def _restained(image: Pixels, choices: Choices, strength: float) -> Floats:
    """Change the optical density of each stain."""
    factors, shifts = (
        strength * np.array([_centred(choices[f"{name}_{stain}"]) for stain in range(3)]) for name in ("hed", "shift")
    )
    by_channel = _RGB_TO_HED @ np.diag(1 + factors) @ _HED_TO_RGB
    moved = _SHIFT_OF_HED * shifts @ _HED_TO_RGB
    # OpenCV multiplies a matrix by a column of channels, and we have -density, whose exponential is wanted.
    matrix = np.column_stack([by_channel.T, -moved]).astype(np.float32)
    found = cv2.exp(cv2.transform(cv2.LUT(image, _LOG_SHARES), matrix))
    return np.asarray(found * np.float32(_FULL_RANGE + 1) - np.float32(1), np.float32)


def _shaded(
    planes: Sequence[Floats], contrast_and_offset: tuple[float, float], strength: float, fields: Floats
) -> list[Floats]:
    """Multiply by one smooth field and add another, as uneven illumination and background do.

    Contrast and offset are applied before, in the same multiplication and addition.
    """
    contrast, offset = contrast_and_offset
    weights = _interpolation(len(planes[0]))
    bent = 1 + strength * fields[0]  # also in between, because the weights add up to 1
    gain, added = (
        cv2.gemm(weights @ field, weights, 1, None, 0, flags=cv2.GEMM_2_T)
        for field in (contrast * bent, offset * bent + _FULL_RANGE * strength / 2 * fields[1])
    )
    return [cv2.add(cv2.multiply(plane, gain), added) for plane in planes]


@lru_cache(maxsize=2)
def _interpolation(side: int) -> Floats:
    """Return the weights of `_FIELD_SIDE` values at each of `side` places between them: Keys' cubic convolution."""
    places = (np.arange(side)[:, np.newaxis] + 0.5) * _FIELD_SIDE / side - 0.5
    distance = np.abs(places - np.arange(_FIELD_SIDE))
    near = ((_KEYS_CUBIC + 2) * distance - (_KEYS_CUBIC + 3)) * distance**2 + 1
    far = _KEYS_CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def _blurred(planes: Sequence[Floats], sigma: float) -> list[Floats]:
    """Blur with a Gaussian of a standard deviation of up to 3 px."""
    line = cv2.getGaussianKernel(2 * _BLUR_RADIUS + 1, sigma, cv2.CV_32F)
    return [cv2.sepFilter2D(plane, -1, line, line, borderType=cv2.BORDER_REFLECT_101) for plane in planes]


def _noise(shape: tuple[int, ...], start: float) -> Floats:
    """Return normally distributed values of standard deviation 1: a part, at a random place, of a fixed sequence.

    To draw them anew takes longer than all other changes together.
    """
    values, count = _noise_values(), shape[0] * shape[1]
    if count > len(values):
        values = np.resize(values, count)
    first = int(start * (len(values) - count + 1))
    return values[first : first + count].reshape(shape)


@lru_cache(maxsize=1)
def _noise_values() -> Floats:
    return np.random.default_rng(0).standard_normal(_NOISE_VALUES, np.float32)
