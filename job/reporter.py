"""What a worker tells of its run, and to whom: Ray Train, the driver, W&B, TensorBoard and the bucket."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import tensorflow as tf

from job.demands import Demands
from job.final_model import FINAL_FOLDER, save_model
from job.pictures import RunPictures
from job.plan import RunPlan
from nucleus.report.network import network_facts
from nucleus.report.record import FACTS_FILE, HISTORY_FILE, REPORT_FOLDER, Facts
from nucleus.storage.bucket import Bucket
from nucleus.storage.sums import write_sums
from nucleus.storage.uri import parse_uri
from nucleus.tracking.profiling import StepProfile
from nucleus.tracking.published import summary_of
from nucleus.tracking.tensorboard import EVENTS_FILE, TENSORBOARD_FOLDER, events_of, graph_of, write_events
from nucleus.tracking.weights_and_biases import Tracker
from nucleus.training.extremes import Extreme
from nucleus.training.predictions import PredictedImage
from nucleus.training.reporter import Augmented, Finished
from nucleus.training.state import History
from nucleus.versions import installed_versions

__all__ = ["RayReporter"]

_PREDICTIONS, _BEST = "predictions", "best"
"""What the names of pictures in TensorBoard begin with."""


class RayReporter:
    """A `nucleus.training.reporter.Reporter`.

    Checkpoints go to Ray Train (a barrier on all ranks), metrics to the tracker and the driver (first rank alone).

    Args:
        plan: The run.
        tracker: Where metrics and predictions go.
        demands: What is asked of the run.
        events: Queue to the driver; None on all workers but the first.
        local: Folder on this machine for what people look at while the run goes on.
    """

    def __init__(self, plan: RunPlan, tracker: Tracker, demands: Demands, events: Any | None, local: Path) -> None:
        self._plan = plan
        self._epochs = plan.recipe.optimizer.epochs
        self._tracker = tracker
        self._demands = demands
        self.attention = demands.attention
        self.demand = demands.demand
        self._events = events
        self._folder = Bucket(parse_uri(plan.bucket) / "runs" / plan.run)
        self._report_folder = Bucket(self._folder.uri / REPORT_FOLDER)
        self._pictures = RunPictures(self._report_folder)
        self._local = local
        first = events is not None
        steps = plan.recipe.tracking.profile_steps if first else 0
        self._profile = StepProfile(steps, local / TENSORBOARD_FOLDER)
        self._drawn: dict[int, dict[str, bytes]] = {}
        self._epochs_done = 0
        self._graph: bytes | None = None

    def close(self) -> None:
        """Nothing more is told."""
        self._profile.stop()

    def stage(self, text: str) -> None:
        self._send("stage", text)

    def steps(self, epoch: int, done: int, total: int, loss: float, images_per_second: float) -> None:
        self._profile.steps(epoch, done, total)
        self._send("steps", epoch, self._epochs, done, total, loss, images_per_second)

    def resumed(self, history: History, where: str) -> None:
        self._epochs_done = len(history)
        for metrics in history:  # those that another machine tracked, which is gone, with what it had not sent
            self._tracker.log(metrics)
        if self._events is not None:
            self._drawn = {
                done: {f"{_PREDICTIONS}/{name}": picture for name, picture in drawn.items()}
                for done, drawn in self._pictures.stored_predictions(len(history)).items()
            }
        self.stage(f"Going on after {where}")

    def epoch(self, metrics: dict[str, float]) -> None:
        self._epochs_done = int(metrics["epoch"]) + 1
        self._tracker.log(metrics)
        self._send("epoch", metrics)

    def predictions(self, epochs_done: int | None, images: list[PredictedImage]) -> None:
        drawn = self._pictures.predictions(epochs_done, images)
        when, tag = (self._epochs_done, _BEST) if epochs_done is None else (epochs_done, _PREDICTIONS)
        self._drawn.setdefault(when, {}).update({f"{tag}/{name}": picture for name, picture in drawn.items()})
        self._tracker.predictions(epochs_done, images)

    def extremes(self, images: list[Extreme]) -> None:
        self._pictures.extremes(images)

    def examples(self, images: list[Augmented]) -> None:
        self._pictures.examples(images)

    def checkpoint(self, history: History, save: Callable[[Path], None]) -> None:
        self._report(history, history[-1] if history else {}, save)

    def finished(self, finished: Finished, save: Callable[[Path], None]) -> None:
        """Keep the model as it is to be published, in the last checkpoint of the run."""

        def save_all(folder: Path) -> None:
            save(folder)
            save_model(folder / FINAL_FOLDER, finished)

        if self._events is not None:
            self._graph = graph_of(finished.model)
            self._report_folder.put(FACTS_FILE, self._facts(finished).model_dump_json(indent=1).encode())
        self._tracker.finish(summary_of(finished.metrics))
        told = {"wandb_run": self._tracker.run_path, "metrics": finished.metrics}
        self._report(finished.progress.history, told, save_all)

    def _facts(self, finished: Finished) -> Facts:
        recipe, progress = self._plan.recipe, finished.progress
        unfrozen = recipe.network.encoder_trained_from
        return Facts(
            best_epoch=progress.best_epoch,
            network=network_facts(
                finished.model,
                finished.config,
                encoder_trained=unfrozen is not None and progress.epochs_done > unfrozen,
            ),
            thresholds=finished.config.instances.model_dump(),
            nucleus_diameter=finished.config.nucleus_diameter,
            workers=finished.workers,
            device=_device(recipe.cpus_per_worker),
            seconds=finished.seconds,
            versions=installed_versions(),
        )

    def _report(self, history: History, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        self._demands.saved()
        if self._events is None:
            ray.train.report(metrics)
            return
        folder = tempfile.mkdtemp(prefix="nucleus-checkpoint-")
        save(Path(folder))
        write_sums(Path(folder))
        ray.train.report(  # Ray uploads while training goes on, in order, and removes the folder then
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._uploader(list(history)),
        )

    def _uploader(self, history: History) -> Callable[[Any, str], Any]:
        """Upload a checkpoint into the run's folder, each file by one request of our own client, and the history.

        Ray's own way, `pyarrow.fs.copy_files`, took 2.2 s of the embedded server's time for 21 MB; this takes 0.15 s.
        """
        storage = ray.train.get_context().get_storage()
        drawn = {done: dict(pictures) for done, pictures in self._drawn.items()}
        graph = self._graph

        def upload(checkpoint: Any, name: str) -> Any:
            folder = Path(checkpoint.path)
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                self._folder.put(f"{name}/{path.relative_to(folder).as_posix()}", path)
            self._folder.put(HISTORY_FILE, json.dumps(history).encode())
            self._keep_events(events_of(history, drawn, graph))
            return ray.train.Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)

        return upload

    def _keep_events(self, events: bytes) -> None:
        write_events(self._local / EVENTS_FILE, events)
        self._folder.put(EVENTS_FILE, events)
        for name, path in self._profile.files.items():
            self._folder.put(f"{TENSORBOARD_FOLDER}/{name}", path)

    def _send(self, method: str, *arguments: Any) -> None:
        if self._events is not None:
            self._events.put((method, arguments))


def _device(cpus: int) -> str:
    """What this worker computes on, in words."""
    for gpu in tf.config.get_visible_devices("GPU"):
        return str(tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name))
    return f"{cpus} CPU core" + ("s" if cpus > 1 else "")
