"""The report of a run, made from its workers' files in the bucket, and written to disk and to the bucket."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from pydantic import ValidationError

from nucleus import __version__
from nucleus.data.dataset import DatasetManifest, locate_dataset, open_dataset
from nucleus.errors import JobError, ObjectNotFoundError, StorageError
from nucleus.registry.aliases import GateDecision, read_decision
from nucleus.registry.manifest import ModelManifest, version_prefix
from nucleus.report.page import write_report
from nucleus.report.page_pictures import mistakes_in_words
from nucleus.runs.plan import WANDB_FOLDER, RunFolder, RunPlan
from nucleus.runs.record import (
    ATTEMPTS_FILE,
    FACTS_FILE,
    HISTORY_FILE,
    PICTURES,
    RECORD_FILE,
    REPORT_FOLDER,
    Attempt,
    ExampleImage,
    Facts,
    RunRecord,
    Stage,
    TestImage,
    WatchedImage,
    epochs_of_picture,
    names_below,
    read_attempts,
    read_facts,
    read_history,
)
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import write_atomic
from nucleus.storage.s3_errors import AWS_HOSTS
from nucleus.surroundings import repository
from nucleus.text import first_line
from nucleus.tracking.wandb_artifacts import note_published
from nucleus.tracking.wandb_run import WorstImage, keep_files, kept_files
from nucleus.training.callbacks import Callback

__all__ = ["has_facts", "report_folder", "report_published", "report_run"]

_CONNECTIONS = 8
_SHOWN = {"mAP": "map", "AP.5": "ap_50", "IoU": "iou"}
"""Scores in the captions of the worst images in W&B: title, then key."""


def report_folder(plan: RunPlan) -> Path:
    """Return the folder of a run's report on the driver's machine."""
    return Path(plan.folder) / plan.run / REPORT_FOLDER


def has_facts(bucket: Bucket, run: str) -> bool:
    """Return whether the bucket has the workers' facts that a run's report needs."""
    return bucket.find(RunFolder(bucket, run).key(REPORT_FOLDER, FACTS_FILE)) is not None


def report_published(
    plan: RunPlan, manifest: ModelManifest, bucket: Bucket, callback: Callback, seconds: Mapping[str, float]
) -> None:
    """Write the report of a run that has published a version, and log the version in W&B.

    Problems are shown as warnings, because the version is published and the run has succeeded. If this machine cannot
    hold the report (its folder vanished, cannot be written or is full), it is only in the bucket.
    """
    published = f"{manifest.model}@{manifest.version} is published"
    try:
        _stand_somewhere()
        folder = report_folder(plan)
        try:
            _report_published(plan, manifest, bucket, callback, seconds, folder)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            with tempfile.TemporaryDirectory(prefix="nucleus-report-") as temporary:
                _report_published(plan, manifest, bucket, callback, seconds, Path(temporary))
            where = RunFolder(bucket, plan.run).uri(REPORT_FOLDER)
            callback.on_warning(f"{published}; its report is only in {where}, not in {folder}: {first_line(error)}")
    except Exception as error:
        callback.on_warning(
            f"{published}; its report is not complete: {first_line(error) or type(error).__name__} "
            f"To write it again: {plan.resume_command}"
        )


def _stand_somewhere() -> None:
    """Leave a current folder that was removed: W&B and Matplotlib ask for it."""
    try:
        Path.cwd()
    except FileNotFoundError:
        os.chdir(tempfile.gettempdir())


def _report_published(
    plan: RunPlan,
    manifest: ModelManifest,
    bucket: Bucket,
    callback: Callback,
    seconds: Mapping[str, float],
    folder: Path,
) -> None:
    origin = manifest.origin
    decision = read_decision(bucket, manifest.model, manifest.version)
    mode = origin.wandb_mode or plan.wandb_mode
    tracked = (origin.wandb_run, mode)
    record = report_run(plan, origin.metrics, tracked, bucket, callback, manifest, decision, seconds, folder)
    if mode == "offline" and not Path(plan.wandb_dir).is_dir():
        callback.on_warning(
            f"{manifest.model}@{manifest.version} is published, and not logged in W&B: its folder {plan.wandb_dir} "
            f"has vanished. To log it in another one, run there: {plan.resume_command}"
        )
        return
    problems = note_published(
        plan.run,
        plan.recipe.tracking,
        mode,
        Path(plan.wandb_dir),
        plan.group,
        manifest=manifest,
        uri=bucket.uri / version_prefix(manifest.model, manifest.version),
        history=record.history,
        worst=[_worst_image(folder, image) for image in record.test_images if image.group == "worst"],
        alias=decision.alias if decision and decision.passed else None,
        commit=plan.commit,
        first_epoch=plan.first_epoch,
    )
    for problem in problems:
        callback.on_warning(problem)
    if mode == "offline" or problems:
        keep_files(RunFolder(bucket, plan.run).below(WANDB_FOLDER), kept_files(Path(plan.wandb_dir), plan.run))


def _worst_image(folder: Path, image: TestImage) -> WorstImage:
    pictures = folder / PICTURES / "test" / image.name
    scores = ", ".join(f"{title} {image.scores[name]:.3f}" for title, name in _SHOWN.items())
    nuclei = f"{image.nuclei} nuclei, {image.predicted} predicted: {mistakes_in_words(image)}"
    caption = f"{image.name} ({image.kind}): {scores}; {nuclei}"
    return WorstImage(image.name, caption, pictures / "image.png", pictures / "mistakes.png")


def report_run(
    plan: RunPlan,
    metrics: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    tracked: tuple[str | None, str],
    bucket: Bucket,
    callback: Callback,
    manifest: ModelManifest | None = None,
    decision: GateDecision | None = None,
    seconds: Mapping[str, float] = MappingProxyType({}),
    folder: Path | None = None,
) -> RunRecord:
    """Write the report of a run whose workers have finished, to a folder and to `runs/<run>/report/` in the bucket.

    Args:
        plan: The run.
        metrics: Scores of the best weights: split, then `all` or kind of image, then metric.
        tracked: W&B's path `[entity/]project/id`, None if tracking was disabled; and the mode, such as `online`.
        bucket: The project's bucket.
        callback: Shows the progress.
        manifest: Manifest of the version that the run has published; None if there is none.
        decision: The gate's decision about that version; None if it was not asked.
        seconds: Seconds that the driver spent on `train` and `publish`; either may be missing.
        folder: Folder on this machine; None for `report_folder`.

    Raises:
        OSError: The folder cannot be written.
        JobError: A file of the workers is damaged.
        ObjectNotFoundError: The workers' facts or the history are missing.
        StorageError: The bucket cannot be used.
    """
    callback.on_stage("Writing the report")
    folder = folder or report_folder(plan)
    home = RunFolder(bucket, plan.run)
    stored = home.below(REPORT_FOLDER)
    pictures = _fetch_pictures(stored, folder)
    facts = read_facts(stored.get(FACTS_FILE), str(stored.uri / FACTS_FILE))
    history = read_history(bucket.get(home.key(HISTORY_FILE)), str(home.uri(HISTORY_FILE)))
    attempts = _attempts(home)
    dataset = open_dataset(locate_dataset(plan.dataset)).manifest
    record = RunRecord(
        run=plan.run,
        group=plan.group,
        bucket=str(bucket.uri),
        model=plan.recipe.model,
        version=manifest.version if manifest else None,
        gate=str(decision) if decision else None,
        begun=plan.begun,
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=plan.recipe.model_dump(mode="json"),
        dataset=plan.dataset,
        encoder_weights=plan.weights,
        start=manifest.origin.start if manifest else plan.start,
        mix=manifest.origin.mix if manifest else [],
        metrics=metrics,
        history=history,
        best_epoch=facts.best_epoch,
        network=facts.network,
        thresholds=facts.thresholds,
        nucleus_diameter=facts.nucleus_diameter,
        workers=facts.workers,
        device=facts.device,
        stages=_stages(facts, history, seconds, attempts),
        worker_seconds=_worker_seconds(facts, history),
        cpus_per_worker=plan.recipe.cpus_per_worker,
        gpus_per_worker=plan.recipe.gpus_per_worker,
        versions=facts.versions,
        code_version=__version__,
        commit=plan.commit,
        wandb_run=tracked[0],
        wandb_mode=tracked[1],
        examples=[ExampleImage(name=name, kind=kind) for name, kind in _named(pictures, "examples", dataset)],
        watched=_watched(pictures, dataset, len(history)),
        test_images=_test_images(folder, pictures),
        attempts=attempts,
        endpoint=bucket.endpoint if AWS_HOSTS not in bucket.endpoint else None,
        repository=repository(),
    )
    write_atomic(folder / RECORD_FILE, record.model_dump_json(indent=1))
    write_report(folder, record, dataset)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            stored.put(path.name, path)
    return record


def _fetch_pictures(stored: Bucket, folder: Path) -> list[PurePosixPath]:
    """Download the workers' pictures; return their paths below the folder `pictures`."""
    names = names_below(stored, f"{PICTURES}/")

    def fetch(name: str) -> None:
        write_atomic(folder / PICTURES / name, stored.get(f"{PICTURES}/{name}"))

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for _ in pool.map(fetch, names):
            pass
    return [PurePosixPath(name) for name in names]


