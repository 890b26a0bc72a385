"""The parts of `make gpu-check`: `python -m tests.benchmarks.gpu_parts PART OPTIONS` prints a line of JSON for a row.

A row has `what`, `value` and, where there is one, `unit` and `goal`. Goals are for one H100 with 16 cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from nucleus.config.recipe import Recipe
from nucleus.config.settings import read_recipe, recipe_path
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.data.synthetic import generated_image, write_generated
from nucleus.lazy import keras, tf
from nucleus.model.architecture import config_of_recipe
from nucleus.model.engines import load_engine
from nucleus.model.losses import image_losses, pixel_targets
from nucleus.model.unet import build_unet, calibrate_encoder, decoder_variables
from nucleus.predict.model import PredictionOptions, load_pulled
from nucleus.registry.versions import find_model
from nucleus.runs.plan import RUNS
from nucleus.runs.record import HISTORY_FILE, read_history
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri
from nucleus.training.callbacks import Callback, Signals
from nucleus.training.distributed import TrainingStep, Workers, set_precision
from nucleus.training.optimizer import ParameterGroup, parameter_groups
from nucleus.training.trainer import TrainingInput, TrainingRun
from tests.benchmarks.measure import batches_in_memory, generated_crops, temporary_store
from tests.benchmarks.network_cost import cost_of

__all__ = ["PARTS", "Options", "chosen_recipe", "row"]

Options = dict[str, Any]
"""`recipe`; `data` and `weights`, paths or None; `small`, or None for small without a GPU."""

_SECONDS = 3.0
_SMALL_SECONDS = 0.2
"""Seconds for which a rate is measured, at least."""
_CROPS = 32
_ALONE = (1, 4, 16)
"""Megapixels of a call of the network."""
_SMALL = [
    "network.decoder_channels=[8, 8, 8, 8, 8]",
    "input.crop=64",
    "input.batch_size=4",
    "input.tile=64",
    "input.overlap=16",
    "optimizer.steps_per_execution=1",
    "cpus_per_worker=1",
    "gpus_per_worker=0",
]


def row(what: str, value: float | str, unit: str = "", goal: str = "") -> None:
    """Print a row."""
    print(json.dumps({"what": what, "value": value, "unit": unit, "goal": goal}), flush=True)


def has_gpu() -> bool:
    """Whether TensorFlow sees a GPU."""
    return bool(tf.config.list_physical_devices("GPU"))


def is_small(options: Options) -> bool:
    """Whether to measure with small sizes."""
    return not has_gpu() if options["small"] is None else bool(options["small"])


def chosen_recipe(options: Options, *, small: bool) -> Recipe:
    """The recipe with a random encoder that is trained, and with small sizes if these are wanted."""
    recipe = read_recipe(recipe_path(options["recipe"]), _SMALL if small else []).with_random_encoder()
    if not small:
        return recipe
    return recipe.model_copy(update={"network": recipe.network.model_copy(update={"encoder": "plain"})})


def changed(recipe: Recipe, **optimizer: Any) -> Recipe:
    """The recipe with other keys in its table `optimizer`."""
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update=optimizer)})


def rate(work: Callable[[], Any], seconds: float) -> float:
    """How often a second some work is done, after it was done once untimed."""
    work()
    started, count = time.perf_counter(), 0
    while True:
        work()
        count += 1
        if (passed := time.perf_counter() - started) >= seconds:
            return count / passed


def seconds_of(options: Options) -> float:
    """For how long a rate is measured."""
    return _SMALL_SECONDS if is_small(options) else _SECONDS


def one_gpu() -> None:
    """Prepare this process for one GPU, as `job.worker.limit_devices` prepares a worker; before TensorFlow starts."""
    os.environ.setdefault("TF_GPU_THREAD_MODE", "gpu_private")
    first = tf.config.list_physical_devices("GPU")[:1]
    for device in first:
        tf.config.set_visible_devices(first, "GPU")
        tf.config.experimental.set_memory_growth(device, enable=True)


def copied_bytes(options: Options) -> float:
    """Bytes a second that go to and from the device's memory in the best case: a copy, plus one."""
    values, times = (1 << 21, 4) if is_small(options) else (1 << 28, 20)

    @tf.function
    def copy(start: tf.Tensor) -> tf.Tensor:
        for _ in tf.range(times):
            start = start + 1.0
        return start[0]

    start = tf.zeros([values])
    return 2.0 * 4 * values * times * rate(lambda: copy(start).numpy(), seconds_of(options) / 3)


