"""What a network is made of, told by the network itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.train
from numpy.typing import NDArray

import nucleus
from job.signals import Demands
from nucleus.data.images import RgbImage, encode_png
from nucleus.lazy import keras, tf
from nucleus.metrics.scores import AP_NAMES
from nucleus.model.architecture import ModelConfig
from nucleus.model.unet import encoder_of
from nucleus.pictures import CYAN, YELLOW, brightened, draw_mistakes, draw_outlines, resize_to_side
from nucleus.runs.plan import RunPlan
from nucleus.runs.record import (
    EPOCH_PICTURE,
    FACTS_FILE,
    HISTORY_FILE,
    PICTURES,
    REPORT_FOLDER,
    Facts,
    NetworkFacts,
    TestImage,
    epochs_of_picture,
)
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import write_sums
from nucleus.storage.uri import parse_uri
from nucleus.text import plural
from nucleus.tracking.tensorboard import EVENTS_FILE, TENSORBOARD_FOLDER, StepProfile, events_of, graph_of, write_events
from nucleus.tracking.wandb_artifacts import summary_of
from nucleus.tracking.wandb_run import Tracker
from nucleus.training.callbacks import Augmented, Finished
from nucleus.training.checkpoint import History
from nucleus.training.validation import Extreme, PredictedImage
from nucleus.versions import installed_versions

if TYPE_CHECKING:
    from nucleus.training.callbacks import Finished

__all__ = ["FINAL_FOLDER", "RayReporter", "RunPictures", "network_facts", "save_model"]


def network_facts(model: keras.Model, config: ModelConfig, *, encoder_trained: bool) -> NetworkFacts:
    """Describe a network of `nucleus.model.unet.build_unet`; `encoder_trained` says if its encoder was trained too."""
    encoder = encoder_of(model)
    decoder = model.count_params() - encoder.count_params()
    trained = sum(int(variable.shape.num_elements()) for variable in encoder.trainable_variables)
    return NetworkFacts(
        encoder=config.encoder,
        parameters=model.count_params(),
        encoder_parameters=encoder.count_params(),
        trained_parameters=decoder + (trained if encoder_trained else 0),
        skips=[int(output.shape[-1]) for output in encoder.outputs],
        decoder=list(config.decoder_channels),
        outputs=list(config.channels),
    )


FINAL_FOLDER = "model"
"""Folder of the last checkpoint that holds the model's files."""

_PREVIEW_SIDE = 256


def save_model(folder: Path, finished: Finished) -> None:
    """Write the model's files into a new folder."""

    folder.mkdir()
    finished.model.save_weights(folder / nucleus.model.WEIGHTS_FILE)
    (folder / nucleus.model.CONFIG_FILE).write_text(finished.config.model_dump_json(indent=1))
    (folder / "metrics.json").write_text(
        json.dumps({"metrics": finished.metrics, "history": finished.progress.history}, indent=1)
    )
    (folder / "preview.png").write_bytes(nucleus.data.encode_png(_preview(finished)))


def _preview(finished: Finished) -> Any:
    """Image, truth and prediction side by side for a few images of the test split."""

    config = finished.config
    network = nucleus.model.TiledNetwork(finished.model, config)
    rows = []
    for example in finished.examples:
        labels = nucleus.model.label_nuclei(
            nucleus.model.maps_of(network(example.image), config.heads), config.instances
        )
        rows.append(
            [
                example.image,
                nucleus.pictures.draw_outlines(example.image, example.labels, nucleus.pictures.CYAN),
                nucleus.pictures.draw_outlines(example.image, labels),
            ]
        )
    return nucleus.pictures.contact_sheet(rows, _PREVIEW_SIDE)


_WATCHED = "watched"
_MOST_PIXELS = 384
"""Longer side of a picture: pages show them smaller."""


