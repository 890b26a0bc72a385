import itertools
import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from nucleus.config.recipe import AugmentOptions, LossOptions
from nucleus.data.generated import generated_image
from nucleus.data.pipeline import Feed, training_batches
from nucleus.data.reading import SplitReader
from nucleus.data.sampling import epoch_plan
from nucleus.data.shards import ShardFile, encode_record, write_shard
from nucleus.errors import IntegrityError, ModelError, WeightsError
from nucleus.model.architecture import InstanceSettings, ModelConfig, read_model_config
from nucleus.model.files import load_encoder_weights, load_model
from nucleus.model.losses import image_losses
from nucleus.model.targets import pixel_classes
from nucleus.model.tiling import TiledNetwork, reflect_indices, tile_starts
from nucleus.model.unet import build_unet, calibrate_encoder, decoder_variables, encoder_of, encoder_variables
from nucleus.predict.instances import label_nuclei
from nucleus.predict.measurement import measure_nuclei

CONFIG = ModelConfig(encoder="mobilenet_v2", decoder_channels=[8, 8, 8, 8, 8], tile=64, overlap=16)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return build_unet(CONFIG)


def test_pixel_classes() -> None:
    labels = np.zeros((1, 7, 8), np.int32)
    labels[0, 1:6, 0:4] = 1
    labels[0, 1:6, 4:8] = 2  # touches the first, and both the image's edge
    classes = pixel_classes(tf.constant(labels))[0].numpy()
    expected = np.zeros((7, 8), int)
    expected[1:6] = 2
    expected[2:5, 0:3] = expected[2:5, 5:8] = 1
    assert (classes == expected).all()


def test_losses_by_hand() -> None:
    logits = tf.zeros((2, 1, 2, 3))
    classes = tf.constant([[[0, 2]], [[1, 1]]])
    found = image_losses(logits, classes, LossOptions(border_weight=3.0, dice=0.0)).numpy()
    assert found == pytest.approx([np.log(3) * (1 + 3) / 2, np.log(3)], rel=1e-6)
    with_dice = image_losses(logits, classes, LossOptions(border_weight=3.0, dice=1.0)).numpy()
    third = 1 / 3
    body = (0 + 1) / (2 * third + 0 + 1)
    border = (2 * third + 1) / (2 * third + 1 + 1)
    assert with_dice[0] - found[0] == pytest.approx(1 - (body + border) / 2, rel=1e-5)


def test_tiles_cover_and_blend(model: keras.Model) -> None:
    for length in (1, 63, 64, 65, 100, 200, 257):
        starts = tile_starts(length, 64, 16)
        covered = np.zeros(max(length, 64), int)
        for start in starts:
            covered[start : start + 64] += 1
        assert covered.min() >= 1
        assert starts[0] == 0
        assert all(b - a <= 48 for a, b in itertools.pairwise(starts))
    assert reflect_indices(1, 4).tolist() == [0, 0, 0, 0]
    network = TiledNetwork(model, 64, 16)
    for shape in ((64, 64), (1, 1), (30, 200), (100, 70)):
        image = np.random.default_rng(0).integers(0, 255, (*shape, 3)).astype(np.uint8)
        probabilities = network(image)
        assert probabilities.shape == (*shape, 3)
        assert probabilities.sum(axis=-1) == pytest.approx(1, abs=1e-4)
    whole = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    direct = tf.nn.softmax(model(whole[np.newaxis].astype(np.float32), training=False))[0].numpy()
    assert network(whole) == pytest.approx(direct, abs=1e-6)


