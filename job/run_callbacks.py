"""Callbacks of a training worker: profile, pictures, TensorBoard, facts, W&B and checkpoints."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
from numpy.typing import NDArray

from job.events import EventCallback
from job.final_model import FINAL_FOLDER, run_facts, save_model
from nucleus.config.recipe import Recipe
from nucleus.data.images import RgbImage, encode_png
from nucleus.errors import StorageError
from nucleus.metrics.scores import AP_NAMES
from nucleus.pictures import CYAN, YELLOW, brightened, draw_mistakes, draw_outlines, resize_to_side
from nucleus.predict.evaluation import PredictedImage
from nucleus.runs.plan import WANDB_FOLDER, RunFolder, RunPlan
from nucleus.runs.record import (
    EPOCH_PICTURE,
    FACTS_FILE,
    HISTORY_FILE,
    PICTURES,
    REPORT_FOLDER,
    TestImage,
    epochs_of_picture,
)
from nucleus.runs.state import AttemptCallback
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import disk_errors, write_sums, writing
from nucleus.storage.uri import parse_uri
from nucleus.surroundings import installed_versions
from nucleus.text import first_line
from nucleus.tracking.failover import RunTracking
from nucleus.tracking.tensorboard import EVENTS_FILE, TENSORBOARD_FOLDER, StepProfile, events_of, graph_of, write_events
from nucleus.tracking.wandb_artifacts import summary_of
from nucleus.tracking.wandb_run import WandbRun, keep_files
from nucleus.training.callbacks import AugmentedImage, Callback, CallbackList, TrainingResult
from nucleus.training.checkpoint import History
from nucleus.training.validation import RankedImage

__all__ = [
    "CheckpointCallback",
    "FactsCallback",
    "PictureCallback",
    "ProfileCallback",
    "TensorBoardCallback",
    "WandbCallback",
    "worker_callbacks",
]


_WATCHED = "watched"
"""Folder of the watched images' pictures."""
_LONGEST_SIDE = 384
"""Longest side of a picture, px; the report shows pictures smaller."""


def worker_callbacks(plan: RunPlan, events: Any | None, local: Path, wandb_dir: Path) -> CallbackList:
    """Return the callbacks of one worker.

    Args:
        plan: Plan of the run.
        events: Queue to the driver on the first worker; None on all others, which only draw pictures and report
            checkpoints.
        local: Folder of the run on this machine, for TensorBoard.
        wandb_dir: Folder on this machine for W&B's files.
    """
    home = RunFolder(Bucket(parse_uri(plan.bucket)), plan.run)
    folder = home.below()
    report = Bucket(folder.uri / REPORT_FOLDER)
    pictures = PictureCallback(report)
    if events is None:
        return CallbackList([pictures, CheckpointCallback()])
    profile = ProfileCallback(plan.recipe.tracking.profile_steps, local / TENSORBOARD_FOLDER)
    to_driver = EventCallback(events)
    tensorboard = TensorBoardCallback(folder, local, pictures, profile, to_driver.on_warning)
    tracking = RunTracking(partial(_wandb_run, plan, wandb_dir), plan.wandb_mode, to_driver.on_warning)
    wandb = WandbCallback(tracking, home.below(WANDB_FOLDER), to_driver.on_warning)
    checkpoint = CheckpointCallback(folder, tensorboard, tracking)
    facts = FactsCallback(report, plan.recipe)
    attempt = AttemptCallback(home)
    return CallbackList([attempt, profile, pictures, tensorboard, facts, wandb, to_driver, checkpoint])


def _wandb_run(plan: RunPlan, folder: Path, mode: str) -> WandbRun:
    config = {
        **plan.recipe.model_dump(mode="json"),
        "dataset_version": plan.dataset,
        "mix_versions": plan.mix,
        "start": str(plan.start) if plan.start else None,
        "run": plan.run,
        "commit": plan.commit,
        "versions": installed_versions(),
    }
    return WandbRun(
        plan.run, plan.recipe.tracking, mode, folder, config, plan.group, plan.commit, first_epoch=plan.first_epoch
    )


