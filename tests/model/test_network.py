import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from nucleus.config.encoders import ENCODER_NAMES, ENCODERS, EncoderName
from nucleus.config.recipe import AugmentOptions, Heads, LossOptions, NormalizationOptions
from nucleus.config.settings import parse_recipe
from nucleus.data.pipeline import Feed, training_batches, training_sample
from nucleus.data.reader import SplitReader
from nucleus.data.sampling import epoch_plan
from nucleus.data.shards import ShardFile, encode_record, write_shard
from nucleus.data.synthetic import generated_image
from nucleus.errors import IntegrityError, ModelError, RecipeError, WeightsError
from nucleus.model.architecture import (
    ModelConfig,
    activations,
    config_of_recipe,
    maps_of,
    read_model_config,
    recipe_from_start,
)
from nucleus.model.engines import KerasEngine
from nucleus.model.fast_network import fast_network
from nucleus.model.losses import image_losses, loss_of_values, pixel_targets
from nucleus.model.tiling import Region, TiledNetwork, axis_tiles, reflect_indices
from nucleus.model.unet import (
    build_unet,
    calibrate_encoder,
    decoder_variables,
    encoder_of,
    encoder_variables,
    load_encoder_weights,
    load_model,
)
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.source import array_source
from nucleus.registry.encoder_weights import _layout

PLAIN = NormalizationOptions(method="none")
CONFIG = ModelConfig(
    encoder="mobilenet_v2", decoder_channels=[8, 8, 8, 8, 8], heads="both", normalization=PLAIN, tile=64, overlap=16
)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return build_unet(CONFIG)


def targets_of(labels: np.ndarray, heads: Heads) -> np.ndarray:
    return np.stack([pixel_targets(one, heads) for one in labels])


def test_pixel_classes() -> None:
    labels = np.zeros((1, 7, 8), np.int32)
    labels[0, 1:6, 0:4] = 1
    labels[0, 1:6, 4:8] = 2  # touches the first, and both the image's edge
    classes = pixel_targets(labels[0], "border")[..., 0]
    expected = np.zeros((7, 8), int)
    expected[1:6] = 2
    expected[2:5, 0:3] = expected[2:5, 5:8] = 1
    assert (classes == expected).all()


def test_distance_targets_by_hand() -> None:
    labels = np.zeros((2, 9, 12), np.int32)
    labels[0, 1:6, 1:6] = 7  # 5 x 5: rings at 1 and 2, and the middle at 3
    labels[0, 1:6, 6:9] = 2  # touches it; 5 x 3: its middle line at 2
    labels[1, :, :] = 7  # goes on beyond every edge
    found = targets_of(labels, "both")[..., 1]
    expected = np.zeros((9, 12))
    expected[1:6, 1:6] = 1 / 3
    expected[2:5, 2:5] = 2 / 3
    expected[3, 3] = 1
    expected[1:6, 6:9] = 1 / 2
    expected[2:5, 7] = 1
    assert found[0] == pytest.approx(expected, abs=1e-6)
    assert (found[1] == 1).all()


def test_distances_are_close_to_euclidean_ones() -> None:
    labels = generated_image(5, 128, 128)[1].astype(np.int32)
    found = pixel_targets(labels, "distance")[..., 1]
    assert ((found > 0) == (labels > 0)).all()
    for label in range(1, labels.max() + 1):
        inside = labels == label
        if inside[[0, -1]].any() or inside[:, [0, -1]].any():
            continue  # cut by the edge, beyond which our nuclei go on
        exact = ndimage.distance_transform_edt(inside)
        assert found[inside].max() == 1
        assert np.corrcoef(found[inside], exact[inside])[0, 1] > 0.95