def test_touching_nuclei_are_told_apart() -> None:
    labels = np.zeros((40, 60), np.int32)
    y, x = np.mgrid[:40, :60]
    labels[(y - 20) ** 2 + (x - 18) ** 2 <= 144] = 1
    labels[((y - 20) ** 2 + (x - 41) ** 2 <= 144) & (labels == 0)] = 2
    labels[2:7, 54:59] = 3
    classes = pixel_classes(tf.constant(labels[np.newaxis]))[0].numpy()
    probabilities = np.eye(3, dtype=np.float32)[classes] * 0.9 + 0.03
    found = label_nuclei(probabilities, InstanceSettings(min_area=20))
    assert found.max() == 3
    assert ((found > 0) == (labels > 0)).all()
    for label in (1, 2):
        values, counts = np.unique(found[labels == label], return_counts=True)
        assert counts.max() / counts.sum() > 0.95, values
    assert label_nuclei(probabilities, InstanceSettings(min_area=30)).max() == 2
    empty = np.zeros((5, 5, 3), np.float32)
    empty[..., 0] = 1
    assert label_nuclei(empty, InstanceSettings()).max() == 0


def test_ground_between_nuclei_stays_ground_and_holes_in_nuclei_do_not() -> None:
    y, x = np.mgrid[:160, :160]
    labels = np.zeros((160, 160), np.int32)
    for i in range(18):
        cy, cx = 80 + 57 * np.sin(i * np.pi / 9), 80 + 57 * np.cos(i * np.pi / 9)
        labels[((y - cy) ** 2 + (x - cx) ** 2 <= 11**2) & (labels == 0)] = i + 1
    probabilities = np.eye(3, dtype=np.float32)[pixel_classes(tf.constant(labels[np.newaxis]))[0].numpy()]
    hole = (slice(79, 82), slice(136, 139))
    probabilities[hole] = (1, 0, 0)
    found = label_nuclei(probabilities, InstanceSettings())
    assert found.max() == 18
    assert found[80, 80] == 0
    assert (found[hole] > 0).all()
    assert ((found > 0) == (labels > 0)).all()


def test_measurements_of_a_square() -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[0:4, 2:6] = 1
    labels[10:14, 10:18] = 2
    image = np.zeros((20, 20, 3), np.uint8)
    image[..., 0] = 50
    rows = measure_nuclei("a.png", image, labels)
    assert [(r["label"], r["area"], r["centroid_x"], r["centroid_y"], r["touches_edge"]) for r in rows] == [
        (1, 16, 3.5, 1.5, True),
        (2, 32, 13.5, 11.5, False),
    ]
    assert (rows[0]["mean_red"], rows[0]["mean_green"], rows[0]["solidity"]) == (50, 0, 1)
    assert measure_nuclei("e", image, np.zeros((20, 20), np.int32)) == []


def test_random_encoders_are_calibrated() -> None:
    keras.utils.set_random_seed(1)
    model = build_unet(CONFIG)
    images = np.stack([generated_image(seed, 64, 64)[0] for seed in range(4)])
    scaled = images.astype(np.float32) / 127.5 - 1
    faded = float(np.std(encoder_of(model)(scaled)[-1]))
    calibrate_encoder(model, images)
    calibrated = float(np.std(encoder_of(model)(scaled)[-1]))
    assert calibrated > 0.1
    assert calibrated > 3 * faded
    assert not any("bn" in variable.path.lower() for variable in encoder_variables(model))


def test_the_network_never_looks_across_the_batch() -> None:
    keras.utils.set_random_seed(2)
    model = build_unet(CONFIG)
    images = np.stack([generated_image(seed, 64, 64)[0] for seed in range(4)])
    calibrate_encoder(model, images)
    batch = images.astype(np.float32)
    together = model(batch, training=True).numpy()
    alone = np.concatenate([model(batch[i : i + 1], training=True).numpy() for i in range(4)])
    assert together == pytest.approx(alone, abs=1e-4)
    assert together == pytest.approx(model(batch, training=False).numpy(), abs=1e-4)
    assert len(encoder_variables(model)) + len(decoder_variables(model)) == len(model.trainable_variables)
    assert any("Conv1" in variable.path for variable in encoder_variables(model))
    assert any("stem" in variable.path for variable in decoder_variables(model))


