"""The list of runs: a row for each, and an index of the rows of runs that have ended, `runs/.index.json`.

Two listings, of the folders below `runs/` and of the states of all runs, tell which runs there are, and by the ETag and
the time of its state whether one has changed since its row was made. Only rows of runs that changed are made anew. No
driver writes the index: who lists runs does, by compare-and-swap, and nobody needs it. So a writer that dies, or one
that another overtakes, costs time alone. In the index are rows that can change no more without a new state: of runs
with a record, of stopped and failed ones, and of those that have been lost for a day.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from nucleus.errors import ObjectNotFoundError, StorageError
from nucleus.runs.listing import DamagedRun, StoredRun, TopLevel, look_at_run, read_run, with_manifests
from nucleus.runs.plan import RUNS, STATES
from nucleus.runs.state import Word, server_time
from nucleus.storage.bucket import Bucket, StoredObject
from nucleus.text import first_line

__all__ = ["RunRow", "list_runs", "row_of_run"]

_INDEX = f"{RUNS}.index.json"
_FORMAT = 1
_AT_ONCE = 8
"""Runs that are read in parallel."""
_CHUNK = 64
"""Runs that are read before their number is compared with the limit, at most."""
_WORTH = 32
"""Rows that the index lacks, at least, when it is written."""
_LOST_FOR_GOOD = timedelta(days=1)
_ENDED = {"stopped", "failed"}


class RunRow(BaseModel):
    """A run in the list; None stands for what is unknown.

    Attributes:
        run: Name of the run.
        model: Name of the model.
        group: Group of the run, such as a sweep.
        state: A state of `Status`, or `damaged` for a run with a document that cannot be read.
        version: The published version, NAME@N.
        since: Start of the state, ISO 8601.
        host: The driver's machine.
        process: The driver's process id.
        last_heard: Last heartbeat, by the server's clock.
        cause: Why the run failed, in one line.
        details: The state in one line.
        epochs: Number of finished epochs.
        epochs_asked: Number of epochs in the recipe.
        monitor: Name of the validation metric that chooses the best weights.
        best_epoch: Epoch with the best weights, from 1.
        best_score: Its value of the monitor.
        best_epoch_map: Its validation mAP.
        val_map: Validation mAP after the thresholds were tuned.
        test_map: mAP on the test split.
        dataset: `s3://.../NAME@VERSION`.
        begun: When the plan was written, by the server's clock.
        last_write: When a document of the run was last written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    model: str | None = None
    group: str | None = None
    state: Word | Literal["damaged"]
    version: str | None = None
    since: str | None = None
    host: str | None = None
    process: int | None = None
    last_heard: AwareDatetime | None = None
    cause: str | None = None
    details: str | None = None
    epochs: int | None = None
    epochs_asked: int | None = None
    monitor: str | None = None
    best_epoch: int | None = None
    best_score: float | None = None
    best_epoch_map: float | None = None
    val_map: float | None = None
    test_map: float | None = None
    dataset: str | None = None
    begun: AwareDatetime
    last_write: AwareDatetime


def row_of_run(run: StoredRun | DamagedRun) -> RunRow:
    """Return the row of a run."""
    plan = run.plan
    about: dict[str, Any] = {"run": run.run, "model": plan and plan.model, "group": plan and plan.group}
    about |= {"dataset": plan and plan.dataset, "begun": run.begun, "last_write": run.written}
    if isinstance(run, DamagedRun):
        return RunRow.model_validate(about | {"state": "damaged", "details": " ".join(run.problem.split())})
    best, status = run.best, run.status
    done, asked = run.epochs
    progress = {
        "epochs": done or None,
        "epochs_asked": asked,
        "monitor": run.monitor,
        "best_epoch": best and int(best["epoch"]),
        "best_score": best and best[run.monitor],
        "best_epoch_map": best and best.get("val_map"),
        "val_map": run.metrics.get("val", {}).get("all", {}).get("map"),
        "test_map": run.metrics.get("test", {}).get("all", {}).get("map"),
    }
    return RunRow.model_validate(about | asdict(status) | progress | {"details": status.text})


