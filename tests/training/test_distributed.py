"""What one step does, on a network small enough to follow: clipping, accumulation, averages, schedules, precision."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from nucleus.config.recipe import Precision, Recipe
from nucleus.config.settings import parse_recipe
from nucleus.model.architecture import config_of_recipe
from nucleus.model.unet import build_unet, decoder_variables, encoder_variables
from nucleus.training.distributed import TrainingStep, Workers, set_precision
from nucleus.training.optimizer import ParameterGroup, active_groups, averaged, parameter_groups


@pytest.fixture(scope="module")
def workers() -> Workers:
    return Workers()


def toy(rate: float = 0.1, momentum: float | None = None) -> tuple[keras.Model, ParameterGroup]:
    """Mean over pixels and channels, times a weight: each image's output is weight * mean."""
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, layer(keras.layers.GlobalAveragePooling2D()(inputs)))
    return model, ParameterGroup("toy", 0, list(model.trainable_variables), keras.optimizers.SGD(rate), momentum)


def squares(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    return tf.square(outputs[:, 0] - tf.cast(targets[:, 0, 0], tf.float32))


def batches(count: int = 4) -> Iterator[Any]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 3, (count, 4, 4, 3)), rng.integers(0, 3, (count, 4, 4))
    data = tf.data.Dataset.from_tensors((images.astype(np.uint8), labels.astype(np.int32)))
    return iter(data.repeat())


def weights_after(workers: Workers, steps: int, **options: Any) -> np.ndarray:
    model, group = toy()
    TrainingStep(workers, model, [group], squares, 4, **options).run(batches(), steps)
    return model.get_weights()[0]


def test_accumulation_changes_nothing_but_memory(workers: Workers) -> None:
    whole = weights_after(workers, 3)
    assert not np.allclose(whole, 1.0)
    for parts in (2, 4):
        assert weights_after(workers, 3, accumulation=parts) == pytest.approx(whole, abs=1e-6)


def test_clipping_bounds_the_norm_of_the_whole_gradient(workers: Workers) -> None:
    free = 1.0 - weights_after(workers, 1)
    norm = float(np.linalg.norm(free))
    clipped = 1.0 - weights_after(workers, 1, global_clipnorm=norm / 0.1 / 2)  # steps are 0.1 times the gradient
    assert clipped == pytest.approx(free / 2, rel=1e-4)
    assert 1.0 - weights_after(workers, 1, global_clipnorm=norm / 0.1 * 2) == pytest.approx(free, rel=1e-6)


def test_steps_per_execution_changes_nothing(workers: Workers) -> None:
    model, group = toy()
    step, data = TrainingStep(workers, model, [group], squares, 4), batches()
    losses = [step.run(data, 1).loss for _ in range(6)]
    assert model.get_weights()[0].tolist() == weights_after(workers, 6).tolist()
    again, group = toy()
    assert TrainingStep(workers, again, [group], squares, 4).run(batches(), 6).loss == pytest.approx(
        sum(losses), rel=1e-6
    )


def test_xla_computes_the_same(workers: Workers) -> None:
    assert weights_after(workers, 3, jit_compile=True) == pytest.approx(weights_after(workers, 3), abs=1e-6)


@pytest.mark.parametrize(
    ("precision", "policy", "rounds"),
    [
        ("float32", "float32", False),
        ("tensor_float32", "float32", True),
        ("mixed_bfloat16", "mixed_bfloat16", True),
    ],
)
def test_factors_are_rounded_only_where_the_recipe_says_so(precision: Precision, policy: str, rounds: bool) -> None:
    try:
        set_precision(precision)
        assert keras.mixed_precision.global_policy().name == policy
        assert tf.config.experimental.tensor_float_32_execution_enabled() == rounds
    finally:
        set_precision("float32")


def test_averages_follow_the_weights_and_give_way_to_them(workers: Workers) -> None:
    model, group = toy(momentum=0.5)
    step, data = TrainingStep(workers, model, [group], squares, 4), batches()
    expected = model.get_weights()[0]
    for number in range(12):
        step.run(data, 1)
        momentum = min(0.5, (1 + number) / (10 + number))
        expected = momentum * expected + (1 - momentum) * model.get_weights()[0]
    trained = model.get_weights()[0]
    assert group.averages[0].numpy() == pytest.approx(expected, abs=1e-6)
    with averaged([group]):
        assert model.get_weights()[0] == pytest.approx(expected, abs=1e-6)
        assert (model.get_weights()[0] != trained).any()
    assert (model.get_weights()[0] == trained).all()
    plain, without = toy()
    with averaged([without]):
        assert (plain.get_weights()[0] == 1).all()


def unet_recipe(**changes: Any) -> Recipe:
    content = {
        "model": "m",
        "dataset": "d",
        "network": {"decoder_channels": [8, 8, 8, 8, 8], "unfreeze_epoch": 2},
        "input": {"crop": 64, "batch_size": 2, "tile": 64, "overlap": 16},
        "optimizer": {"epochs": 4, "warmup_steps": 5, "learning_rate": 1e-2, "final_learning_rate": 1e-3},
        **changes,
    }
    return parse_recipe(content, "test")