class RunPictures:
    """Draws and uploads the pictures that `nucleus.runs.record` describes.

    Args:
        report: The run's report in the bucket.
    """

    def __init__(self, report: Bucket) -> None:
        self._report = report

    def predictions(self, epochs_done: int | None, images: Sequence[PredictedImage]) -> dict[str, bytes]:
        """Keep what the network makes of the watched images; return the pictures by the images' names."""
        when = "best" if epochs_done is None else f"{EPOCH_PICTURE}{epochs_done:05d}"
        drawn = {}
        for image in images:
            sample, place = image.sample, f"{_WATCHED}/{image.sample.name}"
            small = _small(sample.image, sample.labels, image.labels)
            if epochs_done == 0:
                self._keep(f"{place}/image", small.image)
                self._keep(f"{place}/truth", draw_outlines(small.image, small.truth, CYAN))
            drawn[sample.name] = self._keep(f"{place}/{when}", draw_outlines(small.image, small.found, YELLOW))
        return drawn

    def stored_predictions(self, epochs: int) -> dict[int, dict[str, bytes]]:
        """What was kept of the watched images in the first epochs: epochs done, then name, then picture."""
        found: dict[int, dict[str, bytes]] = {}
        for item in self._report.objects(f"{PICTURES}/{_WATCHED}/"):
            *_, name, file = item.key.split("/")
            done = epochs_of_picture(file)
            if done is not None and done <= epochs:
                found.setdefault(done, {})[name] = self._report.get(item.key)
        return found

    def extremes(self, images: Sequence[Extreme]) -> None:
        """Keep this worker's part of the best and worst test images: two pictures and what is to be said of each."""
        for extreme in images:
            predicted = extreme.predicted
            sample, place = predicted.sample, f"test/{predicted.sample.name}"
            small = _small(sample.image, sample.labels, predicted.labels)
            mistakes = predicted.scores.mistakes
            self._keep(f"{place}/image", small.image)
            self._keep(f"{place}/truth", draw_outlines(small.image, small.truth, CYAN))
            self._keep(f"{place}/mistakes", draw_mistakes(small.image, small.truth, small.found, mistakes))
            pixels, nuclei = predicted.scores.pixels, predicted.scores.nuclei
            ap = dict(zip(AP_NAMES, nuclei.ap.tolist(), strict=True))
            mask = {"iou": pixels.iou, "dice": pixels.dice, "accuracy": pixels.accuracy}
            facts = TestImage(
                name=sample.name,
                kind=sample.kind,
                group=extreme.group,
                scores={"map": nuclei.mean_ap, **ap, **mask},
                nuclei=nuclei.true_nuclei,
                predicted=nuclei.predicted_nuclei,
                **mistakes.counts,
            )
            self._report.put(f"{PICTURES}/{place}/{FACTS_FILE}", facts.model_dump_json(indent=1).encode())

    def examples(self, images: Sequence[Augmented]) -> None:
        """Keep a few training images, before and after augmentation."""
        for example in images:
            sample, place = example.sample, f"examples/{example.sample.name}"
            small = _small(sample.image, sample.labels, sample.labels)
            crop = _small(example.image, example.labels, example.labels)
            self._keep(f"{place}/image", small.image)
            self._keep(f"{place}/labels", draw_outlines(small.image, small.truth, CYAN))
            self._keep(f"{place}/augmented", crop.image)
            self._keep(f"{place}/augmented-labels", draw_outlines(crop.image, crop.truth, CYAN))

    def _keep(self, place: str, picture: RgbImage) -> bytes:
        data = encode_png(picture)
        self._report.put(f"{PICTURES}/{place}.png", data)
        return data


@dataclass(frozen=True)
class _Small:
    """An image as it is drawn: bright enough to see, and not too large."""

    image: RgbImage
    truth: NDArray[np.integer]
    found: NDArray[np.integer]


def _small(image: RgbImage, truth: NDArray[np.integer], found: NDArray[np.integer]) -> _Small:
    """Reduced before anything is drawn on it: lines that are reduced fade."""
    return _Small(
        image=brightened(resize_to_side(image, _MOST_PIXELS)),
        truth=resize_to_side(truth, _MOST_PIXELS, nearest=True),
        found=resize_to_side(found, _MOST_PIXELS, nearest=True),
    )


_PREDICTIONS, _BEST = "predictions", "best"
"""What the names of pictures in TensorBoard begin with."""


class RayReporter:
    """A `nucleus.training.callbacks.Reporter`.

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
    return plural(cpus, "CPU core")
