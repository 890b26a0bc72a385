"""A training step: `step_rate` against an earlier one, `step_settings` with other settings, `step_profile` in parts."""

import collections
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nucleus.config.settings import parse_recipe
from nucleus.lazy import tf
from nucleus.model.architecture import config_of_recipe
from nucleus.model.fast_network import fast_network
from nucleus.model.losses import image_losses, pixel_targets
from nucleus.model.unet import build_unet
from nucleus.training.distributed import TrainingStep, Workers, mask_scores
from nucleus.training.optimizer import parameter_groups
from tests.benchmarks.measure import RECIPE, batches_in_memory, earlier_checkout, generated_crops, report

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT.parent / "shared" / "weights" / "mobilenet_v2_1.0_imagenet_no_top.weights.h5"
STEPS, THREADS, CROP = 16, 2, 192
ROUNDS = int(os.environ.get("STEP_ROUNDS", "4"))
"""Measurements of each side, in turn."""
SETTINGS: dict[str, dict[str, Any]] = {
    "now": {},
    "intra_1": {"intra": 1},
    "inter_1": {"inter": 1},
    "both_1": {"intra": 1, "inter": 1},
    "xla": {"jit_compile": True},
    "without_onednn": {"onednn": "0"},
}
"""What `step_settings` compares. A worker of two cores has `intra` = 2 and `inter` = 2."""
_ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
_MATRIX, _PRODUCTS = 1536, 4
_SHOWN = 16
RECIPE_OF_BENCH = parse_recipe(RECIPE, "bench")
# Run in a checkout: it takes the steps of that checkout's own benchmark, which has had these names since 8eae0ed.
_CHILD = """
import json, runpy, sys, time
from pathlib import Path
from tests.benchmarks import step_rate as bench
settings = json.loads(sys.argv[1])
weights = Path(settings["weights"])
recipe = bench.RECIPE_OF_BENCH
network = recipe.network.model_copy(update={"freeze_encoder": settings["encoder"] == "frozen"})
asked = {"jit_compile": True} if settings.get("jit_compile") else {}
optimizer = recipe.optimizer.model_copy(update={"steps_per_execution": 2, **asked})
bench.RECIPE_OF_BENCH = recipe.model_copy(update={"network": network, "optimizer": optimizer})
bench.STEPS = 2
tf = bench.tf  # imported as the checkout does it, which decides about oneDNN
tf.config.threading.set_intra_op_parallelism_threads(settings.get("intra", 2))
tf.config.threading.set_inter_op_parallelism_threads(settings.get("inter", 2))
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
for line in sys.stdin:
    if line.strip() == "profile":
        print("found", json.dumps(runpy.run_path(settings["profiler"])["times"](run)), flush=True)
        continue
    began, started = time.perf_counter(), time.process_time()
    run()
    found = [time.process_time() - started, time.perf_counter() - began]
    print("found", json.dumps([*(each / bench.STEPS for each in found), losses[-1]]), flush=True)
"""


class _Measured(NamedTuple):
    """A step: CPU seconds of all threads together, seconds by the clock, and its loss; means of two steps."""

    cpu: float
    clock: float
    loss: float


def limit_threads(threads: int) -> None:
    """As a worker of that many cores has them."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(2)


def losses(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """The recipe's loss of each image."""
    return image_losses(logits, targets, RECIPE_OF_BENCH.network.heads, RECIPE_OF_BENCH.loss)


