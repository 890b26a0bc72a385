"""What the network sees of an image: strong noise smoothed, uneven light evened, the same in parts as in the whole."""

import numpy as np
import pytest
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.normalization import normalize
from nucleus.data.synthetic import generated_image
from nucleus.model.tiling import Region
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.source import array_source

OPTIONS = NormalizationOptions()
EVEN = generated_image(9004, 160, 160)[0]
WHOLE = np.s_[0:160, 0:160]


def noisy(strength: float) -> NDArray[np.uint8]:
    noise = np.random.default_rng(4).normal(0, strength * np.ptp(EVEN), (160, 160, 1))
    return np.clip(EVEN * 0.5 + 60 + noise, 0, 255).astype(np.uint8)


def hazy(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    haze = image + 3.0 * np.ptp(image) * np.linspace(0, 1, 160)[:, np.newaxis, np.newaxis]
    return np.rint(haze * 255 / haze.max()).astype(np.uint8)


def test_clean_even_images_are_normalized_as_in_training() -> None:
    seen = ScaledImage(array_source(EVEN), OPTIONS, denoise=True)
    assert (seen.light, seen.smoothing) == (None, 0)
    np.testing.assert_array_equal(seen.read(*WHOLE), normalize(EVEN, OPTIONS))


def test_stronger_noise_is_smoothed_more() -> None:
    sigmas = [
        ScaledImage(array_source(noisy(strength)), OPTIONS, denoise=True).smoothing
        for strength in (0.005, 0.05, 0.1, 0.2)
    ]
    assert sigmas[0] == 0
    assert 1 < sigmas[1] < sigmas[2] < sigmas[3] <= 3


@pytest.mark.parametrize("image", [hazy(EVEN), noisy(0.15), hazy(noisy(0.1))], ids=["haze", "noise", "both"])
def test_parts_look_as_in_the_whole(image: NDArray[np.uint8]) -> None:
    seen = ScaledImage(array_source(image), OPTIONS, denoise=True)
    assert seen.light is not None or seen.smoothing
    whole = seen.read(*WHOLE)
    for rows, columns in (np.s_[0:70, 90:160], np.s_[33:97, 20:150], np.s_[140:160, 0:12]):
        np.testing.assert_array_equal(seen.read(rows, columns), whole[rows, columns])
    part = seen.at(1.0, Region(slice(40, 120), slice(30, 110)))
    inner = np.abs(part.read(slice(0, 80), slice(0, 80)).astype(int) - whole[40:120, 30:110])[12:-12, 12:-12]
    assert inner.max() == 0


def test_as_is_changes_nothing() -> None:
    image = hazy(noisy(0.1))
    seen = ScaledImage(array_source(image), OPTIONS, as_is=True)
    assert (seen.light, seen.smoothing) == (None, 0)
    np.testing.assert_array_equal(seen.read(*WHOLE), normalize(image, OPTIONS))
    assert (ScaledImage(array_source(image), OPTIONS).read(*WHOLE) != normalize(image, OPTIONS)).any()


def test_the_depth_of_an_image_does_not_decide() -> None:
    image = hazy(EVEN)
    one, other = (ScaledImage(array_source(each), OPTIONS) for each in (image, image.astype(np.uint16) * 200))
    assert one.light is not None
    assert other.light is not None
    difference = np.abs(one.read(*WHOLE).astype(int) - other.read(*WHOLE))
    assert difference.mean() < 4
