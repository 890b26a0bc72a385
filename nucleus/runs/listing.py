"""Runs as values: what each is and where it stands, by what it has left in the bucket."""

import difflib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from nucleus.config.names import check_name
from nucleus.errors import IntegrityError, JobError, ModelError, NucleusError, ObjectNotFoundError, StorageError
from nucleus.registry.manifest import EncoderWeightsOrigin, ModelManifest, read_version, version_prefix
from nucleus.registry.versions import list_versions
from nucleus.runs.record import HISTORY_FILE, RECORD_FILE, REPORT_FOLDER, RunRecord, read_history, read_record
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import read_document

__all__ = [
    "PLAN_FORMAT",
    "DamagedRun",
    "EpochMetrics",
    "RunOutline",
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
"""What is known of one epoch: `epoch` (from 0), `loss`, `learning_rate` and, where it was validated, `val_` metrics."""

PLAN_FORMAT = 1
"""Newest format of a run's plan that is understood."""

_DEFAULT_MONITOR = "val_map"
"""Chooses the best weights where a recipe does not say by what."""


class RunOutline(BaseModel):
    """What a run was to do: the part of its plan that is needed to tell of it.

    The recipe is not checked: one of an older version of this package may have other keys.

    Attributes:
        format: Of the plan.
        run: Its name.
        recipe: The whole recipe.
        dataset: `s3://.../NAME@VERSION`.
        weights: What the encoder began with.
        group: What it belongs to, such as a sweep.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = PLAN_FORMAT
    run: str
    recipe: dict[str, Any]
    dataset: str
    weights: EncoderWeightsOrigin
    group: str | None = None

    @field_validator("recipe")
    @classmethod
    def _names_a_model(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        check_name(str(recipe.get("model")), "model")
        return recipe


@dataclass(frozen=True)
class StoredRun:
    """A run.

    Attributes:
        outline: What it was to do.
        begun: When its plan was written.
        written: When an object directly in its folder was last written; each checkpoint writes some.
        folders: Names of the folders in it.
        history: What is known of each epoch that is done.
        record: What it left at its end; None if it has not ended, or ended before runs left records.
        manifest: Of the version that it published, where there is no record to tell.
    """

    outline: RunOutline
    begun: datetime
    written: datetime
    folders: tuple[str, ...]
    history: list[EpochMetrics]
    record: RunRecord | None = None
    manifest: ModelManifest | None = None

    @property
    def run(self) -> str:
        """Its name."""
        return self.outline.run

    @property
    def model(self) -> str:
        """Under which name its recipe publishes."""
        return str(self.outline.recipe["model"])

    @property
    def published(self) -> str | None:
        """NAME@N, the version that it published, if it did."""
        if self.record is not None and self.record.version is not None:
            return f"{self.record.model}@{self.record.version}"
        return f"{self.manifest.model}@{self.manifest.version}" if self.manifest else None

    @property
    def state(self) -> str:
        """`published as NAME@N`, `finished` (a trial that was not), or `no record`.

        The bucket does not tell whether a run without a record goes on, was stopped or has failed; `written` may.
        """
        if self.published:
            return f"published as {self.published}"
        return "finished" if self.record else "no record"

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, float]]]:
        """Scores of the best weights: split, then `all` or kind, then metric; empty before the end."""
        if self.record is not None:
            return self.record.metrics
        return self.manifest.origin.metrics if self.manifest else {}

    @property
    def epochs(self) -> tuple[int, int | None]:
        """How many are done, and how many the recipe asks for."""
        return len(self.history), setting(self.outline.recipe, "optimizer.epochs")

    @property
    def monitor(self) -> str:
        """The validation metric that chooses the best weights."""
        return monitor_of(self.outline.recipe)

    @property
    def best(self) -> EpochMetrics | None:
        """The epoch whose weights were best."""
        return best_epoch(self.history, self.outline.recipe)


@dataclass(frozen=True)
class DamagedRun:
    """A run with a document that cannot be read.

    Attributes:
        run: Its name.
        begun: When its plan was written.
        written: When an object directly in its folder was last written.
        problem: Names the document.
        outline: What it was to do, if that can be read.
    """

    run: str
    begun: datetime
    written: datetime
    problem: str
    outline: RunOutline | None


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


_PLAN_FILE = "run.json"
_METRICS_FILE = "metrics.json"
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
    """The runs in the bucket, the one that was begun last first; folders without a plan, as a sweep's own, are none.

    Each run costs the listing of the top of its folder, and two small objects: the plan, and the record or else the
    history. For those without a record (they go on, were stopped, or are old) the versions of their model are asked
    who published them: a listing, and a manifest each. A run that is left out by `limit` costs its listing alone.

    Args:
        bucket: The project's.
        model: Only runs of this model.
        group: Only runs of this group.
        limit: At most so many.
        warn: Is told of documents that cannot be read; a run whose plan cannot be is listed whatever is asked for.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        folders = [folder for folder in pool.map(partial(_look, bucket), bucket.folders("runs")) if folder]
        folders.sort(key=lambda folder: (folder.written[_PLAN_FILE], folder.run), reverse=True)
        found: list[StoredRun | DamagedRun] = []
        for chunk in _chunks(folders, max(_AT_ONCE, min(limit or _CHUNK, _CHUNK))):
            read = pool.map(partial(_read, bucket, model, group), chunk)
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
    """Runs by name, in the order given. `warn` is told of versions that cannot be read.

    Raises:
        UriError: No run can have this name.
        JobError: There is no such run, or one of its documents cannot be read.
    """
    for name in names:
        check_name(name, "run")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(partial(_read_named, bucket), names))
        publishers = _publishers(bucket, found, pool, warn)
        runs = list(pool.map(partial(_with_manifest, bucket, publishers), found))
    damaged = next((run for run in runs if isinstance(run, DamagedRun)), None)
    if damaged is not None:
        raise JobError(damaged.problem)
    return [run for run in runs if isinstance(run, StoredRun)]


