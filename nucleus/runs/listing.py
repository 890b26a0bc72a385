"""Runs in the bucket, listed or found by name: plan, state, history, and record or published version of each."""

import difflib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any

from pydantic import BaseModel, ValidationError

import nucleus
from nucleus.config.names import check_name
from nucleus.errors import IntegrityError, JobError, ModelError, NucleusError, ObjectNotFoundError, StorageError
from nucleus.registry.manifest import ModelManifest, read_version, version_prefix
from nucleus.registry.versions import list_versions
from nucleus.runs.plan import PLAN_FILE, RUNS, RunFolder, RunPlan, read_plan
from nucleus.runs.record import HISTORY_FILE, RECORD_FILE, REPORT_FOLDER, RunRecord, read_history, read_record
from nucleus.runs.state import STATE_FILE, UNKNOWN, Status, read_state, server_time, status_of
from nucleus.storage.bucket import Bucket

__all__ = [
    "DamagedRun",
    "EpochMetrics",
    "StoredRun",
    "best_epoch",
    "find_run",
    "find_runs",
    "history_of_version",
    "list_runs",
    "monitor_of",
    "setting",
]


EpochMetrics = dict[str, float]
"""Metrics of one epoch: `epoch` (from 0), `loss`, `learning_rate` and, where it was validated, `val_` metrics."""

_DEFAULT_MONITOR = "val_map"
"""Metric that chooses the best weights in a recipe without `optimizer.monitor`."""


@dataclass(frozen=True)
class StoredRun:
    """A run.

    Attributes:
        plan: What it is to do; its recipe may be one of another version of this package, and is not checked.
        begun: When its plan was written.
        written: When an object directly in its folder was last written; each checkpoint writes some.
        folders: Names of the folders in it.
        history: Metrics of each epoch that is done.
        record: What it left at its end; None if it has not ended, or ended before runs left records.
        manifest: Manifest of the version that it published, where there is no record.
        reported: Where it stands as its driver says; of no account once there is a record or a version.
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
        """Its name."""
        return self.plan.run

    @property
    def model(self) -> str:
        """Name under which it publishes."""
        return self.plan.model

    @property
    def published(self) -> str | None:
        """NAME@N, the version that it published, if it did."""
        return self.status.version

    @property
    def status(self) -> Status:
        """Where it stands: by its record, else by the version that it published, else as its driver says."""
        if self.record is not None and self.record.version is not None:
            version = f"{self.record.model}@{self.record.version}"
            return Status("published", since=self.record.ended, version=version)
        if self.manifest is not None:
            version = f"{self.manifest.model}@{self.manifest.version}"
            return Status("published", since=self.manifest.created, version=version)
        return Status("finished", since=self.record.ended) if self.record else self.reported

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, float]]]:
        """Scores of the best weights: split, then `all` or kind, then metric; empty before the end."""
        if self.record is not None:
            return self.record.metrics
        return self.manifest.origin.metrics if self.manifest else {}

    @property
    def epochs(self) -> tuple[int, int | None]:
        """Number of epochs done, and the number in the recipe."""
        return len(self.history), setting(self.plan.settings, "optimizer.epochs")

    @property
    def monitor(self) -> str:
        """The validation metric that chooses the best weights."""
        return monitor_of(self.plan.settings)

    @property
    def best(self) -> EpochMetrics | None:
        """The epoch whose weights were best."""
        return best_epoch(self.history, self.plan.settings)


@dataclass(frozen=True)
class DamagedRun:
    """A run with a document that cannot be read.

    Attributes:
        run: Its name.
        begun: When its plan was written.
        written: When an object directly in its folder was last written.
        problem: What is wrong, with the name of the document.
        plan: What it was to do, if that can be read.
    """

    run: str
    begun: datetime
    written: datetime
    problem: str
    plan: RunPlan | None


def setting(recipe: dict[str, Any], key: str) -> Any:
    """The value of a key such as `optimizer.epochs`; None if the recipe does not have it."""
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def monitor_of(recipe: dict[str, Any]) -> str:
    """The validation metric that chooses the best weights."""
    return str(setting(recipe, "optimizer.monitor") or _DEFAULT_MONITOR)


def best_epoch(history: Sequence[EpochMetrics], recipe: dict[str, Any]) -> EpochMetrics | None:
    """The first validated epoch with the largest value of the recipe's monitor; None before the first validation."""
    monitor = monitor_of(recipe)
    return max((epoch for epoch in history if monitor in epoch), key=lambda epoch: epoch[monitor], default=None)