class ProfileCallback(Callback):
    """Profiles a few training steps for TensorBoard; see `nucleus.tracking.tensorboard.StepProfile`.

    Args:
        steps: Number of steps; 0 for no profile.
        folder: TensorBoard's folder on this machine.
    """

    def __init__(self, steps: int, folder: Path) -> None:
        self._profile = StepProfile(steps, folder)

    @property
    def files(self) -> dict[str, Path]:
        """The files of finished profiles, by name below TensorBoard's folder."""
        return self._profile.files

    def on_steps_end(
        self,
        epoch: int,
        epochs: int,  # noqa: ARG002
        done: int,
        total: int,
        loss: float,  # noqa: ARG002
        images_per_second: float,  # noqa: ARG002
    ) -> None:
        self._profile.steps(epoch, done, total)

    def on_close(self, *, failed: bool) -> None:  # noqa: ARG002
        self._profile.stop()


class PictureCallback(Callback):
    """Draws and uploads the pictures that `nucleus.runs.record` describes.

    Args:
        report: Folder of the run's report in the bucket.

    Attributes:
        predictions: PNGs of predictions that this process has drawn, by finished epochs (None: best weights), then
            image.
    """

    def __init__(self, report: Bucket) -> None:
        self._report = report
        self.predictions: dict[int | None, dict[str, bytes]] = {}

    def on_predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        when = "best" if epochs_done is None else f"{EPOCH_PICTURE}{epochs_done:05d}"
        drawn = self.predictions[epochs_done] = {}
        for image in images:
            sample, place = image.sample, f"{_WATCHED}/{image.sample.name}"
            small = _scaled(sample.image, sample.labels, image.labels)
            if epochs_done == 0:
                self._upload(f"{place}/image", small.image)
                self._upload(f"{place}/truth", draw_outlines(small.image, small.truth, CYAN))
            drawn[sample.name] = self._upload(f"{place}/{when}", draw_outlines(small.image, small.found, YELLOW))

    def uploaded_predictions(self, epochs: int) -> dict[int, dict[str, bytes]]:
        """Return the uploaded predictions up to a number of finished epochs: finished epochs, then image, then PNG."""
        found: dict[int, dict[str, bytes]] = {}
        for item in self._report.objects(f"{PICTURES}/{_WATCHED}/"):
            *_, name, file = item.key.split("/")
            done = epochs_of_picture(file)
            if done is not None and done <= epochs:
                found.setdefault(done, {})[name] = self._report.get(item.key)
        return found

    def on_ranked_images(self, images: Sequence[RankedImage]) -> None:
        for ranked in images:
            predicted = ranked.predicted
            sample, place = predicted.sample, f"test/{predicted.sample.name}"
            small = _scaled(sample.image, sample.labels, predicted.labels)
            self._upload(f"{place}/image", small.image)
            self._upload(f"{place}/truth", draw_outlines(small.image, small.truth, CYAN))
            mistakes = draw_mistakes(small.image, small.truth, small.found, predicted.scores.mistakes)
            self._upload(f"{place}/mistakes", mistakes)
            facts = _image_facts(ranked).model_dump_json(indent=1)
            self._report.put(f"{PICTURES}/{place}/{FACTS_FILE}", facts.encode())

    def on_examples(self, images: Sequence[AugmentedImage]) -> None:
        for example in images:
            sample, place = example.sample, f"examples/{example.sample.name}"
            small = _scaled(sample.image, sample.labels, sample.labels)
            crop = _scaled(example.image, example.labels, example.labels)
            self._upload(f"{place}/image", small.image)
            self._upload(f"{place}/labels", draw_outlines(small.image, small.truth, CYAN))
            self._upload(f"{place}/augmented", crop.image)
            self._upload(f"{place}/augmented-labels", draw_outlines(crop.image, crop.truth, CYAN))

    def _upload(self, place: str, picture: RgbImage) -> bytes:
        data = encode_png(picture)
        self._report.put(f"{PICTURES}/{place}.png", data)
        return data


