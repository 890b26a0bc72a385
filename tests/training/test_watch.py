"""What is shown of a run: scores of crops, images that are watched, the best and the worst."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from nucleus.data.dataset import DatasetManifest, Sample
from nucleus.data.images import Kind
from nucleus.data.reader import LabelledImage, example_positions
from nucleus.data.sampling import stored_order
from nucleus.metrics.scores import count_pixels, score_labels
from nucleus.predict.evaluation import PredictedImage
from nucleus.training.callbacks import Watch
from nucleus.training.distributed import mask_measure
from nucleus.training.validation import EXTREMES, Extremes


class Alone:
    """One worker."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values


@pytest.mark.parametrize(("heads", "channels"), [("border", 3), ("distance", 2), ("both", 4)])
def test_scores_of_crops_are_those_of_the_mask(heads: Any, channels: int) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, 8, 8, channels)).astype(np.float32)
    labels = rng.integers(0, 3, (5, 8, 8)).astype(np.int32)
    labels[3], logits[3, ..., 0] = 0, -9.0 if heads == "distance" else 9.0  # neither truth nor prediction
    found = mask_measure(heads).of(tf.constant(logits), tf.constant(labels)).numpy()
    ground = tf.nn.softmax(logits[..., :3]).numpy()[..., 0]
    masks = logits[..., 0] > 0 if heads == "distance" else ground < 0.5
    for row, mask, truth in zip(found, masks, labels, strict=True):
        counts = count_pixels(truth > 0, mask)
        assert row == pytest.approx([counts.iou, counts.dice, counts.accuracy])
    assert found[3].tolist() == [1.0, 1.0, 1.0]


def predicted(name: str, right: int, of: int = 20) -> PredictedImage:
    """An image of single pixels, some of which are found."""
    truth = np.zeros((of, 2), np.uint16)
    truth[:, 0] = np.arange(1, of + 1)
    labels = np.where(np.arange(of)[:, None] < right, truth, 0).astype(np.int32)
    scores = score_labels(truth, labels, loss=0.0)
    image = LabelledImage(name, Kind.DARK_FIELD, np.zeros((of, 2, 3), np.uint8), truth)
    return PredictedImage(image, labels, scores)


def images(count: int) -> Iterator[PredictedImage]:
    """Names tell how much was found; in an order that is none."""
    for number in np.random.default_rng(0).permutation(count):
        yield predicted(f"image-{number:03d}", int(number), count)


def names(count: int, group: str) -> list[str]:
    extremes = Extremes(f"image-{number:03d}" for number in range(count))
    seen = [image.sample.name for image in extremes.watching(images(count))]
    assert len(seen) == count
    return [each.predicted.sample.name for each in extremes.chosen(Alone()) if each.group == group]  # type: ignore[arg-type]


def test_the_best_and_the_worst_are_found() -> None:
    assert names(40, "best") == [f"image-{number:03d}" for number in range(39, 39 - EXTREMES, -1)]
    assert names(40, "worst") == [f"image-{number:03d}" for number in range(EXTREMES)]


def test_few_images_are_divided() -> None:
    assert (names(5, "best"), names(5, "worst")) == (
        ["image-004", "image-003"],
        ["image-000", "image-001", "image-002"],
    )
    assert names(0, "worst") == []
    assert names(1, "best") == []


def test_only_what_may_be_shown_is_kept() -> None:
    extremes = Extremes(f"image-{number:03d}" for number in range(60))
    for _ in extremes.watching(images(60)):
        assert len(extremes._kept) <= 2 * EXTREMES


def test_predictions_are_made_up_for_before_training() -> None:
    image = keras.Input((2,))
    model = keras.Model(image, keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")(image))
    told: list[tuple[int | None, float]] = []
    watch = Watch(
        model,
        lambda: [float(model.get_weights()[0][0, 0])],  # type: ignore[list-item]
        lambda epochs, found: told.append((epochs, found[0])),  # type: ignore[arg-type]
    )
    for count in range(1, 10):
        model.set_weights([np.full((2, 1), 10.0 + count)])
        watch.validated(count, 2 * count)
        assert model.get_weights()[0].tolist() == [[10.0 + count]] * 2
    watch.ended()
    assert told == [(0, 1.0), (2, 11.0), (4, 12.0), (8, 14.0), (16, 18.0), (None, 19.0)]


def test_a_resumed_run_does_not_take_its_weights_for_the_first() -> None:
    image = keras.Input((2,))
    model = keras.Model(image, keras.layers.Dense(1)(image))
    told: list[int | None] = []
    watch = Watch(model, list, lambda epochs, _: told.append(epochs))
    watch.validated(3, 6)
    watch.validated(4, 8)
    assert told == [8]


def test_examples_are_of_every_kind_and_have_nuclei() -> None:
    kinds = [Kind.DARK_FIELD] * 30 + [Kind.STAIN, Kind.BRIGHT_FIELD]
    samples = [
        Sample.model_construct(name=f"i{i}", split="val", kind=kind, nuclei=0 if i % 2 else 3)
        for i, kind in enumerate([*kinds, Kind.BRIGHT_FIELD, Kind.STAIN])
    ]
    manifest = DatasetManifest.model_construct(samples=samples)
    order = stored_order(len(samples))
    found = [samples[order[place]] for place in example_positions(manifest, "val", 4)]
    assert {sample.kind for sample in found[:3]} == set(Kind)
    assert all(sample.nuclei for sample in found)
    assert example_positions(manifest, "test", 4) == []