def test_losses_by_hand() -> None:
    logits = tf.zeros((2, 3, 3, 3))
    labels = np.zeros((2, 3, 3), np.int32)
    labels[0, 1, 1] = 1  # one pixel, which is border; the other image is all body: a nucleus that goes on beyond it
    labels[1] = 1
    found = image_losses(
        logits, targets_of(labels, "border"), "border", LossOptions(border_weight=3.0, dice=0.0)
    ).numpy()
    assert found == pytest.approx([np.log(3) * (8 + 3) / 9, np.log(3)], rel=1e-6)
    with_dice = image_losses(
        logits, targets_of(labels, "border"), "border", LossOptions(border_weight=3.0, dice=1.0)
    ).numpy()
    body, border = 1 / (9 / 3 + 1), (2 / 3 + 1) / (9 / 3 + 1 + 1)
    assert with_dice[0] - found[0] == pytest.approx(1 - (body + border) / 2, rel=1e-5)


def test_the_distance_has_its_own_loss() -> None:
    labels = np.zeros((1, 9, 9), np.int32)
    labels[0, 2:7, 2:7] = 1
    target = pixel_targets(labels[0], "both")[..., 1].astype(np.float64)
    for heads, others in (("both", 3), ("distance", 1)):
        options = LossOptions(dice=0.0, distance=2.0, border_weight=1.0)
        perfect = np.concatenate(
            [np.zeros((1, 9, 9, others)), np.log(target / (1 - target + 1e-9) + 1e-9)[None, ..., None]], -1
        )
        undecided = perfect.copy()
        undecided[..., -1] = 0
        low, high = (
            float(image_losses(tf.constant(x, tf.float32), targets_of(labels, heads), heads, options)[0])
            for x in (perfect, undecided)
        )
        t = np.clip(target, 1e-12, 1 - 1e-12)
        entropy = np.log(2) + t * np.log(t) + (1 - t) * np.log(1 - t)
        assert high - low == pytest.approx(2 * entropy.mean(), abs=1e-3)
        assert low == pytest.approx(np.log(3 if heads == "both" else 2), abs=1e-3)


@pytest.mark.parametrize("heads", ["border", "distance", "both"])
def test_the_loss_of_values_is_that_of_training(heads: Heads) -> None:
    channels = {"border": 3, "distance": 2, "both": 4}[heads]
    logits = 2 * tf.random.stateless_normal((2, 64, 48, channels), (1, 2))
    labels = np.stack([generated_image(seed, 64, 48)[1] for seed in (1, 2)]).astype(np.int32)
    labels[1, :9] = 65535
    options = LossOptions(border_weight=3.0, dice=0.7, distance=2.0)
    expected = image_losses(logits, targets_of(labels, heads), heads, options).numpy()
    values = activations(logits, heads).numpy()
    found = [loss_of_values(*pair, heads, options) for pair in zip(values, labels, strict=True)]
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
    certain = activations(100 * logits, heads).numpy()[0]  # 0 or 1 in float32
    assert np.isfinite(loss_of_values(certain, labels[0], heads, options))


@pytest.mark.parametrize("heads", ["border", "distance", "both"])
def test_maps_of_activations(heads: Heads) -> None:
    channels = {"border": 3, "distance": 2, "both": 4}[heads]
    values = activations(tf.random.stateless_normal((1, 5, 4, channels), (1, 2)), heads)
    maps = maps_of(values.numpy()[0], heads)
    assert maps.mask.shape == maps.interior.shape == (5, 4)
    assert 0 <= maps.mask.min() <= maps.mask.max() <= 1


def test_tiles_cover_evenly() -> None:
    for length, largest in itertools.product((1, 31, 32, 63, 64, 65, 100, 200, 257, 1000), (64, 96)):
        axis = axis_tiles(length, largest, 16)
        assert axis.tile % 32 == 0
        assert axis.tile <= largest
        assert axis.starts[0] == 0
        assert axis.starts[-1] + axis.tile >= length
        assert axis.starts[-1] + axis.tile < length + 32
        assert all(start % 32 == 0 for start in axis.starts)
        assert all(axis.tile - (b - a) >= 16 for a, b in itertools.pairwise(axis.starts))
    assert reflect_indices(1, 4).tolist() == [0, 0, 0, 0]


