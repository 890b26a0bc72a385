"""Ranges of intensities: noise stays dark and nuclei are bright, whatever the depth, offset, gain and size."""

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.decoded import sample_of_record
from nucleus.data.images import decode_image, encode_png
from nucleus.data.normalization import intensity_sample, joined_samples, normalize, rgb8, stretch_of
from nucleus.data.shards import encode_record
from nucleus.data.synthetic import generated_image
from nucleus.errors import ImageError
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.source import array_source

OPTIONS = NormalizationOptions()
NUCLEUS, NOISE, OFFSET = 1500.0, 8.0, 500.0
RADIUS = 12


def field(
    nuclei: int, side: int = 512, noise: float = NOISE, level: float = NUCLEUS, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A field of bright discs that do not touch: intensities above the offset, with noise, and where the discs are."""
    rng = np.random.default_rng(seed)
    grid = side // (3 * RADIUS)
    discs = np.zeros((side, side), np.float32)
    for place in rng.permutation(grid * grid)[:nuclei]:
        row, column = (int(3 * RADIUS * (index + 0.5)) for index in divmod(int(place), grid))
        cv2.circle(discs, (column, row), RADIUS, float(level * rng.uniform(0.7, 1.3)), -1)
    image = cv2.GaussianBlur(discs, (0, 0), 1.2) + rng.normal(0, noise, (side, side))
    return np.asarray(image, np.float64), discs > 0


def seen(image: NDArray[Any]) -> NDArray[np.uint8]:
    """What the network sees of a grey image."""
    scaled = ScaledImage(array_source(image), OPTIONS)
    return np.asarray(scaled.read(scaled.whole.rows, scaled.whole.columns)[..., 0])


def count(image: NDArray[np.uint8]) -> int:
    """Objects of at least 20 px above half of the range."""
    _, _, facts, _ = cv2.connectedComponentsWithStats((image > 100).astype(np.uint8), connectivity=8)
    return int((facts[1:, cv2.CC_STAT_AREA] >= 20).sum())


def in_depth(values: NDArray[np.float64], depth: str) -> NDArray[Any]:
    """Intensities from 0 to about 3000, stored as cameras and programs do."""
    if depth == "uint8":
        return np.clip(np.rint(values / 16), 0, 255).astype(np.uint8)
    if depth.startswith("float"):
        return (values / 4095).astype(depth)
    scale = {"uint16": 1.0, "uint32": 1e5, "int16": 1.0, "int32": 1e5, "int64": 1e9}[depth]
    return np.rint(values * scale - (3000 * scale if depth.startswith("i") else 0)).astype(depth)


DEPTHS = ("uint8", "uint16", "uint32", "int16", "int32", "int64", "float32", "float64")


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("nuclei", [0, 1, 2, 30, 100])
def test_every_depth_shows_the_nuclei_and_nothing_else(depth: str, nuclei: int) -> None:
    values, _ = field(nuclei)
    image = seen(in_depth(values + OFFSET, depth))
    assert count(image) == nuclei
    if not nuclei:
        assert image.std() <= 255 / OPTIONS.noise * 1.1


@pytest.mark.parametrize("side", [64, 256, 1024, 4500])
@pytest.mark.parametrize("nuclei", [0, 1, 3])
def test_every_size_shows_the_nuclei_and_nothing_else(side: int, nuclei: int) -> None:
    values, _ = field(nuclei, side)
    assert count(seen(in_depth(values + OFFSET, "uint16"))) == min(nuclei, (side // 36) ** 2)


@given(
    nuclei=st.integers(0, 40),
    offset=st.floats(-1e5, 1e5),
    gain=st.floats(1e-4, 1e4),
    noise=st.floats(0.5, 60),
    seed=st.integers(0, 1000),
)
def test_offset_gain_and_noise_change_nothing(nuclei: int, offset: float, gain: float, noise: float, seed: int) -> None:
    values, _ = field(nuclei, 256, noise, seed=seed)
    image = seen(values * gain + offset * gain)
    assert count(image) == nuclei


@pytest.mark.parametrize("sigma", [1, 3, 10, 40])
@pytest.mark.parametrize("offset", [0, 20, 120])
@pytest.mark.parametrize("blur", [0.0, 1.0, 2.0, 4.0])
def test_noise_of_8_bits_stays_dark(sigma: float, offset: float, blur: float) -> None:
    """Also where it is cut off at 0, or where neighbouring pixels are alike."""
    if blur > 1 and offset < 3 * sigma:
        offset = 3 * sigma
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, (400, 300))
    noise = cv2.GaussianBlur(noise, (0, 0), blur) if blur else noise
    image = np.clip(np.rint(offset + sigma * noise / noise.std()), 0, 255).astype(np.uint8)
    assert count(seen(image)) == 0
    assert np.percentile(seen(image), 99) <= 7 * 255 / OPTIONS.noise


@pytest.mark.parametrize("share", [1e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("nuclei", [0, 1, 30])
@pytest.mark.parametrize("depth", ["uint8", "uint16", "float32"])
def test_hot_pixels_change_nothing(share: float, nuclei: int, depth: str) -> None:
    values, _ = field(nuclei)
    values[np.random.default_rng(2).random(values.shape) < share] = 3500
    assert count(seen(in_depth(values + OFFSET, depth))) == nuclei


@pytest.mark.parametrize("factor", [5, 20, 40])
@pytest.mark.parametrize("nuclei", [1, 2, 14, 100])
@pytest.mark.parametrize("side", [512, 1024])
def test_a_bright_speck_does_not_hide_nuclei(factor: int, nuclei: int, side: int) -> None:
    values, _ = field(nuclei, side)
    speck = np.zeros(values.shape, np.uint8)
    cv2.circle(speck, (side - 60, side - 60), round(np.sqrt(0.0075 / np.pi) * side), 1, -1)
    covered = count(255 * (speck * (values > 700)).astype(np.uint8))
    values[speck > 0] = NUCLEUS * factor
    found = count(seen(in_depth(values + OFFSET, "uint16")))
    assert nuclei - covered + 1 <= found <= nuclei + 1


@pytest.mark.parametrize("side", [60, 200])
@pytest.mark.parametrize("nuclei", [14, 60])
def test_a_saturated_block_does_not_hide_nuclei(nuclei: int, side: int) -> None:
    values, discs = field(nuclei)
    pixels = in_depth(values + OFFSET, "uint16")
    pixels[-side:, :side] = 65_535
    discs[-side:, :side] = False
    found = seen(pixels)
    assert count(found * discs) == count(255 * discs.astype(np.uint8)) >= nuclei / 2
    assert np.median(found[~discs]) < 20


def test_saturated_nuclei_are_no_debris() -> None:
    """A lone one among specks, of as many pixels as a block; and many in a large part of the image."""
    values, _ = field(1, 128)
    faint, _ = field(4, 128, noise=0, level=10 * NOISE, seed=3)
    assert count(seen(in_depth(np.minimum(values, 1000) + faint + OFFSET, "uint16"))) == 1
    values, discs = field(60, 320)
    faint, _ = field(3, 320, noise=0, level=30 * NOISE, seed=3)
    image = seen(in_depth(np.minimum(values, 1000) + faint * ~discs + OFFSET, "uint16"))
    assert count(image) == 60


def test_a_bright_nucleus_among_specks_of_noise_is_not_debris() -> None:
    """Faint autofluorescence does not saturate nuclei."""
    values, _ = field(1, 512)
    faint, _ = field(60, 512, noise=0, level=10 * NOISE, seed=3)
    image = seen(in_depth(values + faint + OFFSET, "uint16"))
    assert count(image) == 1


def test_dark_nuclei_on_a_bright_field_are_dark() -> None:
    for nuclei in (1, 30):
        values, inside = field(nuclei)
        image = seen(in_depth(3500 - values, "uint16"))
        assert np.median(image[~inside]) > 150
        assert np.median(image[inside]) < 100


def test_the_range_of_an_ordinary_image_is_that_of_its_percentiles() -> None:
    for seed in range(4):
        image, _ = generated_image(seed, 256, 256)
        old = normalize(image, NormalizationOptions(method="percentile"))
        assert np.abs(normalize(image, OPTIONS).astype(int) - old).mean() < 12


@pytest.mark.parametrize("method", ["robust", "percentile", "none"])
def test_training_and_prediction_see_the_same(method: Any) -> None:
    options = NormalizationOptions(method=method)
    rng = np.random.default_rng(0)
    for top in (40, 256):
        image = rng.integers(0, top, (60, 50, 3)).astype(np.uint8)
        for pixels in (image, np.repeat(image[..., :1], 3, axis=2)):
            sample = sample_of_record(encode_record("n", pixels, np.zeros((60, 50), np.uint16)), options)
            seen_in_training = sample.table[sample.read(slice(0, 60), slice(0, 50))[0]]
            expected = normalize(pixels, options)
            assert (seen_in_training == (expected if seen_in_training.ndim == 3 else expected[..., 0])).all()
    deep = field(5, 200)[0] + OFFSET
    deep = np.rint(deep).astype(np.uint16)
    imported = normalize(decode_image(encode_png(deep), "deep.png"), OPTIONS)
    assert (imported[..., 0] == seen(deep)).all(), "imported, or predicted from its file"


def test_percentiles_of_earlier_versions() -> None:
    options = NormalizationOptions(method="percentile", low=1.0, high=99.0)
    image = np.random.default_rng(0).integers(0, 256, (60, 50, 3)).astype(np.uint8)
    low, high = np.percentile(image, (1, 99), method="inverted_cdf")
    expected = np.clip((image.astype(float) - low) * 255 / (high - low), 0, 255)
    assert np.abs(normalize(image, options) - expected).max() <= 0.51
    noise = np.random.default_rng(0).integers(0, 3, (60, 50, 3)).astype(np.uint8)
    assert normalize(noise, options).max() <= 2 * 255 / 16 + 1
    assert (normalize(np.full((4, 4, 3), 200, np.uint8), options) == 0).all()


def test_bands_give_the_sample_of_the_image() -> None:
    image = generated_image(0, 96, 64)[0]
    whole = intensity_sample(image)
    bands = joined_samples(intensity_sample(image[top : top + 32]) for top in range(0, 96, 32))
    assert (whole.raw == bands.raw).all()
    assert (whole.blocks == bands.blocks).all()
    inside = np.r_[1:31, 33:63, 65:95]  # at its edges a band does not see its neighbours
    assert (whole.values[inside] == bands.values[inside]).all()


def shown(pixels: NDArray[Any]) -> list[int]:
    stretch = stretch_of(intensity_sample(pixels[..., np.newaxis]))
    return [int(value) for value in np.unique(rgb8(pixels[..., np.newaxis], stretch))]


def test_depth_without_range() -> None:
    assert shown(np.full((3, 3), 200, np.uint16)) == [200], "fits into 8 bits: kept"
    assert shown(np.full((3, 3), 5000, np.uint16)) == [0]
    assert shown(np.array([[True, False]])) == [0, 255]
    one = np.full((40, 40), 5000, np.uint16)
    one[20, 20] = 6000
    assert shown(one) == [0, 255]


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ImageError, match=r"NaN.*in x\.tif|in x\.tif.*NaN"):
        intensity_sample(np.full((4, 4, 1), np.nan, np.float32), name="x.tif")