def multiplied(options: Options, dtype: str) -> float:
    """Floating-point operations a second in a product of matrices."""
    side, times = (256, 4) if is_small(options) else (8192, 10)

    @tf.function
    def product(matrix: tf.Tensor) -> tf.Tensor:
        found = matrix
        for _ in tf.range(times):
            found = tf.linalg.matmul(matrix, found)
        return found[0, 0]

    matrix = tf.cast(tf.eye(side), dtype)
    return 2.0 * side**3 * times * rate(lambda: product(matrix).numpy(), seconds_of(options) / 3)


def doctor(_: Options) -> None:
    """What `nucleus doctor` says of the GPUs."""
    from job.cluster_check import check_gpus, gpus_here

    found = check_gpus(gpus_here(), 0)
    row(f"nucleus doctor, {found.status}", found.text)
    row("cores", str(len(os.sched_getaffinity(0))), "", "16")


def device(options: Options) -> None:
    """The limits of the device: memory and arithmetic."""
    one_gpu()
    names = [
        tf.config.experimental.get_device_details(gpu)["device_name"] for gpu in tf.config.get_visible_devices("GPU")
    ]
    row("device", names[0] if names else "CPU: the figures say nothing of a GPU")
    row("TensorFlow", tf.__version__)
    row("bandwidth of a copy", copied_bytes(options) / 1e9, "GB/s")
    for name, precision, dtype in (
        ("float32", "float32", "float32"),
        ("TensorFloat-32", "tensor_float32", "float32"),
        ("bfloat16", "mixed_bfloat16", "bfloat16"),
    ):
        set_precision(precision)
        row(f"product of matrices, {name}", multiplied(options, dtype) / 1e12, "TFLOP/s")


class Trained:
    """The network of a recipe, and steps on crops in memory."""

    def __init__(self, recipe: Recipe, workers: Workers, *, encoder_trained: bool = True) -> None:
        self.recipe = recipe
        set_precision(recipe.optimizer.precision)
        self.config = config_of_recipe(recipe)
        self.model = build_unet(self.config)
        groups = parameter_groups(self.model, recipe, 1000)[: 1 + encoder_trained]
        self.step = step_of(recipe, workers, self.model, groups)
        self.batches = iter(crops(recipe))

    def rate(self, seconds: float) -> float:
        """Crops a second; a call of the graph takes as many steps as the recipe says."""
        count = self.recipe.optimizer.steps_per_execution
        return count * self.recipe.input.batch_size * rate(lambda: self.step.run(self.batches, count), seconds)

    def cost(self) -> Any:
        """What a step costs a crop, on paper."""
        side, heads = self.recipe.input.crop, self.recipe.network.heads
        targets = pixel_targets(np.zeros((1, 1), np.int32), heads).shape[-1]
        return cost_of(self.step.gradients, (1, side, side, 3), (1, side, side, targets))


def step_of(recipe: Recipe, workers: Workers, model: Any, groups: Any, accumulation: int = 1) -> TrainingStep:
    """The step of the recipe's training."""
    return TrainingStep(
        workers,
        model,
        groups,
        lambda logits, targets: image_losses(logits, targets, recipe.network.heads, recipe.loss),
        recipe.input.batch_size,
        accumulation=accumulation,
        global_clipnorm=recipe.optimizer.global_clipnorm,
        jit_compile=recipe.optimizer.jit_compile,
    )


def crops(recipe: Recipe) -> Any:
    """Batches from memory, for ever."""
    side, batch = recipe.input.crop, recipe.input.batch_size
    images, labels = generated_crops(min(batch, _CROPS), side)
    targets = np.stack([pixel_targets(each, recipe.network.heads) for each in labels])
    return batches_in_memory((images, targets), batch).prefetch(4)


