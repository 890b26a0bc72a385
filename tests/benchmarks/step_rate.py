"""`step_rate` and `step_profile`: the cost of a training step against the CPU's arithmetic, and where it goes."""

import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nucleus.config.settings import parse_recipe
from nucleus.data.synthetic import generated_image
from nucleus.lazy import tf
from nucleus.model.architecture import config_of_recipe
from nucleus.model.fast_network import fast_network
from nucleus.model.losses import image_losses, pixel_targets
from nucleus.model.unet import build_unet
from nucleus.training.distributed import TrainingStep, Workers, mask_scores
from nucleus.training.optimizer import parameter_groups
from tests.benchmarks.measure import RECIPE, report

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT.parent / "shared" / "weights" / "mobilenet_v2_1.0_imagenet_no_top.weights.h5"
CHECKOUT = "NUCLEUS_BENCH_EARLIER"
"""Variable that names a checkout of an earlier commit, such as 8eae0ed, to compare with."""
STEPS, THREADS, CROP = 16, 2, 192
ROUNDS = 12
_MATRIX, _PRODUCTS = 1536, 4
_SHOWN = 12
RECIPE_OF_BENCH = parse_recipe(RECIPE, "bench")
# Run in a checkout: it takes the steps of that checkout's own benchmark, which has had these names since 8eae0ed.
_CHILD = """
import json, sys, time
from pathlib import Path
from tests.benchmarks import step_rate as bench
encoder, weights = sys.argv[1], Path(sys.argv[2])
recipe = bench.RECIPE_OF_BENCH
network = recipe.network.model_copy(update={"freeze_encoder": encoder == "frozen"})
optimizer = recipe.optimizer.model_copy(update={"steps_per_execution": 2})
bench.RECIPE_OF_BENCH = recipe.model_copy(update={"network": network, "optimizer": optimizer})
bench.STEPS = 2
bench.limit_threads(2)
from nucleus.training.distributed import Workers
workers, build, losses = Workers(), bench.build_unet, []

def seeded(config):
    from keras.utils import set_random_seed
    set_random_seed(1)
    model = build(config)
    if weights.exists():
        model.get_layer("encoder").load_weights(weights)
    return model

class Step(bench.TrainingStep):
    def run(self, batches, count):
        losses.append(super().run(batches, count).loss / count)

bench.build_unet, bench.TrainingStep = seeded, Step
run = bench.our_steps(workers, iter(bench.crops()))
for _ in sys.stdin:
    started = time.process_time()
    run()
    print("step", json.dumps([(time.process_time() - started) / bench.STEPS, losses[-1]]), flush=True)
"""


def limit_threads(threads: int) -> None:
    """As a worker of that many cores has them."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(2)


def losses(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """The recipe's loss of each image."""
    return image_losses(logits, targets, RECIPE_OF_BENCH.network.heads, RECIPE_OF_BENCH.loss)


def crops(batch: int = 8) -> tf.data.Dataset:
    """Batches from memory, for ever."""
    samples = [generated_image(seed, CROP, CROP) for seed in range(32)]
    images = np.stack([image for image, _ in samples])
    targets = np.stack([pixel_targets(labels, RECIPE_OF_BENCH.network.heads) for _, labels in samples])
    options = tf.data.Options()
    options.autotune.enabled = False
    data = tf.data.Dataset.from_tensor_slices((images, targets)).repeat().batch(batch, drop_remainder=True)
    return data.prefetch(2).with_options(options)