_AT_ONCE = 8
_CHUNK = 64


class _VersionMetrics(BaseModel):
    """A version's `metrics.json`; its metrics are in the manifest too."""

    history: list[EpochMetrics]


@dataclass(frozen=True)
class _Folder:
    """A run's folder: when the objects directly in it were written, by name, and the folders in it."""

    run: str
    written: dict[str, datetime]
    folders: tuple[str, ...]


def list_runs(
    bucket: Bucket,
    *,
    model: str | None = None,
    group: str | None = None,
    limit: int | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> list[StoredRun | DamagedRun]:
    """Runs in the bucket, newest first; folders without a plan, such as a sweep's own, are no runs.

    Requests: for each run a listing of the top of its folder, and two or three small objects (the plan, and the record
    or else state and history). For runs without a record, the manifests of their model's versions are read to find out
    which run published them. A run that is left out by `limit` costs its listing alone.

    Args:
        bucket: The project's bucket.
        model: Only runs of this model.
        group: Only runs of this group.
        limit: The newest of these runs, at most this many.
        warn: Called for each document that cannot be read; a run with an unreadable plan is always listed.
    """
    now = server_time(bucket)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        folders = [folder for folder in pool.map(partial(_look, bucket), bucket.folders(RUNS)) if folder]
        folders.sort(key=lambda folder: (folder.written[PLAN_FILE], folder.run), reverse=True)
        found: list[StoredRun | DamagedRun] = []
        for chunk in _chunks(folders, max(_AT_ONCE, min(limit or _CHUNK, _CHUNK))):
            read = pool.map(partial(_read, bucket, model, group, now), chunk)
            found += [run for run in read if run is not None]
            if limit is not None and len(found) >= limit:
                break
        publishers = _publishers(bucket, found[:limit], pool, warn)
        runs = list(pool.map(partial(_with_manifest, bucket, publishers), found[:limit]))
    for run in runs:
        if isinstance(run, DamagedRun):
            warn(run.problem)
    return runs


def find_run(bucket: Bucket, run: str, warn: Callable[[str], None] = lambda _: None) -> StoredRun:
    """One run. Raises what `find_runs` raises."""
    return find_runs(bucket, [run], warn)[0]


def find_runs(bucket: Bucket, names: Sequence[str], warn: Callable[[str], None] = lambda _: None) -> list[StoredRun]:
    """Runs by name, in the order given. `warn` is called for versions that cannot be read.

    Raises:
        UriError: No run can have this name.
        JobError: There is no such run, or one of its documents cannot be read.
    """
    for name in names:
        check_name(name, "run")
    now = server_time(bucket)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(partial(_read_named, bucket, now), names))
        publishers = _publishers(bucket, found, pool, warn)
        runs = list(pool.map(partial(_with_manifest, bucket, publishers), found))
    damaged = next((run for run in runs if isinstance(run, DamagedRun)), None)
    if damaged is not None:
        raise JobError(damaged.problem)
    return [run for run in runs if isinstance(run, StoredRun)]


def _read_named(bucket: Bucket, now: datetime, run: str) -> StoredRun | DamagedRun:
    folder = _look(bucket, run)
    found = _read(bucket, None, None, now, folder) if folder else None
    if found is None:
        raise JobError(_missing(bucket, run))
    return found


def history_of_version(bucket: Bucket, manifest: ModelManifest) -> list[EpochMetrics]:
    """The epochs of the run that published a version; none if the version does not say.

    Raises:
        IntegrityError: The file has another sum than the manifest gives, or is missing.
        ModelError: It cannot be read.
    """
    name = nucleus.model.METRICS_FILE
    if name not in manifest.files:
        return []
    key = f"{version_prefix(manifest.model, manifest.version)}/{name}"
    file = io.BytesIO()
    try:
        bucket.read_into(key, file, sha256=manifest.files[name].sha256)
        return _VersionMetrics.model_validate_json(file.getvalue()).history
    except ObjectNotFoundError as error:
        raise IntegrityError(
            f"Expected {bucket.uri / key}, as the manifest says; it is missing. Take another version."
        ) from error
    except ValidationError as error:
        raise ModelError(f"Expected a version's metrics at {bucket.uri / key}; they are damaged: {error}") from error


