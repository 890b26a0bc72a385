"""`help`: the command line's own start. `startup`: from the command to the first training step."""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.benchmarks.measure import RECIPE, generated_dataset, in_turn, report, temporary_store

_OURS = """
import sys, time
from nucleus.cli.progress_bars import TrainingDisplay
steps = TrainingDisplay.on_steps_end
def first(self, epoch, epochs, done, *more):
    if epoch == 1:
        print("first step", time.time(), flush=True, file=sys.__stdout__)
    steps(self, epoch, epochs, done, *more)
TrainingDisplay.on_steps_end = first
from nucleus.cli.main import main
sys.exit(main())
"""
_BARE = """
import sys, tempfile, time
def loop(config):
    import json
    import os
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    import tensorflow as tf
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    import keras
    from nucleus.config.settings import parse_recipe
    from nucleus.model.architecture import config_of_recipe
    from nucleus.model.unet import build_unet, decoder_variables
    import ray.train
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = build_unet(config_of_recipe(parse_recipe(config["recipe"], "bench")))
        optimizer = keras.optimizers.AdamW(1e-3)
        optimizer.build(decoder_variables(model))
    built = time.time()
    def on_replica(images):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(images, training=True) ** 2)
        variables = decoder_variables(model)
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return loss
    @tf.function
    def step(images):
        return strategy.run(on_replica, args=(images,))
    float(step(tf.zeros((4, 192, 192, 3))))
    if ray.train.get_context().get_world_rank() == 0:  # a report without a checkpoint does not reach the driver
        with open(config["out"] + ".part", "w") as file:
            json.dump({"built": built, "stepped": time.time()}, file)
        os.rename(config["out"] + ".part", config["out"])
import json, ray
from ray.train import RunConfig, ScalingConfig
from ray.train.tensorflow import TensorflowTrainer
ray.init(address="local", log_to_driver=False, logging_level="error")
with tempfile.TemporaryDirectory() as folder:
    TensorflowTrainer(
        loop,
        train_loop_config=json.loads(sys.argv[1]),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=folder),
    ).fit()
"""


def help() -> None:  # noqa: A001  the benchmark's name
    """`nucleus --help` against the import of its two libraries."""

    def run(*command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    nucleus = os.path.join(os.path.dirname(sys.executable), "nucleus")  # noqa: PTH118, PTH120
    found = in_turn(
        {
            "ours": lambda: run(nucleus, "--help"),
            "theirs": lambda: run(sys.executable, "-c", "import click, rich"),
        },
        rounds=20,
    )
    report("help", found["ours"] / found["theirs"], ours_s=found["ours"], theirs_s=found["theirs"])


def startup() -> None:
    """The command to its first step, against a bare TensorflowTrainer job with the same network and one step.

    Where the machine is busy, the processors' time up to the first step says more than the clock.
    """
    ours, theirs, built = list[_Start](), list[_Start](), list[float]()
    with temporary_store() as root:
        generated_dataset(root, 96)
        recipe = root / "recipe.toml"
        recipe.write_text(
            'model = "bench"\ndataset = "bench"\nworkers = 2\ncpus_per_worker = 1\n'
            f'cache_dir = "{root / "cache"}"\n[network]\nweights = "{encoder_weights(root)}"\n'
            "[optimizer]\nepochs = 1\nsteps_per_execution = 1\n[tracking]\nwandb = 'disabled'\n"
        )
        out = root / "bare.json"
        config: dict[str, Any] = {"recipe": {**RECIPE, "workers": 2}, "out": str(out)}
        for turn in range(int(os.environ.get("STARTUP_ROUNDS", "3"))):
            for side in ("ours", "theirs")[:: -1 if turn % 2 else 1]:
                if side == "ours":
                    ours.append(_ours(str(recipe)))
                    continue
                theirs.append(_bare(config, out))
                built.append(json.loads(out.read_text())["built"] - theirs[-1].began)
                out.unlink()
    mine, other = (
        _Start(0.0, *map(statistics.median, zip(*(x[1:] for x in side), strict=True))) for side in (ours, theirs)
    )
    report(
        "startup",
        mine.seconds / other.seconds,
        ours_s=mine.seconds,
        theirs_s=other.seconds,
        theirs_until_built_s=statistics.median(built),
        cpu_ratio=mine.cpu / other.cpu,
        ours_cpu_s=mine.cpu,
        theirs_cpu_s=other.cpu,
    )


def encoder_weights(root: Path) -> Path:
    """A file of encoder weights; random ones take as long to load as pretrained ones."""
    from nucleus.config.encoders import build_encoder

    path = root / "encoder.weights.h5"
    build_encoder("mobilenet_v2").save_weights(path)
    return path


class _Start(NamedTuple):
    """When a command began (Unix time), and what it took until its first step, by clock and by processors, seconds."""

    began: float
    seconds: float
    cpu: float


def _ours(recipe: str) -> _Start:
    began = time.time()
    command = [sys.executable, "-c", _OURS, "train", recipe]
    own_cluster = {**os.environ, "RAY_ADDRESS": "local"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=own_cluster
    ) as process:
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            if line.startswith("first step"):
                found = _Start(began, float(line.split()[-1]) - began, _processors(process.pid))
    assert process.returncode == 0
    assert found is not None
    return found


def _bare(config: dict[str, Any], out: Path) -> _Start:
    began = time.time()
    command = [sys.executable, "-c", _BARE, json.dumps(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not out.exists():
            assert process.poll() is None
            time.sleep(0.05)
        used = _processors(process.pid)
    return _Start(began, json.loads(out.read_text())["stepped"] - began, used)


def _processors(pid: int) -> float:
    """The processors' seconds of a process and of all that it has started and that still run."""
    total, first = 0.0, psutil.Process(pid)
    for process in (first, *first.children(recursive=True)):
        with suppress(psutil.Error):
            total += sum(process.cpu_times())  # with those of its children that have ended
    return total