@pytest.mark.slow
def test_the_encoder_is_trained_from_its_epoch_on(workers: Workers) -> None:
    recipe = unet_recipe()
    model = build_unet(config_of_recipe(recipe))
    groups = parameter_groups(model, recipe, 10)
    assert [group.name for group in active_groups(groups, 1)] == ["decoder"]
    assert [group.name for group in active_groups(groups, 2)] == ["decoder", "encoder"]
    assert len(parameter_groups(model, unet_recipe(network={"decoder_channels": [8] * 5}), 10)) == 1
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (2, 64, 64, 3)), rng.integers(0, 2, (2, 64, 64))
    batch = (tf.constant(images.astype(np.uint8)), tf.constant(labels.astype(np.int32)))
    before = [v.numpy() for v in encoder_variables(model)]
    decoder = [v.numpy() for v in decoder_variables(model)]
    statistics = [w.numpy() for w in model.non_trainable_variables]

    def losses(logits: tf.Tensor, truth: tf.Tensor) -> tf.Tensor:
        entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=truth, logits=logits)
        return tf.reduce_mean(entropy, axis=(1, 2))

    def run(epoch: int) -> None:
        data = iter(tf.data.Dataset.from_tensors(batch).repeat())
        TrainingStep(workers, model, active_groups(groups, epoch), losses, 2).run(data, 2)

    run(1)
    assert all((v.numpy() == b).all() for v, b in zip(encoder_variables(model), before, strict=True))
    assert any((v.numpy() != d).any() for v, d in zip(decoder_variables(model), decoder, strict=True))
    run(2)
    assert any((v.numpy() != b).any() for v, b in zip(encoder_variables(model), before, strict=True))
    assert all((w.numpy() == s).all() for w, s in zip(model.non_trainable_variables, statistics, strict=True))


def test_learning_rates_by_hand() -> None:
    recipe = unet_recipe()
    decoder, encoder = parameter_groups(build_unet(config_of_recipe(recipe)), recipe, 10)

    def rate(group: ParameterGroup, step: int) -> float:
        group.optimizer.iterations.assign(step)
        return float(group.optimizer.learning_rate)

    def cosine(step: int) -> float:  # of 35 steps after 5 of warm-up
        return 1e-3 + (1e-2 - 1e-3) * 0.5 * (1 + np.cos(np.pi * (step - 5) / 35))

    assert [rate(decoder, step) for step in (0, 1, 5)] == pytest.approx([0.0, 2e-3, 1e-2], rel=1e-5)
    assert [rate(decoder, step) for step in (6, 20, 40)] == pytest.approx([cosine(s) for s in (6, 20, 40)], rel=1e-4)
    # Its step 0 is the run's step 20; it is a tenth, and warms up for 5 steps of its own.
    expected = [0.0, 0.1 * cosine(22) * 2 / 5, 0.1 * cosine(25), 0.1 * cosine(30)]
    assert [rate(encoder, step) for step in (0, 2, 5, 10)] == pytest.approx(expected, rel=1e-4)


def test_a_larger_batch_raises_the_rate_of_both_optimizers() -> None:
    model = build_unet(config_of_recipe(unet_recipe()))
    options = {"epochs": 4, "warmup_steps": 5, "learning_rate": 1e-2, "final_learning_rate": 1e-3}
    once = parameter_groups(model, unet_recipe(optimizer=options), 10)
    twice = parameter_groups(model, unet_recipe(optimizer={**options, "learning_rate_batch": 1}), 10)
    for one, two in zip(once, twice, strict=True):
        for step in (2, 5, 15, 30):
            one.optimizer.iterations.assign(step)
            two.optimizer.iterations.assign(step)
            assert float(two.optimizer.learning_rate) == pytest.approx(2 * float(one.optimizer.learning_rate), rel=1e-5)


def test_bfloat16_computes_the_same_to_its_precision() -> None:
    recipe = unet_recipe()
    image = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3)).astype(np.float32)
    networks = []
    try:
        for policy in ("float32", "mixed_bfloat16"):
            keras.mixed_precision.set_global_policy(policy)
            keras.utils.set_random_seed(4)
            networks.append(build_unet(config_of_recipe(recipe)))
    finally:
        keras.mixed_precision.set_global_policy("float32")
    exact, mixed = networks
    assert {v.dtype for v in mixed.variables} == {"float32"}
    conv = mixed.get_layer("conv_5a")
    assert (conv.compute_dtype, mixed.get_layer("logits").compute_dtype) == ("bfloat16", "float32")
    wanted, found = (tf.nn.softmax(model(image, training=True)).numpy() for model in (exact, mixed))
    assert found.dtype == np.float32
    assert (found != wanted).any()
    assert found == pytest.approx(wanted, abs=0.05)