def _image_facts(ranked: RankedImage) -> TestImage:
    sample, scores = ranked.predicted.sample, ranked.predicted.scores
    pixels, nuclei, mistakes = scores.pixels, scores.nuclei, scores.mistakes
    ap = dict(zip(AP_NAMES, nuclei.ap.tolist(), strict=True))
    mask = {"iou": pixels.iou, "dice": pixels.dice, "accuracy": pixels.accuracy}
    return TestImage(
        name=sample.name,
        kind=sample.kind,
        group=ranked.group,
        scores={"map": nuclei.mean_ap, **ap, **mask},
        nuclei=nuclei.true_nuclei,
        predicted=nuclei.predicted_nuclei,
        **mistakes.counts,
    )


@dataclass(frozen=True)
class _ScaledImage:
    """An image at the size and brightness of a picture, and its true and predicted labels."""

    image: RgbImage
    truth: NDArray[np.integer]
    found: NDArray[np.integer]


def _scaled(image: RgbImage, truth: NDArray[np.integer], found: NDArray[np.integer]) -> _ScaledImage:
    """Scale image and labels before drawing, because scaled outlines would fade."""
    return _ScaledImage(
        image=brightened(resize_to_side(image, _LONGEST_SIDE)),
        truth=resize_to_side(truth, _LONGEST_SIDE, nearest=True),
        found=resize_to_side(found, _LONGEST_SIDE, nearest=True),
    )