def our_steps(workers: Workers, batches: Iterator[Any]) -> Callable[[], Any]:
    """`STEPS` of our steps."""
    recipe = RECIPE_OF_BENCH
    model = build_unet(config_of_recipe(recipe))
    groups = parameter_groups(model, recipe, steps_per_epoch=1000)
    step = TrainingStep(
        workers, fast_network(model), groups, losses, recipe.input.batch_size, score=mask_scores(recipe.network.heads)
    )

    def run() -> None:
        for _ in range(STEPS // recipe.optimizer.steps_per_execution):
            step.run(batches, recipe.optimizer.steps_per_execution)

    return run


class _Side:
    """Steps of a checkout, in a process of its own."""

    def __init__(self, checkout: Path, encoder: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment.pop("TF_ENABLE_ONEDNN_OPTS", None)  # this process has set it; each side decides by itself
        command = [sys.executable, "-c", _CHILD, encoder, str(WEIGHTS)]
        self._process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> tuple[float, float]:
        """CPU seconds of a step, all threads together, and its loss; means of two steps."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("step "):
                seconds, loss = json.loads(line.removeprefix("step "))
                return seconds, loss
        raise AssertionError(f"the steps failed with status {self._process.wait()}")

    def end(self) -> None:
        """Close the process."""
        self._process.communicate()


def step_rate() -> None:
    """CPU time of a step: against the earlier commit's, and its share of the arithmetic of a matrix product.

    All in turn, by the processor's time, which other work on the machine changes little.
    """
    limit_threads(THREADS)
    checkout = os.environ.get(CHECKOUT)
    found: dict[str, float] = {}
    for encoder in ("frozen", "trained"):
        found |= {f"{encoder}_{name}": value for name, value in _measured(encoder, checkout).items()}
    report("step_rate", found.get("frozen_ratio", found["frozen_share_of_peak"]), **found)


def _measured(encoder: str, checkout: str | None) -> dict[str, float]:
    """Steps of the tree and of the checkout, and matrix products, in turn."""
    paths = {"now": ROOT, **({"earlier": Path(checkout)} if checkout else {})}
    sides = {name: _Side(path, encoder) for name, path in paths.items()}
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    products = []
    for _ in range(ROUNDS + 1):
        for name, side in sides.items():
            steps[name].append(side.step())
        products.append(_product_rate())
    for side in sides.values():
        side.end()
    now, peak = _median(steps["now"]), statistics.median(products[1:])
    found = {"cpu_s": now, "gflop": flop_of_step(encoder) / 1e9, "gflop_per_cpu_s": peak / 1e9}
    found["share_of_peak"] = found["gflop"] / now / found["gflop_per_cpu_s"]
    if checkout:
        pairs = list(zip(steps["earlier"], steps["now"], strict=True))
        found["earlier_cpu_s"] = _median(steps["earlier"])
        found["ratio"] = statistics.median(before[0] / after[0] for before, after in pairs[1:])
        found["loss_difference"] = max(abs(before[1] - after[1]) / before[1] for before, after in pairs)
    return found


def _median(steps: list[tuple[float, float]]) -> float:
    return statistics.median(seconds for seconds, _ in steps[1:])  # the first traces the graph


def _product_rate() -> float:
    """Floating-point operations a CPU second of a matrix product in float32."""
    matrix = tf.random.uniform((_MATRIX, _MATRIX))
    tf.matmul(matrix, matrix).numpy()
    started = time.process_time()
    for _ in range(_PRODUCTS):
        tf.matmul(matrix, matrix).numpy()
    return _PRODUCTS * 2 * _MATRIX**3 / (time.process_time() - started)


def flop_of_step(encoder: str) -> float:
    """Floating-point operations of a step's convolutions.

    Forward, and twice as many for the two gradients of those that are trained.
    """
    model = build_unet(config_of_recipe(RECIPE_OF_BENCH))
    shape = (RECIPE_OF_BENCH.input.batch_size, CROP, CROP, 3)
    graph = tf.function(model).get_concrete_function(tf.TensorSpec(shape)).graph
    total = 0.0
    for operation in graph.get_operations():
        if operation.type in {"Conv2D", "DepthwiseConv2dNative"}:
            height, width, channels, _ = operation.inputs[1].shape
            taps = height * width * (channels if operation.type == "Conv2D" else 1)
            passes = 1 if encoder == "frozen" and "/encoder" in operation.name else 3
            total += passes * 2.0 * taps * operation.outputs[0].shape.num_elements()
    return total


def step_profile() -> None:
    """The parts of a step, CPU milliseconds: by type of operation, and by place in the network.

    On one thread, where the time of an operation is that of the processor. The profiler's times are scaled to the CPU
    time of steps without it.
    """
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    run = our_steps(Workers(), iter(crops()))
    run()
    started = time.process_time()
    run()
    step_ms = 1e3 * (time.process_time() - started) / STEPS
    types, places = _times(run)
    whole = sum(types.values())

    def shown(times: collections.Counter[str]) -> dict[str, float]:
        return {name: round(step_ms * taken / whole, 1) for name, taken in times.most_common(_SHOWN)}

    convolutions = sum(taken for name, taken in types.items() if "Conv" in name)
    report("step_profile", convolutions / whole, step_ms=step_ms, types_ms=shown(types), places_ms=shown(places))


def _times(work: Callable[[], Any]) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Picoseconds in TensorFlow's operations during some work: by their type, and by place and type."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    types: collections.Counter[str] = collections.Counter()
    places: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            work()
        (path,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
    for plane in space.planes:
        for event in (event for line in plane.lines for event in line.events):
            place, colon, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
            if colon and "/" in place:  # NAME:TYPE is an operation of the graph
                types[kind] += event.duration_ps
                places[f"{place.removeprefix('while/body/_1/')}:{kind}"] += event.duration_ps
    return types, places