def values_of(network: TiledNetwork, image: np.ndarray) -> np.ndarray:
    """The values of an image (H x W x 3) that is not normalised."""
    (values,) = network.whole_images([ScaledImage(array_source(image), PLAIN)])
    return values


def test_tiles_blend(model: keras.Model) -> None:
    network = TiledNetwork(KerasEngine(model, "both"), CONFIG)
    for shape in ((64, 64), (1, 1), (30, 200), (100, 70)):
        image = np.random.default_rng(0).integers(0, 255, (*shape, 3)).astype(np.uint8)
        values = values_of(network, image)
        assert values.shape == (*shape, 4)
        assert values[..., :3].sum(axis=-1) == pytest.approx(1, abs=1e-4)
    whole = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    direct = activations(model(whole[np.newaxis].astype(np.float32), training=False), "both")[0].numpy()
    assert values_of(network, whole) == pytest.approx(direct, abs=1e-6)


def test_tiles_lie_on_the_grid_of_the_untiled_image() -> None:
    """A network that sees nothing but the cell of 32 px that a pixel is in gives the same with tiles and without."""
    image = keras.Input((None, None, 3))
    cells = keras.layers.UpSampling2D(32)(keras.layers.AveragePooling2D(32)(image))
    engine = KerasEngine(keras.Model(image, keras.layers.Conv2D(4, 1)(cells)), "both")
    pixels = np.random.default_rng(3).integers(0, 255, (150, 333, 3)).astype(np.uint8)
    tiled, untiled = (
        values_of(TiledNetwork(engine, CONFIG.model_copy(update={"tile": tile, "overlap": 32})), pixels)
        for tile in (96, 352)
    )
    assert tiled == pytest.approx(untiled, abs=1e-5)


def test_parts_of_an_image_have_the_values_of_the_whole(model: keras.Model) -> None:
    network = TiledNetwork(KerasEngine(model, "both"), CONFIG)
    image = np.random.default_rng(1).integers(0, 255, (150, 170, 3)).astype(np.uint8)
    whole = values_of(network, image)
    rows = (slice(0, 70), slice(50, 120), slice(149, 150))
    regions = [Region(r, c) for r in rows for c in (slice(0, 60), slice(40, 170))]
    asked = []

    class Read:
        shape = image.shape[:2]

        def read(self, rows: slice, columns: slice) -> np.ndarray:
            asked.append((rows.start, columns.start))
            return image[rows, columns]

    for region, values in zip(regions, network.regions(Read(), regions), strict=True):
        assert values == pytest.approx(whole[region.rows, region.columns], abs=1e-6)
    assert len(asked) == len(set(asked)), "a tile that two regions share is computed once"


def test_turns_are_averaged(model: keras.Model) -> None:
    image = np.random.default_rng(2).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    engine = KerasEngine(model, "both")
    plain, turned = TiledNetwork(engine, CONFIG), TiledNetwork(engine, CONFIG, turns=True)
    values = values_of(turned, image)
    views = [(np.rot90(image, k)[:, :: -1 if f else 1], k, f) for k in range(4) for f in (False, True)]
    back = [np.rot90(values_of(plain, np.ascontiguousarray(v))[:, :: -1 if f else 1], -k) for v, k, f in views]
    assert values == pytest.approx(np.mean(back, axis=0), abs=1e-5)
    again = values_of(turned, np.ascontiguousarray(np.rot90(image)))
    assert again == pytest.approx(np.rot90(values), abs=1e-5)


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


@pytest.mark.slow
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


