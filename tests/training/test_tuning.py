"""Thresholds chosen on the validation images: the same on any number of workers."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from nucleus.config.names import Kind
from nucleus.config.recipe import NormalizationOptions
from nucleus.data.reader import LabelledImage
from nucleus.data.synthetic import generated_image
from nucleus.model.architecture import InstanceSettings, ModelConfig
from nucleus.predict.model import ImageValues, Model
from nucleus.predict.source import ImageSource
from nucleus.training.validation import tune_instances, usual_images

CONFIG = ModelConfig(
    encoder="mobilenet_v2",
    decoder_channels=[8] * 5,
    heads="distance",
    normalization=NormalizationOptions(),
    tile=64,
    overlap=16,
)
OTHERS = [LabelledImage(f"o{seed}", Kind.STAIN, *generated_image(seed, 96, 96)) for seed in (17, 18, 19)]
IMAGES = [LabelledImage(f"n{seed}", Kind.STAIN, *generated_image(seed, 96, 96)) for seed in range(6)]


class Fake(Model):
    """A model with given values in the place of a network's."""

    def __init__(
        self, values: Callable[[NDArray[np.uint8]], NDArray[np.float32]], config: ModelConfig = CONFIG
    ) -> None:
        super().__init__(None, config)
        self._given = values

    def values(self, sources: Iterator[ImageSource]) -> Iterator[ImageValues]:
        whole = (source.read(slice(0, source.height), slice(0, source.width)) for source in sources)
        return (ImageValues(self._given(image), 1.0) for image in whole)


class Threads:
    """Stands for workers: each asks for the sum, and gets what all of them handed in, as real workers do."""

    def __init__(self, count: int, others: list[NDArray[np.float64]]) -> None:
        self.count = count
        self._others = iter(others)
        self.given: list[NDArray[np.float64]] = []

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        self.given.append(values)
        return values + next(self._others, np.zeros_like(values))