class _Known(BaseModel):
    """A row of the index, with the state that the run had when the row was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    etag: str
    modified: AwareDatetime
    row: RunRow

    def is_of(self, state: StoredObject | None) -> bool:
        """Return whether the run still has this state."""
        return state is not None and (state.etag, state.modified) == (self.etag, self.modified)


class _Index(BaseModel):
    """The index. One of another format, as a later version of this package may write, counts as none."""

    model_config = ConfigDict(extra="forbid")

    format: int = _FORMAT
    runs: dict[str, _Known] = {}


def list_runs(
    bucket: Bucket,
    *,
    model: str | None = None,
    group: str | None = None,
    limit: int | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> list[RunRow]:
    """Return the runs in the bucket, newest first. Folders without a plan, such as that of a sweep, are not runs.

    Requests: a listing of the folders, one of the states of all runs, and the index; for each run that the index lacks
    a listing of its folder's top level, and two or three small objects (the plan, and the record or else state and
    history). If some of these have no record, the manifests of all versions of their models are read too, to find the
    runs that published them. A run beyond `limit` costs only its listing. What was read goes into the index, if this
    process may write it.

    Args:
        bucket: The project's bucket.
        model: Only runs of this model.
        group: Only runs of this group.
        limit: Largest number of runs; the newest ones are returned.
        warn: Called with a message for each document that cannot be read. A run with an unreadable plan is always
            listed.
    """
    now = server_time(bucket)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        listed, of_states = pool.submit(bucket.folders, RUNS), pool.submit(_states, bucket)
        index, tag = _read_index(bucket, warn)
        names, states = listed.result(), of_states.result()
        known = {run: index[run] for run in names if run in index and index[run].is_of(states.get(run))}
        missing = [run for run in names if run not in known and not run.startswith(".")]
        looked = pool.map(partial(_look, bucket, states), missing)
        order: list[tuple[datetime, str, TopLevel | None]] = [
            *((folder.begun, folder.run, folder) for folder in looked if folder is not None),
            *((each.row.begun, run, None) for run, each in known.items()),
        ]
        order.sort(key=lambda each: each[:2], reverse=True)
        found: list[RunRow] = []
        new: dict[str, _Known] = {}
        for chunk in _chunks(order, max(_AT_ONCE, min(limit or _CHUNK, _CHUNK))):
            folders = [folder for *_, folder in chunk if folder is not None]
            made = _made(bucket, folders, now, pool, warn)
            new |= _lasting(folders, made, now)
            rows = {run: known[run].row for _, run, folder in chunk if folder is None}
            rows |= {run: row_of_run(each) for run, each in made.items()}
            found += [rows[run] for _, run, _ in chunk if run in rows and _is_asked(rows[run], model, group)]
            if limit is not None and len(found) >= limit:
                break
        if len(new) >= _WORTH:
            _write_index(bucket, known | new, tag)
    return found[:limit]


def _states(bucket: Bucket) -> dict[str, StoredObject]:
    """Return the objects with the states of all runs, by run."""
    return {item.key.removeprefix(STATES).removesuffix(".json"): item for item in bucket.objects(STATES)}


def _look(bucket: Bucket, states: Mapping[str, StoredObject], run: str) -> TopLevel | None:
    folder = look_at_run(bucket, run)
    state = states.get(run)
    if folder is None or state is None or state.modified < folder.begun:  # that of a deleted run of the same name
        return folder
    return replace(folder, state=state)


def _made(
    bucket: Bucket, folders: Sequence[TopLevel], now: datetime, pool: ThreadPoolExecutor, warn: Callable[[str], None]
) -> dict[str, StoredRun | DamagedRun]:
    """Return runs by their documents, by name."""
    read = [run for run in pool.map(partial(read_run, bucket, now), folders) if run is not None]
    runs = with_manifests(bucket, read, pool, warn)
    for run in runs:
        if isinstance(run, DamagedRun):
            warn(run.problem)
    return {run.run: run for run in runs}


def _lasting(
    folders: Iterable[TopLevel], runs: Mapping[str, StoredRun | DamagedRun], now: datetime
) -> dict[str, _Known]:
    """Return the rows that can change no more without a new state."""
    found = {}
    for folder in folders:
        run, state = runs.get(folder.run), folder.state
        if not isinstance(run, StoredRun) or state is None or not state.key.startswith(STATES):
            continue
        lost = run.status.state == "lost" and now - state.modified > _LOST_FOR_GOOD
        if run.record is not None or run.status.state in _ENDED or lost:
            found[folder.run] = _Known(etag=state.etag, modified=state.modified, row=row_of_run(run))
    return found


def _is_asked(row: RunRow, model: str | None, group: str | None) -> bool:
    """Return whether a row is of the model and the group; one without a plan is of any."""
    return row.model is None or (model in {None, row.model} and group in {None, row.group})


def _read_index(bucket: Bucket, warn: Callable[[str], None]) -> tuple[dict[str, _Known], str | None]:
    """Return the rows of the index, and its ETag; None if there is none."""
    try:
        data, tag = bucket.get_tagged(_INDEX)
    except ObjectNotFoundError:
        return {}, None
    try:
        index = _Index.model_validate_json(data)
    except ValidationError as error:
        warn(f"Expected the index of runs at {bucket.uri / _INDEX}; it is damaged, and made anew: {first_line(error)}")
        return {}, tag
    return index.runs if index.format == _FORMAT else {}, tag


def _write_index(bucket: Bucket, runs: dict[str, _Known], tag: str | None) -> None:
    """Write the index unless somebody else did, or this process may not: then the next one who lists runs does."""
    data = _Index(runs=runs).model_dump_json(exclude_none=True).encode()
    with suppress(StorageError):
        bucket.put(_INDEX, data, if_match=tag, if_absent=tag is None)


def _chunks(
    items: Sequence[tuple[datetime, str, TopLevel | None]], size: int
) -> Iterator[list[tuple[datetime, str, TopLevel | None]]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
