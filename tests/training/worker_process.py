"""Real worker processes, without Ray: `python worker_process.py OUT`, spawned by a test.

Reads `OUT/task.json`, which has the addresses of the workers of each world. Each worker is a fork of its own, since to
import TensorFlow in each takes longer than most of what they do; it has its own runtime, which no import starts. It
leaves what it found in `OUT/<world>-<rank>.json` and `.npz`, and what it printed in `.log`.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nucleus.config.settings import parse_recipe
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import locate_dataset, open_dataset
from nucleus.data.synthetic import generated_image
from nucleus.lazy import keras, tf
from nucleus.model.architecture import activations
from nucleus.model.unet import decoder_variables
from nucleus.predict.evaluation import PredictedImage
from nucleus.training.callbacks import AugmentedImage, Callback, Signal, Signals
from nucleus.training.checkpoint import History
from nucleus.training.distributed import TrainingStep, Workers
from nucleus.training.optimizer import ParameterGroup, parameter_groups
from nucleus.training.trainer import TrainingInput, TrainingRun
from nucleus.training.validation import RankedImage, score_images

out = Path(sys.argv[1])
task = json.loads((out / "task.json").read_text())


def become_worker() -> tuple[int, int]:
    """Fork every worker. Return the rank and the world in each; this process waits for them, and ends."""
    children = []
    for world, addresses in task["worlds"].items():
        for rank in range(len(addresses)):
            if not (child := os.fork()):
                log = os.open(out / f"{world}-{rank}.log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
                os.environ["TF_CONFIG"] = json.dumps(config)
                return rank, int(world)
            children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    sys.exit(len(failed))


rank, world = become_worker()
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(2)
workers = Workers()
image = generated_image(77, 64, 64)[0][np.newaxis].astype(np.float32)


class SaveOnce(Signals):
    """Asks for a checkpoint after some step, in the middle of an epoch; None for never."""

    def __init__(self, save_after: int | None = None) -> None:
        self._save_after = save_after
        self._steps = 0
        self.saves = 0

    @property
    def now(self) -> bool:
        return self._steps == self._save_after

    def pending(self) -> bool:
        self._steps += 1
        return self.now and rank == world - 1  # one worker is enough, and all must read

    def read(self) -> Signal:
        return Signal.SAVE if self.now else Signal.CONTINUE

    def saved(self) -> None:
        self.saves += 1


class Keeper(Callback):
    """Remembers what the trainer reports, and saves on every rank."""

    def __init__(self, save_after: int | None = None) -> None:
        self.signals = SaveOnce(save_after)
        self.history: list[dict[str, float]] = []
        self.sums: list[dict[str, str]] = []
        self.watched: list[tuple[int | None, list[str]]] = []
        self.ranked: list[tuple[str, str]] = []
        self.middle = Path(tempfile.mkdtemp(dir=out))
        self.checkpoints = 0

    def on_stage(self, text: str) -> None:
        assert text

    def on_steps_end(
        self, epoch: int, epochs: int, done: int, total: int, loss: float, images_per_second: float
    ) -> None:
        assert 1 <= epoch <= epochs
        assert 0 < done <= total
        assert loss > 0
        assert images_per_second > 0

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        self.history.append(metrics)

    def on_predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        assert rank == 0
        self.watched.append((epochs_done, [image.sample.name for image in images]))

    def on_ranked_images(self, images: Sequence[RankedImage]) -> None:
        self.ranked = [(image.group, image.predicted.sample.name) for image in images]

    def on_examples(self, images: Sequence[AugmentedImage]) -> None:
        assert rank == 0
        assert all(image.image.shape[:2] == image.labels.shape for image in images)

    def on_checkpoint(self, history: History, save: Callable[[Path], None]) -> None:  # noqa: ARG002
        self.checkpoints += 1
        assert self.signals.saves == self.checkpoints  # the clock of the signals is set by each
        if self.signals.now:
            save(self.middle)
            return
        folder = Path(tempfile.mkdtemp(dir=out))
        save(folder)
        files = sorted(path for path in folder.iterdir() if path.suffix != ".json")  # seconds differ
        self.sums.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})


def run_of(changes: dict[str, Any], keeper: Keeper) -> TrainingRun:
    content = {**task["recipe"], "workers": world, **changes}
    recipe = parse_recipe(content, "test")
    dataset = open_dataset(locate_dataset(recipe.dataset, recipe.bucket))
    weights = Path(task["weights"]) if recipe.network.weights != "none" else None
    given = TrainingInput(dataset, ShardCache(out / f"cache-{world}"), weights)
    return TrainingRun(recipe, given, workers, keeper, keeper.signals, out / f"best-{world}-{rank}.weights.h5")


def steps(name: str, encoder: str, which: str, rate: float, kept: list[int], parts: int) -> tuple[list[float], Any]:
    """Take steps of SGD on `decoder` or `all`, or of the optimizer of the `recipe` or `gpu`; keep some of the weights.

    Returns the losses up to each of these and the predictions after the last.
    """
    network = task["frozen"]["network"] if which == "recipe" else {**task["recipe"]["network"], "encoder": encoder}
    run = run_of(task["changes"]["gpu"] if which == "gpu" else {"network": network}, Keeper())
    workers.broadcast(list(run.model.weights))
    variables = list(run.model.trainable_variables) if which == "all" else decoder_variables(run.model)
    groups = [ParameterGroup("sgd", 0, variables, keras.optimizers.SGD(rate), None)]
    if which in {"recipe", "gpu"}:
        groups = parameter_groups(run.model, run.recipe, steps_per_epoch=50)
    batch = run.recipe.input.batch_size
    step, data = TrainingStep(workers, run.network, groups, run.losses, batch, accumulation=parts), run.batches(0, 0)
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
        "ranked": keeper.ranked,
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