def steps(options: Options, batch: int | None = None, frozen: bool = True, **optimizer: Any) -> None:
    """Training steps on crops in memory, in the recipe's precision or another."""
    one_gpu()
    recipe = changed(chosen_recipe(options, small=is_small(options)), **optimizer)
    if batch and not is_small(options):
        recipe = recipe.model_copy(update={"input": recipe.input.model_copy(update={"batch_size": batch})})
    workers, seconds = Workers(), seconds_of(options)
    name = f"{recipe.optimizer.precision}{', XLA' if recipe.optimizer.jit_compile else ''}, {recipe.input.batch_size}"
    bandwidth = copied_bytes(options)
    for encoder_trained in (True, False) if frozen else (True,):
        kind = "all trained" if encoder_trained else "encoder frozen"
        if has_gpu():
            tf.config.experimental.reset_memory_stats("GPU:0")
        begun = time.perf_counter()
        trained = Trained(recipe, workers, encoder_trained=encoder_trained)
        trained.step.run(trained.batches, 1)
        row(f"{name}, {kind}: until the first step", time.perf_counter() - begun, "s")
        found = trained.rate(seconds)
        row(f"{name}, {kind}", found, "crops/s", ">= 1500")
        row(f"{name}, {kind}: of the bandwidth's limit", found * trained.cost().bytes / bandwidth)
        if has_gpu():
            peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
            row(f"{name}, {kind}: GPU memory at most", peak / 2**30, "GiB")


def imported(options: Options, root: Path, small: bool) -> Dataset:
    """The images of `data`, or generated ones, as a dataset in the embedded store."""
    source = Path(options["data"]) if options["data"] and not small else root / "images"
    if source == root / "images":
        write_generated(source, 12 if small else 96, side=96 if small else 320)
    return import_dataset(source, parse_uri("s3://nucleus/datasets/dsb2018"), SplitOptions()).dataset


def shards(options: Options) -> None:
    """The same steps from shards through the whole input, against crops in memory, in turn."""
    one_gpu()
    small = is_small(options)
    recipe = changed(chosen_recipe(options, small=small), steps_per_epoch=40, epochs=1000)
    workers = Workers()
    with temporary_store() as root:
        given = TrainingInput(imported(options, root, small), ShardCache(root / "cache"), None)
        run = TrainingRun(recipe, given, workers, Callback(), Signals(), root / "best.weights.h5")
        step, count = run.step(0), recipe.optimizer.steps_per_execution
        sides = {"memory": iter(crops(recipe)), "shards": run.batches(0, 0)}
        crops_of_call = count * recipe.input.batch_size
        found = dict.fromkeys(sides, 0.0)
        rounds = 1 if small else 3
        for _, (name, batches) in zip(range(rounds * 2), cycle(sides.items()), strict=False):
            found[name] += crops_of_call / rounds * rate(lambda b=batches: step.run(b, count), seconds_of(options))
        row("from shards, all trained", found["shards"], "crops/s", ">= 1500")
        row("what shards cost", 1 - found["shards"] / found["memory"], "", "<= 0.05")
        started = time.process_time()
        begun = time.perf_counter()
        alone = rate(lambda: next(sides["shards"]), seconds_of(options)) * recipe.input.batch_size
        cores = (time.process_time() - started) / (time.perf_counter() - begun)
        row(f"the input alone, {recipe.cpus_per_worker} threads", alone, "crops/s")
        row("cores that it keeps busy", cores)


def exact(options: Options) -> None:
    """Steps of SGD on the CPU in two parts (as two workers take them) and on the GPU: how far the weights differ."""
    recipe = changed(chosen_recipe(options, small=is_small(options)), precision="float32", global_clipnorm=None)
    recipe = recipe.model_copy(update={"input": recipe.input.model_copy(update={"batch_size": 4})})
    one_gpu()
    workers, found = Workers(), []
    set_precision("float32")
    batch = next(iter(crops(recipe)))
    start: list[Any] | None = None
    for place, parts in (("/CPU:0", 2), ("/GPU:0" if has_gpu() else "/CPU:0", 1)):
        with tf.device(place):
            model = build_unet(config_of_recipe(recipe))
            if start is None:
                calibrate_encoder(model, np.asarray(batch[0]))
                start = model.get_weights()
            model.set_weights(start)
            group = ParameterGroup("sgd", 0, decoder_variables(model), keras.optimizers.SGD(0.002), None)
            step_of(recipe, workers, model, [group], parts).run(iter(tf.data.Dataset.from_tensors(batch).repeat()), 5)
            found.append([np.asarray(variable.value) for variable in decoder_variables(model)])
    largest = max(float(np.abs(a - b).max()) for a, b in zip(*found, strict=True))
    where = "GPU" if has_gpu() else "CPU in one part"
    row(f"weights after 5 steps, {where} against CPU in two parts", largest, "", "<= 1e-5")


