"""Uneven light is recognised and evened; images that are even, or whose objects are large, stay as they are."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from nucleus.data.illumination import uneven_light

SIDE = 256


def places() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows and columns from -1 to 1."""
    middle = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    return middle[:, np.newaxis], middle[np.newaxis]


def nuclei(background: float, value: float) -> NDArray[np.float64]:
    """Draw 40 discs on even ground with noise, H x W x 3."""
    rng = np.random.default_rng(5)
    image = np.full((SIDE, SIDE), background, np.float64)
    for row, column in rng.uniform(10, SIDE - 10, (40, 2)):
        cv2.circle(image, (round(column), round(row)), 8, value, cv2.FILLED)
    return (image + rng.normal(0, 2, image.shape))[..., np.newaxis].repeat(3, axis=2)


def stored(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


DARK, BRIGHT = nuclei(20, 90), nuclei(220, 120)


@pytest.mark.parametrize("height", [60, 120])
def test_haze_is_subtracted(height: float) -> None:
    y, x = places()
    haze = height / 4 * (2 + y + 0.6 * x + 0.4 * x * y)
    hazy = stored(DARK + haze[..., np.newaxis])
    light = uneven_light(hazy, hazy.shape[:2])
    assert light is not None
    assert light.kind == "haze"
    evened = light.even(hazy).astype(np.float64)
    offset = np.median(evened - DARK)
    assert np.abs(evened - DARK - offset).mean() < 3
    assert np.abs(hazy - DARK - np.median(hazy - DARK)).mean() > 8


def test_haze_of_one_colour_leaves_the_others() -> None:
    y, _ = places()
    hazy = DARK.copy()
    hazy[..., 2] += 120 * (1 + y)
    light = uneven_light(stored(hazy), (SIDE, SIDE))
    assert light is not None
    evened = light.even(stored(hazy)).astype(np.float64)
    assert np.abs(evened - DARK - np.median(evened - DARK, axis=(0, 1))).mean() < 4


def test_shade_is_divided_by() -> None:
    y, x = places()
    shaded = stored(BRIGHT * (1 - 0.35 * (x**2 + y**2))[..., np.newaxis])
    light = uneven_light(shaded, shaded.shape[:2])
    assert light is not None
    assert light.kind == "shade"
    evened = light.even(shaded).astype(np.float64)
    assert np.abs(evened / BRIGHT / np.median(evened / BRIGHT) - 1).mean() < 0.03


@pytest.mark.parametrize("image", [DARK, BRIGHT, np.full_like(DARK, 7), nuclei(0, 255)], ids=str)
def test_even_images_stay(image: NDArray[np.float64]) -> None:
    assert uneven_light(stored(image), image.shape[:2]) is None


@pytest.mark.parametrize("radius", [0.4, 0.9])
@pytest.mark.parametrize("softness", [0.02, 0.2])
def test_one_large_nucleus_is_no_light(radius: float, softness: float) -> None:
    y, x = places()
    one = 200 / (1 + np.exp((np.hypot(x - 0.1, y) - radius) / softness))
    image = stored((one + np.random.default_rng(1).normal(20, 2, one.shape))[..., np.newaxis].repeat(3, axis=2))
    assert uneven_light(image, image.shape[:2]) is None


def test_small_images_stay() -> None:
    small = np.broadcast_to(np.linspace(0, 255, 60).astype(np.uint8)[:, np.newaxis, np.newaxis], (60, 60, 1))
    assert uneven_light(small, (60, 60)) is None


def test_parts_and_reduced_copies_get_the_light_of_the_whole() -> None:
    y, x = places()
    hazy = stored(DARK + (30 * (2 + y + x))[..., np.newaxis])
    light = uneven_light(hazy, hazy.shape[:2])
    assert light is not None
    whole = light.even(hazy)
    np.testing.assert_array_equal(light.part(40, 60).even(hazy[50:90, 70:], row=10, column=10), whole[50:90, 70:])
    flat = np.full((SIDE, SIDE, 3), 128, np.uint8)
    middles = light.even(flat[::4, ::4], steps=(4, 4)).astype(int)
    assert np.abs(middles - light.even(flat)[2::4, 2::4]).max() <= 2
    sampled = uneven_light(hazy[::2, ::2], hazy.shape[:2])
    assert sampled is not None
    assert np.abs(sampled.even(hazy).astype(int) - whole).mean() < 2
