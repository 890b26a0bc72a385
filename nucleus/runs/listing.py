"""Runs in the bucket, found by name: plan, state, history, and record or published version."""

import difflib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError

import nucleus
from nucleus.config.names import check_name
from nucleus.errors import IntegrityError, JobError, ModelError, NucleusError, ObjectNotFoundError, StorageError
from nucleus.metrics.scores import count_from_one
from nucleus.registry.manifest import ModelManifest, list_versions, read_version, version_prefix
from nucleus.runs.plan import PLAN_FILE, RUNS, RunFolder, RunPlan, read_plan
from nucleus.runs.record import HISTORY_FILE, RECORD_FILE, REPORT_FOLDER, RunRecord, read_history, read_record
from nucleus.runs.state import STATE_FILE, UNKNOWN, Status, find_state, read_state, server_time, status_of
from nucleus.storage.bucket import Bucket, StoredObject

__all__ = [
    "DamagedRun",
    "EpochMetrics",
    "StoredRun",
    "TopLevel",
    "best_epoch",
    "find_run",
    "find_runs",
    "history_of_version",
    "look_at_run",
    "monitor_of",
    "read_run",
    "setting",
    "with_manifests",
]


EpochMetrics = dict[str, float]
"""Metrics of one epoch: `epoch` (from 1), `loss`, `learning_rate` and, if it was validated, `val_` metrics."""

_DEFAULT_MONITOR = "val_map"
"""Metric that chooses the best weights in a recipe without `optimizer.monitor`."""
_AT_ONCE = 8
"""Runs that are read in parallel."""


@dataclass(frozen=True)
class StoredRun:
    """A run in the bucket, whatever its state.

    Attributes:
        plan: The run's plan; its recipe may be one of another version of this package, and is not checked.
        begun: When the plan was written.
        written: When a document of the run was last written, its state among them; each checkpoint writes some.
        folders: Names of the folders in the run's folder.
        history: Metrics of each finished epoch.
        record: Record of the run; None if it has not ended, or ended before this package wrote records.
        manifest: Manifest of the version that a run without a record published; None if there is none.
        reported: Status by the driver's state file; ignored if there is a record or a published version.
    """

    plan: RunPlan
    begun: datetime
    written: datetime
    folders: tuple[str, ...]
    history: list[EpochMetrics]
    record: RunRecord | None = None
    manifest: ModelManifest | None = None
    reported: Status = UNKNOWN

    @property
    def run(self) -> str:
        """Name of the run."""
        return self.plan.run

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.plan.model

    @property
    def published(self) -> str | None:
        """The published version, NAME@N; None if there is none."""
        return self.status.version

    @property
    def status(self) -> Status:
        """Status by the record, else by the published version, else by the driver's state file."""
        if self.record is not None and self.record.version is not None:
            version = f"{self.record.model}@{self.record.version}"
            return Status("published", since=self.record.ended, version=version)
        if self.manifest is not None:
            version = f"{self.manifest.model}@{self.manifest.version}"
            return Status("published", since=self.manifest.created, version=version)
        return Status("finished", since=self.record.ended) if self.record else self.reported

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Scores of the best weights: split, then `all` or kind, then metric; empty until the run ends."""
        if self.record is not None:
            return self.record.metrics
        return self.manifest.origin.metrics if self.manifest else {}

    @property
    def epochs(self) -> tuple[int, int | None]:
        """Number of finished epochs, and the number in the recipe."""
        return len(self.history), setting(self.plan.settings, "optimizer.epochs")

    @property
    def monitor(self) -> str:
        """Name of the validation metric that chooses the best weights."""
        return monitor_of(self.plan.settings)

    @property
    def best(self) -> EpochMetrics | None:
        """Metrics of the epoch with the best weights; None before the first validation."""
        return best_epoch(self.history, self.plan.settings)


@dataclass(frozen=True)
class DamagedRun:
    """A run with a document that cannot be read.

    Attributes:
        run: Name of the run.
        begun: When the plan was written.
        written: When a document of the run was last written.
        problem: Error message, with the address of the document.
        plan: The run's plan; None if it cannot be read.
    """

    run: str
    begun: datetime
    written: datetime
    problem: str
    plan: RunPlan | None


def setting(recipe: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key such as `optimizer.epochs`; None if the recipe does not have it."""
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def monitor_of(recipe: dict[str, Any]) -> str:
    """Return the name of the validation metric that chooses the best weights."""
    return str(setting(recipe, "optimizer.monitor") or _DEFAULT_MONITOR)


