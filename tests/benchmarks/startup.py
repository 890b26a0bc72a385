"""`help`: the command line's own start. `startup`: from the command to the first training step."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
        with open(config["out"], "w") as file:
            json.dump({"built": built, "stepped": time.time()}, file)
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
    """The command to its first step, against a bare TensorflowTrainer job with the same network and one step."""
    import json

    ours, built, stepped = [], [], []
    with temporary_store() as root:
        generated_dataset(root, 96)
        recipe = root / "recipe.toml"
        recipe.write_text(
            'model = "bench"\ndataset = "bench"\nworkers = 2\ncpus_per_worker = 1\n'
            f'cache_dir = "{root / "cache"}"\n[network]\nweights = "{encoder_weights(root)}"\n'
            "[optimizer]\nepochs = 1\nsteps_per_execution = 1\n[tracking]\nwandb = 'disabled'\n"
        )
        config: dict[str, Any] = {"recipe": {**RECIPE, "workers": 2}, "out": str(root / "bare.json")}
        for _ in range(3):
            ours.append(_until_first_step(str(recipe)))
            started = time.time()
            subprocess.run([sys.executable, "-c", _BARE, json.dumps(config)], check=True, capture_output=True)
            metrics = json.loads((root / "bare.json").read_text())
            built.append(metrics["built"] - started)
            stepped.append(metrics["stepped"] - started)
    mine, theirs = sorted(ours)[1], sorted(stepped)[1]
    report("startup", mine / theirs, ours_s=mine, theirs_s=theirs, theirs_until_built_s=sorted(built)[1])


def encoder_weights(root: Path) -> Path:
    """A file of encoder weights; random ones take as long to load as pretrained ones."""
    from nucleus.config.encoders import build_encoder

    path = root / "encoder.weights.h5"
    build_encoder("mobilenet_v2").save_weights(path)
    return path


def _until_first_step(recipe: str) -> float:
    started = time.time()
    command = [sys.executable, "-c", _OURS, "train", recipe]
    own_cluster = {**os.environ, "RAY_ADDRESS": "local"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=own_cluster
    ) as process:
        assert process.stdout is not None
        found = [float(line.split()[-1]) for line in process.stdout if line.startswith("first step")]
    assert process.returncode == 0
    return found[0] - started