def test_pixels_outside_the_receptive_field_do_not_matter(model: keras.Model) -> None:
    image = np.random.default_rng(3).integers(0, 255, (1, 32, 1600, 3)).astype(np.float32)
    other = image.copy()
    other[:, :, -64:] = 0
    one, two = (model(x, training=False).numpy() for x in (image, other))
    assert (one[:, :, -64:] != two[:, :, -64:]).any()
    assert one[:, :, :600] == pytest.approx(two[:, :, :600], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "decoder"), [*((encoder, "concat") for encoder in ENCODER_NAMES), ("mobilenet_v2", "sum")]
)
def test_every_encoder_gives_a_network(encoder: EncoderName, decoder: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(3)
    network = build_unet(ModelConfig.model_validate({**CONFIG.model_dump(), "encoder": encoder, "decoder": decoder}))
    images = np.stack([generated_image(seed, 64, 96)[0] for seed in range(2)])
    change_norms(network)
    expected = network(images.astype(np.float32)).numpy()
    fast = fast_network(network)(tf.constant(images, tf.float32)).numpy()
    assert fast == pytest.approx(expected, abs=1e-4 * float(np.abs(expected).max()))
    calibrate_encoder(network, images)  # which makes a random EfficientNet magnify rounding a hundred times
    found = network(images.astype(np.float32), training=True).numpy()
    assert found.shape == (2, 64, 96, 4)
    assert found.std() > 0
    assert found == pytest.approx(network(images.astype(np.float32), training=False).numpy(), abs=1e-3)
    assert encoder_variables(network)
    encoder_of(network).save_weights(tmp_path / "x.weights.h5")
    layout = ENCODERS[encoder].layout
    assert layout in {None, _layout(tmp_path / "x.weights.h5")}  # none of an encoder that somebody adds


def change_norms(network: keras.Model) -> None:
    """Let all weights and statistics of the BatchNorm layers matter."""
    rng = np.random.default_rng(5)
    for layer in encoder_of(network).layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(rng.uniform(0.7, 1.3, layer.gamma.shape))
            layer.beta.assign(rng.uniform(-0.3, 0.3, layer.beta.shape))
            layer.moving_mean.assign(rng.uniform(-0.1, 0.1, layer.beta.shape))
            layer.moving_variance.assign(rng.uniform(0.5, 1.5, layer.beta.shape))


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["concat", "sum"])
def test_training_computes_the_gradients_of_the_network(decoder: str) -> None:
    keras.utils.set_random_seed(6)
    network = build_unet(ModelConfig.model_validate({**CONFIG.model_dump(), "encoder": "plain", "decoder": decoder}))
    images = tf.constant(np.stack([generated_image(seed, 64, 64)[0] for seed in range(2)]), tf.float32)
    change_norms(network)
    variables = [variable.value for variable in network.trainable_variables]
    found = []
    for function in (network, fast_network(network)):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            loss = tf.reduce_sum(tf.sigmoid(function(images)))
        found.append([np.array(gradient) for gradient in tape.gradient(loss, variables)])
    for expected, fast in zip(*found, strict=True):
        assert np.abs(expected).max() > 0
        assert fast == pytest.approx(expected, abs=1e-3 * float(np.abs(expected).max()))


def test_a_decoder_that_sums_starts_with_the_variance_of_its_inputs() -> None:
    keras.utils.set_random_seed(4)
    channels = [64, 64, 32, 32, 32]
    network = build_unet(CONFIG.model_copy(update={"decoder": "sum", "decoder_channels": channels}))
    images = np.stack([generated_image(seed, 64, 64)[0] for seed in range(4)])
    calibrate_encoder(network, images)
    names = [f"{name}_{level}" for level in range(1, 6) for name in ("join", "conv")]
    layers = [network.get_layer(name if name.startswith("join") else f"{name}b").output for name in names]
    found = keras.Model(network.inputs[0], layers)(images.astype(np.float32))
    sizes = [float(tf.reduce_mean(tf.square(values))) for values in found]
    assert all(0.2 < size / before < 5 for before, size in itertools.pairwise(sizes))


def test_models_of_before_the_choice_concatenate() -> None:
    stored = CONFIG.model_dump()
    del stored["decoder"]
    assert read_model_config(json.dumps(stored).encode(), "m").decoder == "concat"