def predict(options: Options) -> None:
    """Prediction in megapixels a second: the network alone, and with labels and table."""
    one_gpu()
    small, pulled = is_small(options), find_model()
    model = load_pulled(pulled, PredictionOptions(engine="tensorflow"))
    engine = load_engine(pulled.folder, model.config, "tensorflow", has_onnx=True)
    side = 128 if small else 512
    for megapixels in _ALONE[:1] if small else _ALONE:
        count = 2 if small else (megapixels << 20) // side**2
        tiles = np.stack([generated_image(seed, side, side)[0] for seed in range(2)] * (count // 2))
        found = rate(lambda t=tiles: engine(t), seconds_of(options)) * tiles[..., 0].size / 1e6
        row(f"the network alone, {count} tiles of {side} px a call", found, "megapixels/s", ">= 100")
    image = generated_image(1, 4 * side, 4 * side)[0]
    model.segment(image)
    started, begun = time.process_time(), time.perf_counter()
    segmented = model.segment(image)
    passed, used = time.perf_counter() - begun, time.process_time() - started
    size = image[..., 0].size / 1e6
    row("pixels to labels and table, one process", size / passed, "megapixels/s", ">= 100")
    row("its time of the processor", used / size, "s/megapixel")
    row("nuclei found", str(segmented.labels.max()))


def recipe_run(options: Options) -> None:
    """Two epochs of the recipe by `nucleus train`, through Ray, as a user starts it."""
    from job.cluster_check import gpus_here

    small = not gpus_here().seen if options["small"] is None else bool(options["small"])
    recipe = changed(
        chosen_recipe(options, small=small), epochs=2, steps_per_epoch=4 if small else 40, validate_every=2
    )
    content = recipe.model_dump(mode="json", exclude_none=True)
    content["tracking"]["wandb"] = "disabled"
    if options["weights"] and not small:
        content["network"] |= {"weights": options["weights"]}
    with temporary_store() as root:
        imported(options, root, small)
        path = root / "recipe.toml"
        path.write_text(tomli_w.dumps(content))
        command = [
            sys.executable,
            "-m",
            "nucleus",
            "train",
            str(path),
            "--run",
            "gpu-check",
            "--out",
            str(root / "runs"),
        ]
        begun = time.perf_counter()
        done = subprocess.run(
            command, env={**os.environ, "RAY_ADDRESS": "local"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        row("nucleus train, two epochs", time.perf_counter() - begun, "s")
        key = f"{RUNS}gpu-check/{HISTORY_FILE}"
        history = read_history(Bucket(parse_uri("s3://nucleus")).get(key), key)
        row("its second epoch", history[-1]["images_per_second"], "crops/s", ">= 1500")
        row("its validation", history[-1]["validation_seconds"], "s")
        row("its mAP", history[-1]["val_map"])


PARTS: dict[str, Callable[[Options], None]] = {
    "doctor": doctor,
    "device": device,
    "steps": steps,
    "shards": shards,
    "exact": exact,
    "predict": predict,
    "recipe": recipe_run,
    "float32": partial(steps, precision="float32", frozen=False),
    "bfloat16": partial(steps, precision="mixed_bfloat16", frozen=False),
    "xla": partial(steps, jit_compile=True, frozen=False),
    "bfloat16-xla": partial(steps, precision="mixed_bfloat16", jit_compile=True, frozen=False),
    "batch-64": partial(steps, batch=64, frozen=False),
    "batch-128": partial(steps, batch=128, frozen=False),
}
"""The most important first: the budget may end."""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that what it started ends too
    PARTS[sys.argv[1]](json.loads(sys.argv[2]))