def model(too_large: float) -> Fake:
    """Values of 0.9 in nuclei, of `too_large` in a ring of 3 px around them, else 0.05."""
    import cv2

    by_pixels = {sample.image.tobytes(): sample.labels for sample in IMAGES}

    def values(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        mask = (by_pixels[image.tobytes()] > 0).astype(np.uint8)
        ring = cv2.dilate(mask, np.ones((7, 7), np.uint8))
        one = np.where(mask > 0, 0.9, np.where(ring > 0, too_large, 0.05)).astype(np.float32)
        return np.stack([one, one], axis=-1)

    return Fake(values)


def images() -> Iterator[LabelledImage]:
    return iter(IMAGES)


@pytest.mark.parametrize(("ring", "at_least"), [(0.58, 0.6), (0.47, 0.5), (0.63, 0.65)])
def test_the_mask_threshold_follows_the_model(ring: float, at_least: float) -> None:
    settings, diameter = tune_instances(model(ring), [(1.0, images)], Threads(1, []))
    assert settings.mask_threshold >= at_least
    areas = np.concatenate([np.bincount(sample.labels.ravel())[1:] for sample in IMAGES])
    assert diameter == pytest.approx(np.median(np.sqrt(4 * areas[areas > 0] / np.pi)), abs=1)


def test_ties_keep_the_settings() -> None:
    config = CONFIG.model_copy(update={"instances": InstanceSettings(min_area=20)})
    blank = Fake(lambda image: np.zeros((*image.shape[:2], 2), np.float32), config)
    settings, _ = tune_instances(blank, [(1.0, images)], Threads(1, []))
    assert (settings.mask_threshold, settings.seed_threshold, settings.min_area) == (0.5, 0.5, 20)
    assert settings.min_score == InstanceSettings().min_score


def test_the_settings_of_the_start_stay_unless_others_are_clearly_better() -> None:
    def tuned(ring: float, **settings: float) -> InstanceSettings:
        theirs = InstanceSettings.model_validate(settings)
        network = model(ring).with_config(CONFIG.model_copy(update={"instances": theirs}))
        return tune_instances(network, [(1.0, images)], Threads(1, []), prefer_current=True)[0]

    ours = {"mask_threshold": 0.62, "seed_threshold": 0.55, "min_score": 0.61}  # candidates have none of them
    assert tuned(0.58, **ours) == InstanceSettings(**ours)
    assert tuned(0.63, **ours).mask_threshold == 0.65


def test_workers_agree() -> None:
    """A worker with half of the images, told the sums of the other half, decides what one with all of them decides."""
    alone, one, other = Threads(1, []), Threads(2, []), Threads(2, [])
    settings, diameter = tune_instances(model(0.58), [(1.0, images)], alone)
    for half, worker in ((IMAGES[::2], one), (IMAGES[1::2], other)):
        tune_instances(model(0.58), [(1.0, lambda half=half: iter(half))], worker)
    assert one.given[0] + other.given[0] == pytest.approx(alone.given[0], abs=1e-12)
    told = Threads(2, other.given)
    found = tune_instances(model(0.58), [(1.0, lambda: iter(IMAGES[::2]))], told)
    assert (found[0].mask_threshold, found[1]) == (settings.mask_threshold, diameter)


def test_of_settings_as_good_by_map_the_mask_decides() -> None:
    """Three pale nuclei found as one: dropping it raises the mAP by next to nothing and costs the mask many pixels."""
    labels = np.kron(np.arange(1, 401, dtype=np.int32).reshape(20, 20), np.pad(np.ones((12, 12), np.int32), 2))
    labels[:48, :48] = 0
    labels[2:46, 2:46] = np.repeat([1, 2, 3], [15, 15, 14])
    image = np.zeros((*labels.shape, 3), np.uint8)
    pale = (labels > 0) & (labels <= 3)
    values = np.where(pale, 0.82, np.where(labels > 0, 0.99, 0.01)).astype(np.float32)
    config = CONFIG.model_copy(update={"instances": InstanceSettings(min_score=0.9)})
    settings, _ = tune_instances(
        Fake(lambda _: np.stack([values, values], axis=-1), config),
        [(1.0, lambda: iter([LabelledImage("n", Kind.STAIN, image, labels)]))],
        Threads(1, []),
    )
    assert settings.min_score <= 0.8


@pytest.mark.parametrize(("share", "lowest", "highest"), [(1.0, 0.6, 0.65), (0.9, 0.6, 0.65), (0.1, 0.4, 0.5)])
def test_datasets_count_by_their_shares_not_by_their_images(share: float, lowest: float, highest: float) -> None:
    """One needs a threshold above the ring's .58, the other, in which nuclei have .55, one below it."""
    ringed, pale = model(0.58), {sample.image.tobytes(): (sample.labels > 0) * 0.55 for sample in OTHERS}

    def values(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        mask = pale.get(image.tobytes())
        return ringed._given(image) if mask is None else np.stack([mask, mask], axis=-1).astype(np.float32)

    config = CONFIG.model_copy(update={"instances": InstanceSettings(min_score=0.0)})
    sources = [(share, lambda: iter(IMAGES[:1])), (1 - share, lambda: iter(OTHERS))]
    settings, _ = tune_instances(Fake(values, config), sources, Threads(1, []))
    assert lowest <= settings.mask_threshold <= highest


def test_usual_images_are_described_by_all_workers_together() -> None:
    certain = model(0.0)
    sources = [(1.0, images)]
    diameters, lowest = usual_images(certain, sources, Threads(1, []))
    medians = []
    for sample in IMAGES:
        areas = np.bincount(sample.labels.ravel())[1:]
        medians.append(float(np.median(np.sqrt(4 * areas[areas > 0] / np.pi))))
    assert diameters == (pytest.approx(min(medians), abs=1.5), pytest.approx(max(medians), abs=1.5))
    assert lowest == pytest.approx(0.9, abs=2e-3)
    one, other = Threads(2, []), Threads(2, [])
    for half, worker in ((IMAGES[::2], one), (IMAGES[1::2], other)):
        usual_images(certain, [(1.0, lambda half=half: iter(half))], worker)
    told = usual_images(certain, [(1.0, lambda: iter(IMAGES[::2]))], Threads(2, other.given))
    assert told == (diameters, lowest)
    blank = Fake(lambda image: np.zeros((*image.shape[:2], 2), np.float32))
    assert usual_images(blank, sources, Threads(1, []))[1] is None
    assert usual_images(blank, [(1.0, lambda: iter(()))], Threads(1, [])) == (None, None)
