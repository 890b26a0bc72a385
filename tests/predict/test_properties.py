"""What holds for any image and any bytes: tiles and blocks leave no seam, damaged files end in our errors alone."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.shards import ShardFile, decode_record, encode_record, write_shard
from nucleus.data.synthetic import generated_image
from nucleus.errors import IntegrityError, ModelError
from nucleus.model.architecture import ModelConfig, read_model_config
from nucleus.model.tiling import TiledNetwork, axis_tiles, reflect_indices
from nucleus.model.unet import load_weights
from nucleus.predict.blocks import AssembledLabels, nuclei_of_block, plan_blocks
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.source import array_source
from nucleus.training.checkpoint import Progress, load_arrays, save_arrays

CONFIG = ModelConfig(
    encoder="mobilenet_v2",
    decoder_channels=[8] * 5,
    heads="distance",
    normalization=NormalizationOptions(method="none"),
    tile=64,
    overlap=16,
)


@given(st.integers(1, 5000), st.integers(2, 32), st.data())
def test_tiles_cover_an_axis_and_overlap(length: int, units: int, data: st.DataObject) -> None:
    largest = 32 * units
    overlap = data.draw(st.integers(0, largest // 2))
    axis = axis_tiles(length, largest, overlap)
    ends = [start + axis.tile for start in axis.starts]
    assert axis.tile <= largest
    assert axis.tile % 32 == 0
    assert axis.starts[0] == 0
    assert length <= ends[-1] < length + 32 or len(axis.starts) == 1
    assert all(start % 32 == 0 for start in axis.starts)
    assert all(end - start >= overlap for end, start in zip(ends, axis.starts[1:], strict=False))


@given(st.integers(1, 50), st.integers(0, 200))
def test_mirroring_is_numpys(length: int, more: int) -> None:
    assert np.array_equal(reflect_indices(length, length + more), np.pad(np.arange(length), (0, more), "reflect"))


def _two_channels(tiles: np.ndarray) -> np.ndarray:
    return tf.sigmoid(tiles[..., :2].astype(np.float32) / 64.0).numpy()


_pointwise = TiledNetwork(_two_channels, CONFIG)


@settings(max_examples=25)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 99))
def test_tiles_leave_no_seam(height: int, width: int, seed: int) -> None:
    """Of a network that looks at single pixels only."""
    image = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    expected = tf.sigmoid(image[..., :2].astype(np.float32) / 64.0).numpy()
    (values,) = _pointwise.whole_images([ScaledImage(array_source(image), CONFIG.normalization, as_is=True)])
    np.testing.assert_allclose(values, expected, atol=1e-6)


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(16, 120), st.integers(0, 99))
def test_blocks_leave_no_seam(height: int, width: int, side: int, seed: int) -> None:
    """Each nucleus no larger than the margin comes whole from one block."""
    rng = np.random.default_rng(seed)
    drawn = np.zeros((height, width), np.uint8)
    for _ in range(12):
        centre = int(rng.integers(0, width)), int(rng.integers(0, height))
        cv2.circle(drawn, centre, int(rng.integers(1, 9)), 1, -1)
    labels = cv2.connectedComponents(drawn, connectivity=4, ltype=cv2.CV_32S)[1]
    assembled = AssembledLabels(np.zeros((height, width), np.int32))
    for block in plan_blocks((height, width), side, margin=200):
        region = block.seen
        assembled.add(nuclei_of_block(labels[region.rows, region.columns], block), region)
    assert assembled.count == labels.max()
    assert np.array_equal(assembled.labels > 0, labels > 0)
    pairs = {(int(a), int(b)) for a, b in zip(labels.ravel(), assembled.labels.ravel(), strict=True)}
    assert len(pairs) == len(np.unique(labels))


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """The bytes with a part of them replaced, or without their end."""
    start = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        return content[:start]
    new = data.draw(st.binary(min_size=1, max_size=16))
    return content[:start] + new + content[start + len(new) :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


RECORD = encode_record("a", *generated_image(1, 40, 40))


@given(st.data())
def test_damaged_records(data: st.DataObject) -> None:
    with suppress(IntegrityError):
        _, image, labels = decode_record(damaged(RECORD, data))
        assert image.dtype == np.uint8
        assert labels.dtype == np.uint16


@given(data=st.data())
def test_damaged_shards(folder: Path, data: st.DataObject) -> None:
    path = folder / "shard.tfrecord"
    write_shard(path, [b"one", b"the other" * 3, b""])
    path.write_bytes(damaged(path.read_bytes(), data))
    with suppress(IntegrityError):
        shard = ShardFile.open(path)
        assert sum(len(shard.read(number)) for number in range(len(shard))) <= path.stat().st_size


@given(data=st.data())
def test_damaged_arrays(folder: Path, data: st.DataObject) -> None:
    path = folder / "arrays.npz"
    save_arrays(path, [np.arange(6.0), np.ones((2, 3), np.float32)])
    path.write_bytes(damaged(path.read_bytes(), data))
    with suppress(IntegrityError):
        load_arrays(path)


@pytest.fixture(scope="module")
def weights(folder: Path) -> bytes:
    path = folder / "small.weights.h5"
    small_network().save_weights(path)
    return path.read_bytes()


def small_network():
    import keras

    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_weights(folder: Path, weights: bytes, data: st.DataObject) -> None:
    path = folder / "damaged.weights.h5"
    path.write_bytes(damaged(weights, data))
    with suppress(ModelError):
        load_weights(small_network(), path)


@given(st.data())
def test_damaged_configurations(data: st.DataObject) -> None:
    with suppress(ModelError):
        read_model_config(damaged(CONFIG.model_dump_json().encode(), data), "x")


def test_progress_survives() -> None:
    """Also before the first validation, when the best score is minus infinity."""
    for progress in (Progress(), Progress(epochs_done=3, best_score=0.5, history=[{"epoch": 2.0, "loss": 0.1}])):
        assert Progress.model_validate_json(progress.model_dump_json()) == progress


@pytest.mark.parametrize(
    ("stored", "epochs", "best"),
    [
        ({"best_epoch": -1, "history": []}, [], 0),
        ({"best_epoch": -1, "history": [{"epoch": 0.0}]}, [1.0], 0),
        ({"best_epoch": 1, "history": [{"epoch": 0.0}, {"epoch": 1.0}]}, [1.0, 2.0], 2),
        ({"best_epoch": 0, "history": [{"epoch": 1.0}]}, [1.0], 0),
        ({"best_epoch": 1, "history": [{"epoch": 1.0}, {"epoch": 2.0}]}, [1.0, 2.0], 1),
    ],
)
def test_checkpoints_of_older_versions_count_epochs_from_one(
    stored: dict[str, Any], epochs: list[float], best: int
) -> None:
    found = Progress.model_validate(stored)
    assert [metrics["epoch"] for metrics in found.history] == epochs
    assert found.best_epoch == best
    assert Progress.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("history", [[1], [[]], "x", [{}], [{"epoch": "x"}], None])
def test_damaged_checkpoints_end_in_a_validation_error(history: Any) -> None:
    with suppress(ValidationError):
        Progress.model_validate({"best_epoch": -1, "history": history})
    with suppress(ValidationError):
        Progress.model_validate({"history": history})