def test_models_are_rebuilt_from_json_and_weights(model: keras.Model, tmp_path: Path) -> None:
    model.save_weights(tmp_path / "model.weights.h5")
    (tmp_path / "model.json").write_text(CONFIG.model_dump_json())
    again, config = load_model(tmp_path)
    assert config == CONFIG
    image = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3)).astype(np.float32)
    assert (again(image, training=False).numpy() == model(image, training=False).numpy()).all()
    other = CONFIG.model_copy(update={"decoder_channels": [16, 8, 8, 8, 8]})
    (tmp_path / "model.json").write_text(other.model_dump_json())
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_model(tmp_path)


def test_configurations_that_cannot_be_read() -> None:
    newer = json.dumps({**CONFIG.model_dump(), "format": 4, "needs": "0.9.0", "unknown": 1})
    with pytest.raises(ModelError, match=r"format 4\. .*nucleus 0\.9\.0"):
        read_model_config(newer.encode(), "m")
    with pytest.raises(ModelError, match="format 1,"):
        read_model_config(b'{"format": 1}', "m")
    for damaged in (b"", b"{", b"[]", b'{"format": 2}', b'{"format": 2, "encoder": "x"}'):
        with pytest.raises(ModelError, match="damaged"):
            read_model_config(damaged, "m")


def test_wrong_encoder_weights(model: keras.Model, tmp_path: Path) -> None:
    (tmp_path / "x.weights.h5").write_bytes(b"no HDF5")
    with pytest.raises(WeightsError, match=r"x\.weights\.h5"):
        load_encoder_weights(encoder_of(model), tmp_path / "x.weights.h5")


def feed(path: Path, count: int, rank: int, world: int, batch: int, augment: AugmentOptions) -> Feed:
    return Feed(
        reader=SplitReader(
            lambda _: ShardFile.open(path),
            lambda epoch: epoch_plan([count], seed=5, epoch=epoch, rank=rank, world=world, global_batch=batch),
        ),
        targets=partial(pixel_targets, heads="both"),
        crop=64,
        normalization=NormalizationOptions(method="none"),
        batch=batch // world,
        augment=augment,
        seed=5,
        threads=2,
    )


@pytest.mark.parametrize(("threads", "pool"), [(2, None), (8, 8)])
def test_more_samples_at_once_than_tensorflow_has_threads_get_a_pool(
    tmp_path: Path, threads: int, pool: int | None
) -> None:
    """In a worker TensorFlow has two, so that of eight samples only two were decoded at once."""
    write_shard(tmp_path / "s", (encode_record(f"n{i}", *generated_image(i, 64, 64)) for i in range(2)))
    wide = replace(feed(tmp_path / "s", 2, 0, 1, 2, AugmentOptions()), threads=threads)
    data = training_batches(wide, range(1))
    assert data.options().threading.private_threadpool_size == pool
    assert len(list(data)) == 1


def test_batches_are_the_same_over_any_number_of_workers(tmp_path: Path) -> None:
    path = tmp_path / "s.tfrecord"
    write_shard(path, (encode_record(f"n{i}", *generated_image(i, 40 + 20 * i, 90)) for i in range(5)))
    data = training_batches(feed(path, 5, 0, 1, 4, AugmentOptions()), range(2))
    shapes = [tuple(spec.shape) for spec in data.element_spec]
    assert shapes == [(4, 64, 64, 3), (4, 64, 64, 2)], "accumulation divides batches, and needs whole shapes"
    alone = list(data)
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
    shown = replace(feed(path, 1, 0, 1, 1, plain), targets=lambda crop: crop[..., np.newaxis].astype(np.float32))
    for images, found in training_batches(shown, range(5)):
        assert images.shape == (1, 64, 64, 3)
        assert (images.numpy()[..., 0] == found.numpy()[..., 0] % 256).all()  # the same pixels, mirrored and turned


NOTHING = dict.fromkeys(("scale", "invert", "grey", "contrast", "brightness"), 0.0) | {"flips": False}