def _attempts(home: RunFolder) -> list[Attempt]:
    try:
        return read_attempts(home.bucket.get(home.key(ATTEMPTS_FILE)), str(home.uri(ATTEMPTS_FILE)))
    except ObjectNotFoundError:  # an older version of this package trained the run
        return []


def _stages(
    facts: Facts, history: list[dict[str, float]], seconds: Mapping[str, float], attempts: list[Attempt]
) -> list[Stage]:
    """Return the stages of a run. What restarts cost is a stage of its own, as far as this driver has seen them."""
    epochs = {
        "train": sum(metrics["seconds"] for metrics in history),
        "validate": sum(metrics.get("validation_seconds", 0.0) for metrics in history),
    }
    build = {name: spent for name, spent in facts.seconds.items() if name == "build the network"}
    after = {name: spent for name, spent in facts.seconds.items() if name not in build}
    stages = {**build, **epochs, **after}
    rest = seconds.get("train", 0.0) - sum(stages.values())
    lost = sum(each.lost for each in attempts[1:] if each.driver == attempts[-1].driver)
    if rest > 0:
        restarts = {"lost to restarts": min(lost, rest)} if lost else {}
        stages = {"start, wait and save": max(0.0, rest - lost), **stages, **restarts}
    if "publish" in seconds:
        stages["publish"] = seconds["publish"]
    return [Stage(name=name, seconds=spent) for name, spent in stages.items()]