def _read_named(bucket: Bucket, run: str) -> StoredRun | DamagedRun:
    folder = _look(bucket, run)
    found = _read(bucket, None, None, folder) if folder else None
    if found is None:
        raise JobError(_missing(bucket, run))
    return found


def history_of_version(bucket: Bucket, manifest: ModelManifest) -> list[EpochMetrics]:
    """The epochs of the run that published a version; none if the version does not say.

    Raises:
        IntegrityError: The file has another sum than the manifest gives, or is missing.
        ModelError: It cannot be read.
    """
    if _METRICS_FILE not in manifest.files:
        return []
    key = f"{version_prefix(manifest.model, manifest.version)}/{_METRICS_FILE}"
    file = io.BytesIO()
    try:
        bucket.read_into(key, file, sha256=manifest.files[_METRICS_FILE].sha256)
        return _VersionMetrics.model_validate_json(file.getvalue()).history
    except ObjectNotFoundError as error:
        raise IntegrityError(
            f"Expected {bucket.uri / key}, as the manifest says; it is missing. Take another version."
        ) from error
    except ValidationError as error:
        raise ModelError(f"Expected a version's metrics at {bucket.uri / key}; they are damaged: {error}") from error


def _look(bucket: Bucket, run: str) -> _Folder | None:
    """The top of a run's folder; None for one that has no plan."""
    objects, folders = bucket.children(f"runs/{run}")
    written = {item.key.rpartition("/")[2]: item.modified for item in objects}
    return _Folder(run, written, tuple(folders)) if _PLAN_FILE in written else None


def _read(bucket: Bucket, model: str | None, group: str | None, folder: _Folder) -> StoredRun | DamagedRun | None:
    """A run by its own documents; None if it is not of the model and group that are wanted."""
    outline = None
    begun, written = folder.written[_PLAN_FILE], max(folder.written.values())
    try:
        outline = _outline(bucket, folder.run)
        if model not in {None, outline.recipe.get("model")} or group not in {None, outline.group}:
            return None
        record = _record(bucket, folder.run) if REPORT_FOLDER in folder.folders else None
        history = record.history if record else _history(bucket, folder)
        return StoredRun(outline, begun, written, folder.folders, history, record)
    except ObjectNotFoundError:  # it is being removed
        return None
    except StorageError:
        raise
    except NucleusError as error:
        return DamagedRun(folder.run, begun, written, str(error), outline)


def _outline(bucket: Bucket, run: str) -> RunOutline:
    key = f"runs/{run}/{_PLAN_FILE}"
    where = str(bucket.uri / key)
    outline = read_document(
        RunOutline, bucket.get(key), what="a run's plan", where=where, newest=PLAN_FORMAT, error=JobError
    )
    if outline.run != run:
        raise JobError(f"Expected the plan of the run {run!r} at {where}; found that of {outline.run!r}.")
    return outline


def _record(bucket: Bucket, run: str) -> RunRecord | None:
    key = f"runs/{run}/{REPORT_FOLDER}/{RECORD_FILE}"
    try:
        return read_record(bucket.get(key), str(bucket.uri / key))
    except ObjectNotFoundError:
        return None


def _history(bucket: Bucket, folder: _Folder) -> list[EpochMetrics]:
    if HISTORY_FILE not in folder.written:
        return []
    key = f"runs/{folder.run}/{HISTORY_FILE}"
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
        return DamagedRun(run.run, run.begun, run.written, str(error), run.outline)
    return replace(run, history=history, manifest=manifest)


def _missing(bucket: Bucket, run: str) -> str:
    names = bucket.folders("runs")
    if run in names:
        return (
            f"Expected a run at {bucket.uri / f'runs/{run}'}; no {_PLAN_FILE} is there, so it is a sweep's own folder, "
            f"or an old run that expired in part. Run: nucleus runs list --group {run}"
        )
    near = difflib.get_close_matches(run, names, n=3)
    meant = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return f"Expected a run in {bucket.uri / 'runs'}; there is none called {run!r}{meant}. Run: nucleus runs list"


def _chunks(items: Sequence[_Folder], size: int) -> Iterator[list[_Folder]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