def changed(image: np.ndarray, number: int = 0, **options: float) -> np.ndarray:
    """A crop of 64 px after nothing but these changes."""
    record = encode_record("n", image, np.zeros(image.shape[:2], np.uint16))
    augment = AugmentOptions.model_validate({**NOTHING, **options})
    return training_sample(record, (5, number), 64, NormalizationOptions(method="none"), augment)[0]


def test_stains_are_changed_in_coloured_crops_alone() -> None:
    stained, grey = generated_image(6, 64, 64)[0], generated_image(0, 64, 64)[0]
    assert (changed(stained) == stained).all()
    found = [changed(stained, number, hed=0.3).astype(int) for number in range(8)]
    assert all(np.abs(image - stained).mean() > 1 for image in found)
    assert all(np.corrcoef(image.ravel(), stained.ravel())[0, 1] > 0.9 for image in found)  # the same tissue
    assert len({tuple(image.mean(axis=(0, 1)).round(3)) for image in found}) == 8
    assert np.abs(changed(stained, 1, hed=1e-6).astype(int) - stained).max() <= 1  # there and back
    assert (changed(grey, 1, hed=0.3) == grey).all()


def test_shading_is_smooth_and_bounded() -> None:
    flat = np.full((64, 64, 3), 100, np.uint8)
    found = [changed(flat, number, shading=0.4).astype(float) for number in range(8)]
    assert all((image == image[..., :1]).all() for image in found)
    assert any(np.ptp(image) > 20 for image in found)
    assert all(np.abs(np.diff(image, axis=axis)).max() <= 12 for image in found for axis in (0, 1))
    assert all(image.min() >= 0 and image.max() <= 255 for image in found)


def test_blur_has_the_standard_deviation_that_is_asked_for() -> None:
    point = np.zeros((64, 64, 3), np.uint8)
    point[32, 32] = 255
    places = np.arange(64) - 32
    widths = []
    for number in range(12):
        line = changed(point, number, blur=1.0, blur_sigma=2.0)[..., 0].sum(axis=0).astype(float)
        widths.append(np.sqrt((line * places**2).sum() / line.sum()))
    assert 0.4 < min(widths) < 1
    assert 1.3 < max(widths) < 2.05


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tfrecord"
    write_shard(path, [encode_record("n", *generated_image(0, 32, 32))])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match="the last one is cut off"):
        ShardFile.open(path)


def test_the_network_of_the_start_is_taken_over() -> None:
    recipe = parse_recipe({"model": "m", "dataset": "d", "network": {"start": "old@1"}}, "r.toml")
    old = CONFIG.model_copy(update={"heads": "border", "pixel_size": 0.5})
    found = recipe_from_start(recipe, old, "old@1")
    assert config_of_recipe(found) == config_of_recipe(recipe).model_copy(
        update={"decoder_channels": [8] * 5, "heads": "border", "normalization": PLAIN, "pixel_size": 0.5}
    )
    optimizer = found.optimizer
    assert (optimizer.learning_rate, optimizer.final_learning_rate, optimizer.ema_momentum) == (1e-3, 1e-5, 0.97)
    assert parse_recipe(json.loads(found.model_dump_json()), "plan") == found


def test_keys_that_are_set_stay_or_contradict_the_start() -> None:
    same = {"encoder": "mobilenet_v2", "heads": "both", "start": "old@1"}
    content = {"model": "m", "dataset": "d", "network": same, "input": {"pixel_size": 0.25}}
    recipe = parse_recipe({**content, "optimizer": {"learning_rate": 3e-4}}, "r.toml")
    found = recipe_from_start(recipe, CONFIG, "old@1")
    assert (found.optimizer.learning_rate, found.input.pixel_size) == (3e-4, 0.25)
    other = parse_recipe({**content, "network": {**same, "heads": "border", "decoder_channels": [16] * 5}}, "r.toml")
    with pytest.raises(RecipeError, match=r"network of old@1.*decoder_channels.*heads = 'border', that of old@1 is 'b"):
        recipe_from_start(other, CONFIG, "old@1")