def _look(bucket: Bucket, run: str) -> _Folder | None:
    """The top of a run's folder; None for one that has no plan."""
    objects, folders = bucket.children(RunFolder(bucket, run).key())
    written = {item.key.rpartition("/")[2]: item.modified for item in objects}
    return _Folder(run, written, tuple(folders)) if PLAN_FILE in written else None


def _read(
    bucket: Bucket, model: str | None, group: str | None, now: datetime, folder: _Folder
) -> StoredRun | DamagedRun | None:
    """A run by its own documents; None if it is not of the model and group that are wanted."""
    plan = None
    begun, written = folder.written[PLAN_FILE], max(folder.written.values())
    try:
        plan = read_plan(bucket, folder.run)
        if model not in {None, plan.model} or group not in {None, plan.group}:
            return None
        record = _record(bucket, folder.run) if REPORT_FOLDER in folder.folders else None
        if record is not None:
            return StoredRun(plan, begun, written, folder.folders, record.history, record)
        heard = folder.written.get(STATE_FILE)
        state = read_state(RunFolder(bucket, folder.run)) if heard else None
        history, reported = _history(bucket, folder), status_of(state, heard, now)
        return StoredRun(plan, begun, written, folder.folders, history, reported=reported)
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


def _history(bucket: Bucket, folder: _Folder) -> list[EpochMetrics]:
    if HISTORY_FILE not in folder.written:
        return []
    key = RunFolder(bucket, folder.run).key(HISTORY_FILE)
    return read_history(bucket.get(key), str(bucket.uri / key))


def _publishers(
    bucket: Bucket, runs: Sequence[StoredRun | DamagedRun], pool: ThreadPoolExecutor, warn: Callable[[str], None]
) -> dict[str, ModelManifest]:
    """By run: what it published, for the models of those runs that have no record."""
    without = [run for run in runs if isinstance(run, StoredRun) and run.record is None]
    models = sorted({run.model for run in without})
    versions = [(model, version) for model in models for version in list_versions(bucket, model)]
    found = {}
    for manifest in pool.map(lambda named: _manifest(bucket, *named), versions):
        if isinstance(manifest, ModelManifest):
            found[manifest.origin.run] = manifest
        else:
            warn(str(manifest))
    return found


def _manifest(bucket: Bucket, model: str, version: int) -> ModelManifest | NucleusError:
    try:
        return read_version(bucket, model, version)
    except (ModelError, IntegrityError) as error:
        return error


def _with_manifest(
    bucket: Bucket, publishers: dict[str, ModelManifest], run: StoredRun | DamagedRun
) -> StoredRun | DamagedRun:
    """A run without a record and with the version that it published, which knows its history too."""
    if isinstance(run, DamagedRun) or run.record is not None or run.run not in publishers:
        return run
    manifest = publishers[run.run]
    try:
        history = run.history or history_of_version(bucket, manifest)
    except (ModelError, IntegrityError) as error:
        return DamagedRun(run.run, run.begun, run.written, str(error), run.plan)
    return replace(run, history=history, manifest=manifest)


def _missing(bucket: Bucket, run: str) -> str:
    names = bucket.folders(RUNS)
    if run in names:
        return (
            f"Expected a run at {RunFolder(bucket, run).uri()}; no {PLAN_FILE} is there, so it is a sweep's own "
            f"folder, or an old run that expired in part. Run: nucleus runs list --group {run}"
        )
    near = difflib.get_close_matches(run, names, n=3)
    meant = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return f"Expected a run in {bucket.uri / RUNS}; there is none called {run!r}{meant}. Run: nucleus runs list"


def _chunks(items: Sequence[_Folder], size: int) -> Iterator[list[_Folder]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
