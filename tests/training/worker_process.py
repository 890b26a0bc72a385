"""One of several real worker processes, without Ray: `python worker_process.py RANK WORLD OUT`, spawned by a test.

Reads `OUT/task.json` and leaves what it found in `OUT/<world>-<rank>.json` and `.npz`.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from nucleus.config.settings import parse_recipe
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import locate_dataset, open_dataset
from nucleus.data.synthetic import generated_image
from nucleus.model.heads import activations
from nucleus.model.unet import decoder_variables
from nucleus.predict.evaluation import PredictedImage
from nucleus.training.callbacks import Augmented, Demand, Finished
from nucleus.training.checkpoint import History
from nucleus.training.distributed import TrainingStep, Workers
from nucleus.training.optimizer import ParameterGroup, parameter_groups
from nucleus.training.trainer import TrainingInput, TrainingRun
from nucleus.training.validation import Extreme, score_images

rank, world, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
task = json.loads((out / "task.json").read_text())
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(2)
workers = Workers()
image = generated_image(77, 64, 64)[0][np.newaxis].astype(np.float32)


class Keeper:
    """A reporter that remembers, and saves on every rank; if wanted also after some step, in the middle of an epoch."""

    def __init__(self, save_after: int | None = None) -> None:
        self.history: list[dict[str, float]] = []
        self.sums: list[dict[str, str]] = []
        self.watched: list[tuple[int | None, list[str]]] = []
        self.extreme: list[tuple[str, str]] = []
        self.middle = Path(tempfile.mkdtemp(dir=out))
        self._save_after = save_after
        self._looks = 0

    def stage(self, text: str) -> None:
        assert text

    def attention(self) -> bool:
        self._looks += 1
        return self._looks == self._save_after and rank == world - 1  # one raises its hand, and all are asked

    def demand(self) -> Demand:
        return Demand.SAVE if self._looks == self._save_after else Demand.GO_ON

    def resumed(self, history: History, where: str) -> None:
        """Nobody to tell."""

    def steps(self, epoch: int, done: int, total: int, loss: float, images_per_second: float) -> None:  # noqa: ARG002
        assert 0 < done <= total
        assert loss > 0
        assert images_per_second > 0

    def epoch(self, metrics: dict[str, float]) -> None:
        self.history.append(metrics)

    def predictions(self, epochs_done: int | None, images: list[PredictedImage]) -> None:
        assert rank == 0
        self.watched.append((epochs_done, [image.sample.name for image in images]))

    def extremes(self, images: list[Extreme]) -> None:
        self.extreme = [(image.group, image.predicted.sample.name) for image in images]

    def examples(self, images: list[Augmented]) -> None:
        assert rank == 0
        assert all(image.image.shape[:2] == image.labels.shape for image in images)

    def checkpoint(self, history: History, save: Callable[[Path], None]) -> None:  # noqa: ARG002
        if self._looks == self._save_after:
            save(self.middle)
            return
        folder = Path(tempfile.mkdtemp(dir=out))
        save(folder)
        files = sorted(path for path in folder.iterdir() if path.suffix != ".json")  # seconds differ
        self.sums.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})

    def finished(self, finished: Finished, save: Callable[[Path], None]) -> None:
        """Nothing to publish here."""


def run_of(changes: dict[str, Any], keeper: Keeper) -> TrainingRun:
    content = {**task["recipe"], "workers": world, **changes}
    recipe = parse_recipe(content, "test")
    dataset = open_dataset(locate_dataset(recipe.dataset, recipe.bucket))
    weights = Path(task["weights"]) if recipe.network.weights != "none" else None
    given = TrainingInput(dataset, ShardCache(out / f"cache-{world}"), weights)
    return TrainingRun(recipe, given, workers, keeper, out / f"best-{world}-{rank}.weights.h5")


def steps(name: str, encoder: str, which: str, rate: float, kept: list[int], parts: int) -> tuple[list[float], Any]:
    """Take steps of SGD on `decoder` or `all`, or of the `recipe`'s optimizer; keep the weights after some of them.

    Returns the losses up to each of these and the predictions after the last.
    """
    network = task["frozen"]["network"] if which == "recipe" else {**task["recipe"]["network"], "encoder": encoder}
    run = run_of({"network": network}, Keeper())
    workers.broadcast(list(run.model.weights))
    variables = list(run.model.trainable_variables) if which == "all" else decoder_variables(run.model)
    groups = [ParameterGroup("sgd", 0, variables, keras.optimizers.SGD(rate), None)]
    if which == "recipe":
        groups = parameter_groups(run.model, run.recipe, steps_per_epoch=50)
    batch = run.recipe.input.batch_size
    step, data = TrainingStep(workers, run.model, groups, run.losses, batch, accumulation=parts), run.batches(0, 0)
    losses = []
    for before, count in pairwise([0, *kept]):
        losses.append(float(workers.sum(np.array([step.run(data, count - before).loss]))[0]))
        np.savez(out / f"{name}-{count}-{world}-{rank}.npz", *(variable.numpy() for variable in variables))
    predictions = activations(run.model(image, training=False), run.config.heads)[0].numpy()
    return losses, predictions.tolist()


def scores() -> dict[str, Any]:
    run = run_of({}, Keeper())
    workers.broadcast(list(run.model.weights))
    return score_images(run.predicted("val"), workers).report()


def trained(changes: dict[str, Any]) -> dict[str, Any]:
    keeper = Keeper(save_after=task["save_after"])
    run = run_of(changes, keeper)
    finished = run.execute(None)
    predictions = activations(finished.model(image, training=False), finished.config.heads)[0].numpy()
    return {
        "history": keeper.history,
        "sums": keeper.sums,
        "watched": keeper.watched,
        "extremes": keeper.extreme,
        "middle": str(keeper.middle),
        "epochs": finished.progress.epochs_done,
        "metrics": finished.metrics,
        "predictions": predictions.tolist(),
    }


def resumed(changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run that goes on from a checkpoint of another."""
    keeper = Keeper()
    progress = run_of(changes, keeper).execute(folder).progress
    return {"sums": keeper.sums, "losses": [metrics["loss"] for metrics in progress.history]}


def orders() -> list[list[str]]:
    """Sums of this worker's batches in epochs 0 to 2 of a run, and of a run resumed at epoch 1."""
    run = run_of({}, Keeper())

    def sums(first: int, epochs: int) -> list[str]:
        batches = islice(run.batches(first, 0), epochs * run.steps_per_epoch)
        return [hashlib.sha256(images.numpy().tobytes()).hexdigest() for images, _ in batches]

    return [sums(0, 3), sums(1, 2)]


found: dict[str, Any] = {"scores": scores(), "orders": orders(), "losses": {}, "predictions": {}, "runs": {}}
for name, options in task["steps"][str(world)].items():
    found["losses"][name], found["predictions"][name] = steps(name, *options)
for name in task["runs"][str(world)]:
    found["runs"][name] = trained(task["changes"][name])
if world == 2:
    found["resumed"] = resumed(task["changes"]["options"], Path(found["runs"]["options"]["middle"]))
(out / f"{world}-{rank}.json").write_text(json.dumps(found))
