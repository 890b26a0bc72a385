"""The scale of an image follows from the size of its nuclei, as the network sees them at several scales."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.model.architecture import InstanceSettings, Maps, ModelConfig
from nucleus.model.tiling import Region
from nucleus.predict.model import Model, PredictionOptions
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.sizing import View, Viewer, densest_square, fitting_scale, view_of
from nucleus.predict.source import array_source

RANGE = (10.0, 50.0)
PLAIN = NormalizationOptions(method="none")


def view(scale: float, diameter: float, certainty: float, nuclei: int = 100) -> View:
    """A view of nuclei of a diameter, px of the image."""
    area = round(nuclei * np.pi * (diameter * scale) ** 2 / 4)
    shared = float(area)
    return View(scale, nuclei, area, shared, shared / certainty, pixels=4 * area) if nuclei else View(scale)


class Network:
    """Sees nuclei best at 25 px; misjudges those that are far from that, and is less certain there."""

    def __init__(self, diameter: float, best: float = 0.95) -> None:
        self.diameter = diameter
        self.best = best
        self.asked: list[float] = []

    def __call__(self, scale: float) -> View:
        self.asked.append(scale)
        octaves = np.log2(self.diameter * scale / 25)
        wrong = 1 + max(0.0, -octaves - 1.5) ** 2 if octaves < 0 else 1 / (1 + max(0.0, octaves - 1.5) ** 2)
        return view(scale, self.diameter * wrong, self.best - 0.02 * octaves**2)


@pytest.mark.parametrize("diameter", [4, 5, 7, 9, 60, 80, 120, 150, 200, 400, 900])
def test_nuclei_outside_the_range_are_brought_into_it(diameter: float) -> None:
    found = fitting_scale(Network(diameter), RANGE)
    assert found.scale != 1
    assert 9.5 <= diameter * found.scale <= 42


@pytest.mark.parametrize("diameter", [10.5, 15, 25, 40, 48])
def test_nuclei_in_the_range_stay_as_they_are_after_two_looks(diameter: float) -> None:
    network = Network(diameter)
    assert fitting_scale(network, RANGE).scale == 1
    assert network.asked == [1, 0.25]


def test_the_other_scale_must_be_more_certain() -> None:
    def enlarged(certainty: float) -> float:
        return fitting_scale(lambda scale: view(scale, 7, {1: 0.9, 0.25: 0.5}.get(scale, certainty)), RANGE).scale

    assert enlarged(0.6) == 1
    assert enlarged(0.92) == pytest.approx(500**0.5 / 7, rel=1e-3)

    def reduced(certainty: float) -> float:
        return fitting_scale(lambda scale: view(scale, *((30, 0.9) if scale == 1 else (90, certainty))), RANGE).scale

    assert reduced(0.904) == 1  # as certain as its own view, up to noise
    assert reduced(0.92) == pytest.approx(500**0.5 / 90, rel=1e-3)


def test_glands_are_not_taken_for_nuclei() -> None:
    def tissue(scale: float, nuclei: float, structures: float) -> View:
        """Nuclei of 20 px in structures of 100 px, which are taken for nuclei at a quarter of the scale; coverages."""
        found = view(scale, 20, 0.6) if scale == 1 else view(scale, 100, 0.8)
        return replace(found, pixels=round(found.area / (nuclei if scale == 1 else structures)))

    assert fitting_scale(lambda scale: tissue(scale, 0.04, 0.55), RANGE).scale == 1
    assert fitting_scale(lambda scale: tissue(scale, 0.15, 0.55), RANGE).scale < 1  # crowded large nuclei
    assert fitting_scale(lambda scale: tissue(scale, 0.02, 0.3), RANGE).scale < 1  # very large ones, hardly seen


def test_an_image_without_nuclei_is_not_reduced_until_some_appear() -> None:
    def empty(scale: float) -> View:
        return view(scale, 100, 0.8, nuclei=0 if scale == 1 else 3)

    assert fitting_scale(empty, RANGE).scale == 1
    assert fitting_scale(View, RANGE).diameter is None

    def large(scale: float) -> View:
        return replace(empty(scale), total=0) if scale == 1 else view(scale, 100, 0.95)

    assert fitting_scale(large, RANGE).scale == pytest.approx(500**0.5 / 100, rel=1e-3)


def test_views_count_seeds_and_certainty() -> None:
    mask, interior = np.zeros((40, 60), np.float32), np.zeros((40, 60), np.float32)
    mask[5:15, 5:15] = mask[5:15, 15:25] = 0.8  # two nuclei that touch
    mask[30:35, 30:40] = 0.3  # unsure
    interior[8:12, 8:12] = interior[8:12, 18:22] = interior[32, 32] = 0.9
    found = view_of(Maps(mask, interior), InstanceSettings(), 0.5)
    assert (found.nuclei, found.area) == (2, 200)
    assert found.diameter == pytest.approx(2 * np.sqrt(4 * 100 / np.pi))
    assert found.certainty == pytest.approx(160 / (175 + 200 - 160))
    assert (found + found).diameter == found.diameter
    assert (found + found).certainty == pytest.approx(found.certainty)
    nothing = view_of(Maps(mask * 0.5, interior), InstanceSettings(), 1.0)
    assert (nothing.diameter, nothing.certainty) == (None, 0.0)


class Seen:
    """Records what a viewer lets the network see; the mask is the brightness."""

    def __init__(self) -> None:
        self.shapes: list[tuple[float, tuple[int, int]]] = []

    def __call__(self, image: ScaledImage) -> Maps:
        self.shapes.append((image.scale, image.shape))
        image.values = np.zeros((*image.shape, 2), np.float32)
        mask = image.read(slice(0, image.shape[0]), slice(0, image.shape[1]))[..., 0] / np.float32(255)
        return Maps(mask, mask)


def test_small_images_are_viewed_whole_and_keep_their_values() -> None:
    seen = Seen()
    viewer = Viewer(ScaledImage(array_source(np.full((300, 400), 200, np.uint8)), PLAIN), seen, InstanceSettings())
    assert viewer.look(1.0).area == 120_000
    assert viewer.look(0.25).area == 7_500
    assert viewer.image_at(1.0).values is not None
    assert viewer.image_at(3.0).values is None
    assert seen.shapes == [(1.0, (300, 400)), (0.25, (75, 100))]


def test_large_images_are_viewed_where_the_nuclei_are_and_little_of_them() -> None:
    pixels = np.zeros((3000, 4000), np.uint8)
    pixels[2000:2400, 3100:3500] = 220
    seen = Seen()
    viewer = Viewer(ScaledImage(array_source(pixels), PLAIN), seen, InstanceSettings())
    assert viewer.look(1.0).area > 0.9 * 400**2  # the square is where the nuclei are
    assert viewer.look(0.25).area == pytest.approx(100**2, rel=0.05)
    assert seen.shapes == [(0.25, (750, 1000)), (1.0, (512, 512))]
    assert viewer.image_at(1.0).values is None


def test_squares_stay_inside_their_part() -> None:
    mask = np.zeros((50, 100), np.float32)
    part = Region(slice(1000, 1200), slice(400, 800))
    for row, column in ((0, 0), (49, 99), (25, 50)):
        mask[:] = 0
        mask[row, column] = 1
        square = densest_square(part, mask, 64)
        assert square.shape == (64, 64)
        assert square.rows.start <= 1000 + 4 * row < square.rows.stop
        assert square.columns.start <= 400 + 4 * column < square.columns.stop
        assert square.rows.start >= 1000
        assert square.rows.stop <= 1200
    assert densest_square(Region(slice(0, 30), slice(0, 900)), np.ones((3, 90), np.float32), 64).shape == (30, 64)


def test_parts_have_the_grey_values_of_the_whole_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 4000, (200, 300), dtype=np.uint16)
    pixels[:, 150:] *= 10
    whole = ScaledImage(array_source(pixels), NormalizationOptions())
    region = Region(slice(40, 120), slice(10, 90))
    part = whole.at(1.0, region)
    assert part.shape == (80, 80)
    assert (part.read(slice(0, 80), slice(0, 80)) == whole.read(region.rows, region.columns)).all()
    assert whole.at(0.5).shape == (100, 150)
    assert whole.shape == (200, 300)


class Brightness:
    """An engine for which nuclei are what is bright; it counts the pixels that it computes."""

    def __init__(self) -> None:
        self.pixels = 0

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.pixels += tiles[..., 0].size
        body = tiles[..., 0] / np.float32(255)
        return np.stack([1 - body, body, np.zeros_like(body), body], axis=-1)


@pytest.mark.parametrize("shape", [(256, 256), (360, 360), (520, 696), (1300, 1030), (2160, 2560)])
def test_an_image_that_needs_no_change_costs_a_quarter_more_at_most(shape: tuple[int, int]) -> None:
    rows, columns = (np.abs(np.arange(length) % 40 - 20.0) for length in shape)
    pixels = np.where(np.hypot(rows[:, np.newaxis], columns) < 12, 220, 0).astype(np.uint8)  # 24 px across

    def computed(fit: bool) -> int:
        engine = Brightness()
        model = Model(engine, config, PredictionOptions(fit=fit))
        found = model.scaled_image(array_source(pixels))
        assert found.scale == 1
        for blocks in model.segment_blocks([found]):
            assert sum(int(block.labels.max()) for block in blocks) > 0
        return engine.pixels

    config = ModelConfig(
        encoder="plain",
        decoder_channels=(8,) * 5,
        heads="both",
        tile=1024,
        overlap=64,
        normalization=PLAIN,
        diameters=RANGE,
    )
    assert computed(fit=True) <= 1.25 * computed(fit=False)