def crops(batch: int = 8) -> tf.data.Dataset:
    """Batches of images from memory, for ever, with targets that are made anew, as the input pipeline does."""
    images, labels = generated_crops(32, CROP)
    made = partial(pixel_targets, heads=RECIPE_OF_BENCH.network.heads)
    depth = made(labels[0]).shape[-1]

    def with_targets(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        targets = tf.numpy_function(lambda each: np.stack([made(label) for label in each]), [labels], tf.float32)
        return images, tf.ensure_shape(targets, (batch, CROP, CROP, depth))

    return batches_in_memory((images, labels), batch).map(with_targets).prefetch(2)


def our_steps(workers: Workers, batches: Iterator[Any]) -> Callable[[], Any]:
    """`STEPS` of our steps."""
    recipe = RECIPE_OF_BENCH
    model = build_unet(config_of_recipe(recipe))
    groups = parameter_groups(model, recipe, steps_per_epoch=1000)
    step = TrainingStep(
        workers,
        fast_network(model),
        groups,
        losses,
        recipe.input.batch_size,
        jit_compile=recipe.optimizer.jit_compile,
        score=mask_scores(recipe.network.heads),
    )

    def run() -> None:
        for _ in range(STEPS // recipe.optimizer.steps_per_execution):
            step.run(batches, recipe.optimizer.steps_per_execution)

    return run


class _Side:
    """Steps of a checkout, in a process of its own."""

    def __init__(self, checkout: Path, encoder: str, settings: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment.pop(_ONEDNN, None)  # this process has set it; each side decides by itself
        if "onednn" in settings:
            environment[_ONEDNN] = settings["onednn"]
        files = {"weights": str(WEIGHTS), "profiler": str(Path(__file__).with_name("profiling.py"))}
        given = json.dumps({"encoder": encoder, **files, **settings})
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, given],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> _Measured:
        """Take two steps."""
        return _Measured(*self._answer("step"))

    def profile(self) -> tuple[dict[str, float], dict[str, float]]:
        """Take two steps; time in operations by their type, and by place and type."""
        types, places = self._answer("profile")
        return types, places

    def _answer(self, order: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("found "):
                return json.loads(line.removeprefix("found "))
        raise AssertionError(f"the steps failed with status {self._process.wait()}")

    def end(self) -> None:
        """Close the process."""
        self._process.communicate()


def step_rate() -> None:
    """CPU time of a step: against the earlier commit's, and its share of the arithmetic of a matrix product.

    All in turn, by the processor's time, which other work on the machine changes little.
    """
    limit_threads(THREADS)
    found: dict[str, float] = {}
    with earlier_checkout() as checkout:
        for encoder in ("frozen", "trained"):
            found |= {f"{encoder}_{name}": value for name, value in _measured(encoder, checkout).items()}
    report("step_rate", found.get("frozen_ratio", found["frozen_share_of_peak"]), **found)


def _measured(encoder: str, checkout: Path | None) -> dict[str, float]:
    """Steps of the tree and of the checkout, and matrix products, in turn."""
    paths = {"now": ROOT, **({"earlier": checkout} if checkout else {})}
    products: list[float] = []
    sides = {name: _Side(path, encoder, {}) for name, path in paths.items()}
    steps = _in_turn(sides, lambda: products.append(_product_rate()))
    now, peak = _median(steps["now"]), statistics.median(products)
    found = {"cpu_s": now, "gflop": flop_of_step(encoder) / 1e9, "gflop_per_cpu_s": peak / 1e9}
    found["share_of_peak"] = found["gflop"] / now / found["gflop_per_cpu_s"]
    if checkout:
        pairs = list(zip(steps["earlier"], steps["now"], strict=True))
        found["earlier_cpu_s"] = _median(steps["earlier"])
        found["ratio"] = statistics.median(before.cpu / after.cpu for before, after in pairs[1:])
        found["loss_difference"] = max(abs(before.loss - after.loss) / before.loss for before, after in pairs)
    return found


def step_settings() -> None:
    """A step with other settings of TensorFlow, encoder frozen: CPU milliseconds, and by the clock.

    The ratio is the CPU time by XLA over that without it.
    """
    steps = _in_turn({name: _Side(ROOT, "frozen", settings) for name, settings in SETTINGS.items()})
    found = {f"cpu_ms_{name}": 1e3 * _median(each) for name, each in steps.items()}
    found |= {f"clock_ms_{name}": 1e3 * statistics.median(s.clock for s in each[1:]) for name, each in steps.items()}
    report("step_settings", found["cpu_ms_xla"] / found["cpu_ms_now"], **found)


def _in_turn(sides: dict[str, _Side], between: Callable[[], Any] = lambda: None) -> dict[str, list[_Measured]]:
    """Steps of each side, in turn, `ROUNDS` times after a first one, which traces the graph."""
    steps: dict[str, list[_Measured]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            steps[name].append(sides[name].step())
        between()
    for side in sides.values():
        side.end()
    return steps


def _median(steps: list[_Measured]) -> float:
    return statistics.median(step.cpu for step in steps[1:])  # the first traces the graph


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
    """The parts of a step, encoder frozen, CPU milliseconds: by type of operation, and by place in the network.

    On one thread, where the time of an operation is that of the processor. The profiler's times are scaled to the CPU
    time of steps without it. The ratio is the share of the convolutions.
    """
    found: dict[str, Any] = {}
    with earlier_checkout() as checkout:
        for name, path in {"": ROOT, **({"earlier_": checkout} if checkout else {})}.items():
            found |= {f"{name}{key}": value for key, value in _profiled(path).items()}
    share = sum(taken for kind, taken in found["types_ms"].items() if "Conv" in kind) / found["step_ms"]
    report("step_profile", share, **found)


def _profiled(checkout: Path) -> dict[str, Any]:
    """Milliseconds of a step, and of its largest parts."""
    side = _Side(checkout, "frozen", {"intra": 1, "inter": 1})
    side.step()
    step_ms = 1e3 * statistics.median(side.step().cpu for _ in range(ROUNDS))
    types, places = side.profile()
    side.end()
    scale = step_ms / sum(types.values())
    return {"step_ms": step_ms, "types_ms": _shown(types, scale), "places_ms": _shown(places, scale)}


def _shown(times: dict[str, float], scale: float) -> dict[str, float]:
    """The largest times, scaled."""
    return {name: round(scale * taken, 1) for name, taken in collections.Counter(times).most_common(_SHOWN)}