def test_models_are_rebuilt_from_json_and_weights(model: keras.Model, tmp_path: Path) -> None:
    model.save_weights(tmp_path / "model.weights.h5")
    (tmp_path / "model.json").write_text(CONFIG.model_dump_json())
    again, config = load_model(tmp_path)
    assert config == CONFIG
    image = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3)).astype(np.float32)
    assert (again(image, training=False).numpy() == model(image, training=False).numpy()).all()
    other = CONFIG.model_copy(update={"decoder_channels": [16, 8, 8, 8, 8]})
    (tmp_path / "model.json").write_text(other.model_dump_json())
    with pytest.raises(ModelError, match="do not fit"):
        load_model(tmp_path)


def test_configurations_that_cannot_be_read() -> None:
    newer = json.dumps({**CONFIG.model_dump(), "format": 2, "unknown": 1})
    with pytest.raises(ModelError, match=r"found format 2\. A newer version"):
        read_model_config(newer.encode(), "m")
    for damaged in (b"", b"{", b"[]", b'{"format": 1}', b'{"format": 1, "encoder": "x"}'):
        with pytest.raises(ModelError, match="damaged"):
            read_model_config(damaged, "m")


def test_wrong_encoder_weights(model: keras.Model, tmp_path: Path) -> None:
    (tmp_path / "x.weights.h5").write_bytes(b"no HDF5")
    with pytest.raises(WeightsError, match="do not fit"):
        load_encoder_weights(encoder_of(model), tmp_path / "x.weights.h5")


def feed(path: Path, count: int, rank: int, world: int, batch: int, augment: AugmentOptions) -> Feed:
    return Feed(
        reader=SplitReader(
            lambda _: ShardFile.open(path),
            lambda epoch: epoch_plan([count], seed=5, epoch=epoch, rank=rank, world=world, global_batch=batch),
        ),
        crop=64,
        batch=batch // world,
        augment=augment,
        seed=5,
        threads=2,
    )


def test_batches_are_the_same_over_any_number_of_workers(tmp_path: Path) -> None:
    path = tmp_path / "s.tfrecord"
    write_shard(path, (encode_record(f"n{i}", *generated_image(i, 40 + 20 * i, 90)) for i in range(5)))
    alone = list(training_batches(feed(path, 5, 0, 1, 4, AugmentOptions()), range(2)))
    parts = [list(training_batches(feed(path, 5, rank, 2, 4, AugmentOptions()), range(2))) for rank in range(2)]
    assert len(alone) == len(parts[0]) == 2
    for step in range(2):
        images = np.concatenate([part[step][0].numpy() for part in parts])
        order = [0, 2, 1, 3]  # worker 0 has places 0 and 2 of the global batch
        assert (images[order] == alone[step][0].numpy()).all()
    resumed = list(training_batches(feed(path, 5, 0, 1, 4, AugmentOptions()), range(1, 2)))
    assert (resumed[0][0].numpy() == alone[1][0].numpy()).all()
    assert (alone[0][0].numpy() != alone[1][0].numpy()).any()


def test_crops_keep_image_and_labels_together(tmp_path: Path) -> None:
    path = tmp_path / "s.tfrecord"
    labels = generated_image(3, 50, 200)[1]
    image = np.repeat((labels[..., np.newaxis] % 256).astype(np.uint8), 3, axis=2)
    write_shard(path, [encode_record("n", image, labels)])
    plain = AugmentOptions(scale=0.0, invert=0.0, grey=0.0, contrast=0.0, brightness=0.0)
    for images, found in training_batches(feed(path, 1, 0, 1, 1, plain), range(5)):
        assert images.shape == (1, 64, 64, 3)
        assert (images.numpy()[..., 0] == found.numpy() % 256).all()  # the same pixels, mirrored and turned


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tfrecord"
    write_shard(path, [encode_record("n", *generated_image(0, 32, 32))])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match="ends inside"):
        ShardFile.open(path)
