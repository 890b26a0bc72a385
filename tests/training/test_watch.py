"""Scores of training crops, the watch of example images, the ranking of test images, and lists of callbacks."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from nucleus.config.names import Kind
from nucleus.data.dataset import DatasetManifest
from nucleus.data.reader import LabelledImage, example_positions
from nucleus.data.samples import Sample, Samples
from nucleus.data.sampling import stored_order
from nucleus.metrics.scores import count_pixels, score_labels
from nucleus.predict.evaluation import PredictedImage
from nucleus.training.callbacks import Callback, CallbackList, Signal, Signals, Watch
from nucleus.training.distributed import mask_scores
from nucleus.training.validation import RANKED_IMAGES, ImageRanking


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
    found = mask_scores(heads).compute(tf.constant(logits), tf.constant(labels[..., np.newaxis])).numpy()
    ground = tf.nn.softmax(logits[..., :3]).numpy()[..., 0]
    masks = logits[..., 0] > 0 if heads == "distance" else ground < 0.5
    for row, mask, truth in zip(found, masks, labels, strict=True):
        counts = count_pixels(truth > 0, mask)
        assert row == pytest.approx([counts.iou, counts.dice, counts.accuracy])
    assert found[3].tolist() == [1.0, 1.0, 1.0]


def predicted(name: str, right: int, of: int = 20) -> PredictedImage:
    """An image of nuclei of one pixel each, some of which are found."""
    truth = np.zeros((of, 2), np.uint16)
    truth[:, 0] = np.arange(1, of + 1)
    labels = np.where(np.arange(of)[:, None] < right, truth, 0).astype(np.int32)
    scores = score_labels(truth, labels, loss=0.0)
    image = LabelledImage(name, Kind.DARK_FIELD, np.zeros((of, 2, 3), np.uint8), truth)
    return PredictedImage(image, labels, scores)


def images(count: int) -> Iterator[PredictedImage]:
    """Images in random order; the number in a name is the number of nuclei found."""
    for number in np.random.default_rng(0).permutation(count):
        yield predicted(f"image-{number:03d}", int(number), count)


def names(count: int, group: str) -> list[str]:
    ranking = ImageRanking(f"image-{number:03d}" for number in range(count))
    seen = [image.sample.name for image in ranking.observe(images(count))]
    assert len(seen) == count
    return [each.predicted.sample.name for each in ranking.ranked(Alone()) if each.group == group]  # type: ignore[arg-type]


def test_the_best_and_the_worst_are_found() -> None:
    assert names(40, "best") == [f"image-{number:03d}" for number in range(39, 39 - RANKED_IMAGES, -1)]
    assert names(40, "worst") == [f"image-{number:03d}" for number in range(RANKED_IMAGES)]


def test_few_images_are_divided() -> None:
    assert (names(5, "best"), names(5, "worst")) == (
        ["image-004", "image-003"],
        ["image-000", "image-001", "image-002"],
    )
    assert names(0, "worst") == []
    assert names(1, "best") == []


def test_only_what_may_be_shown_is_kept() -> None:
    ranking = ImageRanking(f"image-{number:03d}" for number in range(60))
    for _ in ranking.observe(images(60)):
        assert len(ranking._kept) <= 2 * RANKED_IMAGES


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
        watch.after_validation(count, 2 * count)
        assert model.get_weights()[0].tolist() == [[10.0 + count]] * 2
    watch.at_end()
    assert told == [(0, 1.0), (2, 11.0), (4, 12.0), (8, 14.0), (16, 18.0), (None, 19.0)]


def test_a_resumed_run_does_not_take_its_weights_for_the_first() -> None:
    image = keras.Input((2,))
    model = keras.Model(image, keras.layers.Dense(1)(image))
    told: list[int | None] = []
    watch = Watch(model, list, lambda epochs, _: told.append(epochs))
    watch.after_validation(3, 6)
    watch.after_validation(4, 8)
    assert told == [8]


def test_examples_are_of_every_kind_and_have_nuclei() -> None:
    kinds = [Kind.DARK_FIELD] * 30 + [Kind.STAIN, Kind.BRIGHT_FIELD]
    unused: dict[str, Any] = {"group": 0, "height": 8, "width": 8, "image_sha256": "0" * 64, "labels_sha256": "0" * 64}
    samples = [
        Sample(name=f"i{i}", split="val", kind=kind, nuclei=0 if i % 2 else 3, **unused)
        for i, kind in enumerate([*kinds, Kind.BRIGHT_FIELD, Kind.STAIN])
    ]
    manifest = DatasetManifest.model_construct(samples=Samples.of(samples))
    order = stored_order(len(samples))
    found = [samples[order[place]] for place in example_positions(manifest, "val", 4)]
    assert {sample.kind for sample in found[:3]} == set(Kind)
    assert all(sample.nuclei for sample in found)
    assert example_positions(manifest, "test", 4) == []


Call = tuple[str, str, tuple[object, ...]]


class Recorder(Callback):
    """Records each call, with its own name."""

    def __init__(self, name: str, calls: list[Call]) -> None:
        for method in METHODS:
            setattr(self, method, partial(self._record, name, method, calls))

    @staticmethod
    def _record(name: str, method: str, calls: list[Call], *args: object, **options: object) -> None:
        calls.append((name, method, (*args, *options.values())))


METHODS = [name for name in vars(Callback) if name.startswith("on_")]


@pytest.mark.parametrize("method", METHODS)
def test_a_list_calls_its_members_in_order(method: str) -> None:
    calls: list[Call] = []
    callback = CallbackList([Recorder("first", calls), Recorder("second", calls)])
    names = [name for name in inspect.signature(getattr(callback, method)).parameters if name != "failed"]
    options = {"failed": True} if method == "on_close" else {}
    getattr(callback, method)(*names, **options)
    expected = (*names, *options.values())
    assert calls == [("first", method, expected), ("second", method, expected)]


def test_a_list_shows_progress_in_every_member() -> None:
    told: list[tuple[str, object]] = []

    class Shown(Callback):
        @contextmanager
        def progress(self, title: str, unit: str = "items") -> Iterator[Any]:
            told.append((title, unit))
            yield lambda done, total: told.append(("advance", (done, total)))
            told.append((title, "ended"))

    with CallbackList([Shown(), Callback(), Shown()]).progress("pull", "bytes") as advance:
        advance(1, 2)
    assert told == [("pull", "bytes")] * 2 + [("advance", (1, 2))] * 2 + [("pull", "ended")] * 2


def test_a_callback_and_signals_do_nothing_by_themselves() -> None:
    with Callback().progress("pull") as advance:
        advance(1, 2)
    assert not Signals().pending()
    assert Signals().read() is Signal.CONTINUE
