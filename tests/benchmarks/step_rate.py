"""`step_rate`: steps of one worker against bare Keras `fit`."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from nucleus.config.settings import parse_recipe
from nucleus.data.cache import ShardCache
from nucleus.data.pipeline import training_batches
from nucleus.data.synthetic import generated_image
from nucleus.model.architecture import config_of_recipe
from nucleus.model.losses import image_losses, pixel_targets
from nucleus.model.unet import build_unet
from nucleus.training.distributed import TrainingStep, Workers, mask_scores
from nucleus.training.optimizer import parameter_groups
from tests.benchmarks.ingest import feed
from tests.benchmarks.measure import RECIPE, generated_dataset, in_turn, report, temporary_store

STEPS, THREADS = 16, 2
RECIPE_OF_BENCH = parse_recipe(RECIPE, "bench")


def limit_threads(threads: int) -> None:
    """As a worker of that many cores has them."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(2)


def losses(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """The recipe's loss of each image."""
    return image_losses(logits, targets, RECIPE_OF_BENCH.network.heads, RECIPE_OF_BENCH.loss)


def crops(batch: int = 8) -> tf.data.Dataset:
    """Batches from memory, for ever."""
    samples = [generated_image(seed, 192, 192) for seed in range(32)]
    images = np.stack([image for image, _ in samples])
    targets = np.stack([pixel_targets(labels, RECIPE_OF_BENCH.network.heads) for _, labels in samples])
    options = tf.data.Options()
    options.autotune.enabled = False  # with it each `fit` ends with a wait of up to 20 s for tf.data's own thread
    data = tf.data.Dataset.from_tensor_slices((images, targets)).repeat().batch(batch, drop_remainder=True)
    return data.prefetch(2).with_options(options)


def our_steps(workers: Workers, batches: Iterator[Any]) -> Callable[[], Any]:
    """16 of our steps."""
    recipe = RECIPE_OF_BENCH
    model = build_unet(config_of_recipe(recipe))
    groups = parameter_groups(model, recipe, steps_per_epoch=1000)
    step = TrainingStep(
        workers, model, groups, losses, recipe.input.batch_size, score=mask_scores(recipe.network.heads)
    )

    def run() -> None:
        for _ in range(STEPS // recipe.optimizer.steps_per_execution):
            step.run(batches, recipe.optimizer.steps_per_execution)

    return run


def step_rate() -> None:
    """Steps from memory on both sides, and ours from shards as well."""
    limit_threads(THREADS)
    workers = Workers()
    recipe = RECIPE_OF_BENCH
    model = build_unet(config_of_recipe(recipe))
    model.get_layer("encoder").trainable = False
    options = recipe.optimizer
    model.compile(
        keras.optimizers.AdamW(options.learning_rate, options.weight_decay),
        loss=lambda truth, logits: losses(logits, truth),
        jit_compile=False,
        steps_per_execution=options.steps_per_execution,
    )
    data = crops()

    def fit() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a tf.data.Dataset is not shuffled by fit
            model.fit(data, steps_per_epoch=STEPS, verbose=0)

    with temporary_store() as root:
        dataset = generated_dataset(root, 120)
        from_shards = iter(training_batches(feed(dataset, ShardCache(root / "cache")), range(10_000)))
        sides = {
            "memory": our_steps(workers, iter(data)),
            "keras": fit,
            "shards": our_steps(workers, from_shards),
        }
        found = in_turn(sides, rounds=8, warm_up=True)
    report(
        "step_rate",
        found["keras"] / found["memory"],
        ratio_from_shards=found["keras"] / found["shards"],
        ours_steps_s=STEPS / found["memory"],
        keras_steps_s=STEPS / found["keras"],
    )