def best_epoch(history: Sequence[EpochMetrics], recipe: dict[str, Any]) -> EpochMetrics | None:
    """Return the first epoch with the highest value of the recipe's monitor; None before the first validation."""
    monitor = monitor_of(recipe)
    return max((epoch for epoch in history if monitor in epoch), key=lambda epoch: epoch[monitor], default=None)


class _VersionMetrics(BaseModel):
    """The part of a version's `metrics.json` that the manifest does not have."""

    history: list[EpochMetrics]


@dataclass(frozen=True)
class TopLevel:
    """The top level of a run's folder, and its state.

    Attributes:
        run: Name of the run.
        files: The objects directly in the folder, by name; the plan is one.
        folders: Names of the folders in it.
        state: The object with the run's state; None if there is none.
    """

    run: str
    files: dict[str, StoredObject]
    folders: tuple[str, ...]
    state: StoredObject | None

    @property
    def begun(self) -> datetime:
        """When the plan was written."""
        return self.files[PLAN_FILE].modified

    @property
    def written(self) -> datetime:
        """When a document of the run was last written."""
        return max(item.modified for item in (*self.files.values(), *([self.state] if self.state else [])))


def find_run(bucket: Bucket, run: str, warn: Callable[[str], None] = lambda _: None) -> StoredRun:
    """Return a run by name. Raises what `find_runs` raises."""
    return find_runs(bucket, [run], warn)[0]


def find_runs(bucket: Bucket, names: Sequence[str], warn: Callable[[str], None] = lambda _: None) -> list[StoredRun]:
    """Return runs by name, in the given order. `warn` is called with a message for each version that cannot be read.

    Raises:
        UriError: A name is not a valid name of a run.
        JobError: There is no such run, or one of its documents cannot be read.
    """
    for name in names:
        check_name(name, "run")
    now = server_time(bucket)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(partial(_read_named, bucket, now), names))
        runs = with_manifests(bucket, found, pool, warn)
    damaged = next((run for run in runs if isinstance(run, DamagedRun)), None)
    if damaged is not None:
        raise JobError(damaged.problem)
    return [run for run in runs if isinstance(run, StoredRun)]


def _read_named(bucket: Bucket, now: datetime, run: str) -> StoredRun | DamagedRun:
    folder = look_at_run(bucket, run)
    if folder is not None:
        folder = replace(folder, state=find_state(RunFolder(bucket, run), folder.begun))
    found = read_run(bucket, now, folder) if folder else None
    if found is None:
        raise JobError(_missing(bucket, run))
    return found


def history_of_version(bucket: Bucket, manifest: ModelManifest) -> list[EpochMetrics]:
    """Return the metrics of each epoch of the run that published a version; an empty list for one without history.

    Raises:
        IntegrityError: `metrics.json` is missing, or its checksum differs from the manifest's.
        ModelError: `metrics.json` cannot be parsed.
    """
    name = nucleus.model.METRICS_FILE
    if name not in manifest.files:
        return []
    key = f"{version_prefix(manifest.model, manifest.version)}/{name}"
    file = io.BytesIO()
    try:
        bucket.read_into(key, file, sha256=manifest.files[name].sha256)
        return count_from_one(_VersionMetrics.model_validate_json(file.getvalue()).history)
    except ObjectNotFoundError as error:
        raise IntegrityError(
            f"Expected {bucket.uri / key}, which the manifest lists; it is missing. Choose another version."
        ) from error
    except ValidationError as error:
        raise ModelError(f"Expected a version's metrics at {bucket.uri / key}; they are damaged: {error}") from error