def _worker_seconds(facts: Facts, history: list[dict[str, float]]) -> float:
    epochs = sum((m["seconds"] + m.get("validation_seconds", 0.0)) * m["workers"] for m in history)
    return epochs + facts.workers * sum(facts.seconds.values())


def _named(pictures: Iterable[PurePosixPath], part: str, dataset: DatasetManifest) -> list[tuple[str, str]]:
    """Return name and kind of the images with pictures in a folder of `pictures`, in the dataset's order."""
    names = {path.parts[1] for path in pictures if path.parts[0] == part}
    samples = dataset.samples
    return [pair for pair in zip(samples.texts("name"), samples.texts("kind"), strict=True) if pair[0] in names]


def _watched(pictures: list[PurePosixPath], dataset: DatasetManifest, epochs: int) -> list[WatchedImage]:
    return [
        WatchedImage(
            name=name,
            kind=kind,
            epochs=sorted(
                done
                for path in pictures
                if path.parts[:2] == ("watched", name)
                if (done := epochs_of_picture(path.name)) is not None and done <= epochs
            ),
        )
        for name, kind in _named(pictures, "watched", dataset)
    ]


def _test_images(folder: Path, pictures: list[PurePosixPath]) -> list[TestImage]:
    paths = [folder / PICTURES / path for path in pictures if path.parts[0] == "test" and path.name == FACTS_FILE]
    found = [_test_image(path) for path in paths]

    def quality(image: TestImage) -> tuple[float, float]:
        return image.scores["map"], image.scores["iou"]

    best = sorted((image for image in found if image.group == "best"), key=quality, reverse=True)
    return [*best, *sorted((image for image in found if image.group == "worst"), key=quality)]


def _test_image(path: Path) -> TestImage:
    try:
        return TestImage.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise JobError(f"Expected the facts about a test image at {path}; they are damaged: {error}") from error