class TensorBoardCallback(Callback):
    """Writes TensorBoard's event file to this machine and to the bucket, and uploads the profile's files.

    Args:
        folder: The run's folder in the bucket.
        local: The run's folder on this machine.
        pictures: Callback with the predictions for the event file.
        profile: Callback with the profile's files.
        warn: Called with a text, once, if a file on this machine cannot be written or has vanished.
    """

    def __init__(
        self,
        folder: Bucket,
        local: Path,
        pictures: PictureCallback,
        profile: ProfileCallback,
        warn: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._local = local
        self._pictures = pictures
        self._profile = profile
        self._warn = warn
        self._warned = False
        self._earlier: dict[int, dict[str, bytes]] = {}
        self._graph: bytes | None = None

    def on_resume(self, history: History, where: str) -> None:  # noqa: ARG002
        self._earlier = self._pictures.uploaded_predictions(len(history))

    def on_train_end(self, result: TrainingResult, save: Callable[[Path], None]) -> None:  # noqa: ARG002
        self._graph = graph_of(result.model)

    def upload(self, history: History) -> Callable[[], None]:
        """Return a function, for another thread, that writes and uploads the event file with this history."""
        pictures, graph = self._tagged_pictures(len(history)), self._graph

        def upload() -> None:
            events = events_of(history, pictures, graph)
            self._folder.put(EVENTS_FILE, events)
            with self._forgiven():
                write_events(self._local / EVENTS_FILE, events)
                for name, path in self._profile.files.items():
                    self._folder.put(f"{TENSORBOARD_FOLDER}/{name}", path)

        return upload

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        """Make an error of this machine's disk a warning: checkpoints are worth more than these files."""
        try:
            yield
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            if not self._warned:
                self._warned = True
                self._warn(
                    f"TensorBoard's files on this machine are not complete, in {self._local}: {first_line(error)}"
                )

    def _tagged_pictures(self, epochs_done: int) -> dict[int, dict[str, bytes]]:
        """Return PNGs by finished epochs, then tag; predictions by the best weights are at the last epoch."""
        tagged: dict[int, dict[str, bytes]] = {}
        for when, drawn in [*self._earlier.items(), *self._pictures.predictions.items()]:
            at, title = (epochs_done, "best") if when is None else (when, "predictions")
            tagged.setdefault(at, {}).update({f"{title}/{name}": picture for name, picture in drawn.items()})
        return tagged


class FactsCallback(Callback):
    """Uploads the facts about a finished run for its report.

    Args:
        report: Folder of the run's report in the bucket.
        recipe: The run's recipe.
    """

    def __init__(self, report: Bucket, recipe: Recipe) -> None:
        self._report = report
        self._recipe = recipe

    def on_train_end(self, result: TrainingResult, save: Callable[[Path], None]) -> None:  # noqa: ARG002
        self._report.put(FACTS_FILE, run_facts(result, self._recipe).model_dump_json(indent=1).encode())


class WandbCallback(Callback):
    """Logs metrics and predictions to W&B, and keeps in the bucket what W&B's server does not have.

    Args:
        tracked: The tracking of the run.
        folder: Folder of the run in the bucket for the files of an offline run.
        warn: Called with a text if these files have vanished from this machine.
    """

    def __init__(self, tracked: RunTracking, folder: Bucket, warn: Callable[[str], None]) -> None:
        self._tracked = tracked
        self._folder = folder
        self._warn = warn
        self._finished = False

    def on_resume(self, history: History, where: str) -> None:  # noqa: ARG002
        for metrics in history:  # a lost machine may have logged them without sending them
            self._tracked.log(metrics)

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        self._tracked.log(metrics)

    def on_predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> None:
        self._tracked.predictions(epochs_done, images)

    def on_train_end(self, result: TrainingResult, save: Callable[[Path], None]) -> None:  # noqa: ARG002
        self._tracked.finish(summary_of(result.metrics))
        self._finished = True

    def on_close(self, *, failed: bool) -> None:  # noqa: ARG002
        """Close a run that has not finished, and upload the files of an offline run: this machine may be lost."""
        if not self._finished:
            self._tracked.abort()
        files = self._tracked.kept_files
        if self._tracked.mode == "offline" and not files:
            self._warn(
                "W&B's files of this run have vanished; its metrics are in the report and in TensorBoard's files."
            )
        keep_files(self._folder, files)


class CheckpointCallback(Callback):
    """Reports checkpoints to Ray Train, a barrier for all workers; the first worker saves and uploads them.

    Must be the last callback of a list: a run has finished when its last checkpoint, with the model, is reported.

    Args:
        folder: The run's folder in the bucket on the first worker; None on all others.
        tensorboard: Writes the event file, which is uploaded with each checkpoint.
        tracking: The tracking of the run in W&B: its path and mode are reported to the driver.
    """

    def __init__(
        self,
        folder: Bucket | None = None,
        tensorboard: TensorBoardCallback | None = None,
        tracking: RunTracking | None = None,
    ) -> None:
        self._folder = folder
        self._tensorboard = tensorboard
        self._tracking = tracking

    def on_checkpoint(self, history: History, save: Callable[[Path], None]) -> None:
        self._report(history, history[-1] if history else {}, save)

    def on_train_end(self, result: TrainingResult, save: Callable[[Path], None]) -> None:
        def save_all(folder: Path) -> None:
            save(folder)
            save_model(folder / FINAL_FOLDER, result)

        reported: dict[str, Any] = {"metrics": result.metrics}
        if self._tracking is not None:
            reported |= {"wandb_run": self._tracking.run_path, "wandb_mode": self._tracking.mode}
        self._report(result.progress.history, reported, save_all)

    def _report(self, history: History, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        if self._folder is None:
            ray.train.report(metrics)
            return
        local = _saved(save)
        ray.train.report(  # Ray uploads in the background, in order, then removes the folder
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(local),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._upload(self._folder, list(history)),
        )

    def _upload(self, folder: Bucket, history: History) -> Callable[[Any, str], Any]:
        """Return a function that uploads a checkpoint, then the history, then the event file.

        Each file is one request of this project's client: with Ray's default, `pyarrow.fs.copy_files`, the embedded
        server took 2.2 s for 21 MB; this takes 0.15 s.
        """
        storage = ray.train.get_context().get_storage()
        upload_events = self._tensorboard.upload(history) if self._tensorboard else None

        def upload(checkpoint: Any, name: str) -> Any:
            local = Path(checkpoint.path)
            for path in sorted(path for path in local.rglob("*") if path.is_file()):
                folder.put(f"{name}/{path.relative_to(local).as_posix()}", path)
            folder.put(HISTORY_FILE, json.dumps(history).encode())
            if upload_events is not None:
                upload_events()
            return ray.train.Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)

        return upload


def _saved(save: Callable[[Path], None]) -> str:
    """Return a new folder with a checkpoint and its sums. Raises `OutputError` if TMPDIR has no room for it."""
    with disk_errors():
        folder = Path(tempfile.mkdtemp(prefix="nucleus-checkpoint-"))
    try:
        with writing(folder / "checkpoint"):
            save(folder)
            write_sums(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return str(folder)