def look_at_run(bucket: Bucket, run: str) -> TopLevel | None:
    """Return the top level of a run's folder; None if it has no plan."""
    objects, folders = bucket.children(RunFolder(bucket, run).key())
    files = {item.key.rpartition("/")[2]: item for item in objects}
    return TopLevel(run, files, tuple(folders), files.get(STATE_FILE)) if PLAN_FILE in files else None


def read_run(bucket: Bucket, now: datetime, folder: TopLevel) -> StoredRun | DamagedRun | None:
    """Return a run by the documents in its folder, without the version that it published; None if it was removed."""
    plan = None
    begun, written = folder.begun, folder.written
    try:
        plan = read_plan(bucket, folder.run)
        record = _record(bucket, folder.run) if REPORT_FOLDER in folder.folders else None
        if record is not None:
            return StoredRun(plan, begun, written, folder.folders, record.history, record)
        stored = folder.state
        state = read_state(RunFolder(bucket, folder.run), stored.key) if stored else None
        reported = status_of(state, stored.modified if stored else None, now)
        return StoredRun(plan, begun, written, folder.folders, _history(bucket, folder), reported=reported)
    except ObjectNotFoundError:  # it is being removed
        return None
    except StorageError:
        raise
    except NucleusError as error:
        return DamagedRun(folder.run, begun, written, str(error), plan)


def _record(bucket: Bucket, run: str) -> RunRecord | None:
    key = RunFolder(bucket, run).key(REPORT_FOLDER, RECORD_FILE)
    try:
        return read_record(bucket.get(key), str(bucket.uri / key))
    except ObjectNotFoundError:
        return None


def _history(bucket: Bucket, folder: TopLevel) -> list[EpochMetrics]:
    if HISTORY_FILE not in folder.files:
        return []
    key = RunFolder(bucket, folder.run).key(HISTORY_FILE)
    return read_history(bucket.get(key), str(bucket.uri / key))


def with_manifests(
    bucket: Bucket,
    runs: Sequence[StoredRun | DamagedRun],
    pool: ThreadPoolExecutor,
    warn: Callable[[str], None] = lambda _: None,
) -> list[StoredRun | DamagedRun]:
    """Return runs with the manifest and history of the version that each published, if it has no record.

    The manifests of all versions of the models of runs without a record are read. `warn` is called with a message for
    each that cannot be read.
    """
    without = [run for run in runs if isinstance(run, StoredRun) and run.record is None]
    models = sorted({run.model for run in without})
    versions = [(model, version) for model in models for version in list_versions(bucket, model)]
    publishers = {}
    for manifest in pool.map(lambda named: _manifest(bucket, *named), versions):
        if isinstance(manifest, ModelManifest):
            publishers[manifest.origin.run] = manifest
        else:
            warn(str(manifest))
    return list(pool.map(partial(_with_manifest, bucket, publishers), runs))


def _manifest(bucket: Bucket, model: str, version: int) -> ModelManifest | NucleusError:
    try:
        return read_version(bucket, model, version)
    except (ModelError, IntegrityError) as error:
        return error


def _with_manifest(
    bucket: Bucket, publishers: dict[str, ModelManifest], run: StoredRun | DamagedRun
) -> StoredRun | DamagedRun:
    """Return the run, with the manifest and history of its published version if it has no record."""
    if isinstance(run, DamagedRun) or run.record is not None or run.run not in publishers:
        return run
    manifest = publishers[run.run]
    try:
        history = run.history or history_of_version(bucket, manifest)
    except (ModelError, IntegrityError) as error:
        return DamagedRun(run.run, run.begun, run.written, str(error), run.plan)
    return replace(run, history=history, manifest=manifest)


def _missing(bucket: Bucket, run: str) -> str:
    names = [name for name in bucket.folders(RUNS) if not name.startswith(".")]
    if run in names:
        return (
            f"Expected a run at {RunFolder(bucket, run).uri()}; found no {PLAN_FILE}: this is the folder of a sweep, "
            f"or of an old run that has expired in part. Run: nucleus runs list --group {run}"
        )
    near = difflib.get_close_matches(run, names, n=3)
    meant = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return f"Expected a run in {bucket.uri / RUNS}; found none named {run!r}{meant}. Run: nucleus runs list"
