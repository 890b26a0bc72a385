"""The state of a run, `runs/.states/<run>.json`: running, stopped, failed, published or finished.

The run's driver writes the file at each change, and every minute while the run continues (a heartbeat): the time of the
object shows whether the driver is alive. A separate thread writes it, so that a slow or failing bucket neither ends nor
delays the run. The state of a run that an older version of this package began may be `runs/<run>/state.json`.
`AttemptCallback` records each start of the workers.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict

from nucleus.errors import AccessDeniedError, JobError, ObjectNotFoundError, RunStoppedError, StorageError
from nucleus.runs.plan import RUNS, RunFolder
from nucleus.runs.record import ATTEMPTS_FILE, HISTORY_FILE, Attempt, attempts_json, read_attempts
from nucleus.storage.bucket import Bucket, StoredObject
from nucleus.storage.files import read_document
from nucleus.text import moment_text
from nucleus.training.callbacks import Callback

__all__ = [
    "HEARTBEAT_SECONDS",
    "LOST_SECONDS",
    "STATE_FILE",
    "UNKNOWN",
    "AttemptCallback",
    "RunState",
    "StateWriter",
    "Status",
    "Word",
    "find_state",
    "read_state",
    "replace_state_of_another",
    "server_time",
    "status_of",
]


STATE_FILE = "state.json"
"""File in a run's folder with its state, where an older version of this package wrote it."""
STATE_FORMAT = 1
HEARTBEAT_SECONDS = 60.0
"""Seconds between two writes of an unchanged state."""
LOST_SECONDS = 300.0
"""Seconds without a heartbeat after which a run is lost: its driver was killed, or cannot reach the bucket."""

_LAST_WRITE_SECONDS, _RETRY_SECONDS = 10.0, 0.5
"""Seconds for which the last write at the end of a run is tried, and between two tries."""
_LONGEST_CAUSE = 300
"""Characters of a failed run's cause, at most."""

Word = Literal["running", "lost", "stopped", "failed", "published", "finished", "unknown"]
"""The state of a run, as a reader sees it."""


class RunState(BaseModel):
    """The state of a run as its driver writes it.

    Attributes:
        format: Format of this document.
        state: `running`; `stopped` (on request; it can be resumed); `failed`; `published`; or `finished` (a sweep's
            trial that was not published).
        since: Start of this state, by the driver's clock.
        host: The driver's machine.
        process: The driver's process id.
        cause: Why the run failed, in one line.
        version: The published version, NAME@N.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = STATE_FORMAT
    state: Literal["running", "stopped", "failed", "published", "finished"]
    since: AwareDatetime
    host: str
    process: int
    cause: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Status:
    """The status of a run, as a reader sees it.

    Attributes:
        state: A state of `RunState`; `lost` for a running one without a heartbeat; `unknown` for a run with neither a
            state nor a record, which older versions of this package did not write.
        since: Start of this state, UTC, ISO 8601; for a lost run, its last heartbeat.
        host: The driver's machine.
        process: The driver's process id.
        last_heard: When the state was last written (the last heartbeat), by the server's clock.
        cause: Why the run failed, in one line.
        version: The published version, NAME@N.
    """

    state: Word
    since: str | None = None
    host: str | None = None
    process: int | None = None
    last_heard: datetime | None = None
    cause: str | None = None
    version: str | None = None

    @property
    def short(self) -> str:
        """The state alone: `published as NAME@N`, or `state`."""
        return f"published as {self.version}" if self.version else self.state

    @property
    def text(self) -> str:
        """The state with its time, driver and cause, in one line."""
        if self.state in {"published", "finished", "unknown"}:
            return self.short
        heard = moment_text(self.last_heard) if self.last_heard else ""
        since = f" since {moment_text(self.since)}" if self.since else ""
        driver = f" on {self.host} (process {self.process})" if self.host else ""
        if self.state == "running":
            return f"running{since}{driver}, last heartbeat {heard}"
        if self.state == "lost":
            return f"lost: no heartbeat since {heard}; it ran{driver}"
        return f"failed{since}: {self.cause}" if self.state == "failed" else f"stopped{since}, can be resumed"


UNKNOWN = Status("unknown")


def status_of(state: RunState | None, heard: datetime | None, now: datetime) -> Status:
    """Return the status of a run without a record or a published version.

    Args:
        state: The last state that the driver wrote; None if it wrote none.
        heard: When the server stored it.
        now: Present time by the server's clock: the clocks of driver and reader may differ from it.
    """
    if state is None or heard is None:
        return UNKNOWN
    known = {**state.model_dump(exclude={"format", "state"}), "since": state.since.isoformat()}
    if state.state == "running" and now - heard > timedelta(seconds=LOST_SECONDS):
        return Status("lost", **{**known, "since": heard.isoformat()}, last_heard=heard)
    return Status(state.state, **known, last_heard=heard)


def server_time(bucket: Bucket) -> datetime:
    """Return the time by the server's clock, which objects bear; by this machine's if the server does not report it."""
    return datetime.now(UTC) - timedelta(seconds=bucket.seconds_ahead(RUNS) or 0.0)


def find_state(folder: RunFolder, begun: datetime | None = None) -> StoredObject | None:
    """Return the object with a run's state; None if there is none, or only that of an earlier run of the same name.

    Args:
        folder: The folder of the run.
        begun: When the server stored the run's plan, if that is known.
    """
    found = folder.bucket.find(folder.state_key) or folder.bucket.find(folder.key(STATE_FILE))
    return None if found is None or (begun is not None and found.modified < begun) else found


def read_state(folder: RunFolder, key: str | None = None) -> RunState:
    """Return the last state that a run's driver wrote; `key` is where it is, if that is known.

    Raises:
        ObjectNotFoundError: There is none.
        JobError: The document is damaged or newer than this package.
    """
    if key is None:
        found = find_state(folder)
        key = folder.state_key if found is None else found.key
    data, where = folder.bucket.get(key), str(folder.bucket.uri / key)
    return read_document(RunState, data, what="a run's state", where=where, newest=STATE_FORMAT, error=JobError)


def replace_state_of_another(folder: RunFolder) -> None:
    """Make a run that is planned `stopped` if there is a state of a deleted run of its name, which is not its own."""
    if folder.bucket.find(folder.state_key) is not None:
        folder.bucket.put(folder.state_key, _here("stopped").model_dump_json(indent=1).encode())


class StateWriter:
    """Context manager that writes the state of a run: `running` within the block, and its final state at the end.

    `RunStoppedError` and `KeyboardInterrupt` make the run `stopped`, any other exception `failed`. A block that
    succeeds must call `published` or `finished` before its end; otherwise the run stays `running`, and is lost later.

    Args:
        folder: The folder of the run.
        beat_seconds: Seconds between two writes of an unchanged state.
    """

    def __init__(self, folder: RunFolder, beat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self._states = folder.apart()  # a separate client, for the separate thread
        self._key = folder.state_key
        self._beat_seconds = beat_seconds
        self._state = _here("running")
        self._changed = threading.Condition()
        self._over = False
        self._deadline = 0.0
        self._thread = threading.Thread(target=self._write_all, name="run-state", daemon=True)

    def published(self, version: str) -> None:
        """Set the state to `published`, with the version NAME@N."""
        self._set(_here("published", version=version))

    def finished(self) -> None:
        """Set the state to `finished`: the run publishes nothing."""
        self._set(_here("finished"))

    def __enter__(self) -> "StateWriter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._state.state == "running":  # an error after publishing is not a failed run
            stopped = isinstance(error, RunStoppedError | KeyboardInterrupt)
            self._set(_here("stopped") if stopped else _here("failed", cause=_one_line(error)))
        with self._changed:
            self._deadline = time.monotonic() + _LAST_WRITE_SECONDS
            self._over = True
            self._changed.notify()
        self._thread.join(_LAST_WRITE_SECONDS)  # a bucket that does not answer must not delay the end

    def _set(self, state: RunState) -> None:
        with self._changed:
            self._state = state
            self._changed.notify()

    def _write_all(self) -> None:
        tried: RunState | None = None
        written = True
        while True:
            with self._changed:
                if self._state is tried and not self._over:
                    self._changed.wait(self._beat_seconds)
                state, over = self._state, self._over
            if state is not tried or not written or (state.state == "running" and not over):
                written = self._write(state)
            tried = state
            if over and (written or time.monotonic() > self._deadline):
                return
            if over:
                time.sleep(_RETRY_SECONDS)

    def _write(self, state: RunState) -> bool:
        """Write a state; return whether to leave it at that. A failure must not end the run."""
        try:
            self._states.put(self._key, state.model_dump_json(indent=1).encode())
        except AccessDeniedError:  # trying again is of no use
            return True
        except Exception:
            return False
        return True


def _here(state: Literal["running", "stopped", "failed", "published", "finished"], **known: str) -> RunState:
    return RunState(
        state=state,
        since=datetime.now(UTC).replace(microsecond=0),
        host=socket.gethostname(),
        process=os.getpid(),
        **known,
    )


def _one_line(error: BaseException) -> str:
    lines = str(error).split("\n")
    return (" ".join(lines[0].split()) or type(error).__name__)[:_LONGEST_CAUSE]


class AttemptCallback(Callback):
    """Records each start of the workers with what it cost: the time since the last checkpoint before it.

    All times are the server's: of the last write of a checkpoint, and of this record at the first step. A record that
    cannot be written does not end the run.

    Args:
        home: Folder of the run in the bucket.
    """

    def __init__(self, home: RunFolder) -> None:
        self._home = home
        self._before: list[Attempt] = []
        self._since: datetime | None = None
        self._recorded = False
        with suppress(StorageError, JobError):  # none was written, or it is damaged
            self._before = read_attempts(home.bucket.get(home.key(ATTEMPTS_FILE)), str(home.uri(ATTEMPTS_FILE)))
            self._since = self._last_write(HISTORY_FILE, ATTEMPTS_FILE)

    def on_steps_end(
        self,
        epoch: int,
        epochs: int,  # noqa: ARG002
        done: int,  # noqa: ARG002
        total: int,  # noqa: ARG002
        loss: float,  # noqa: ARG002
        images_per_second: float,  # noqa: ARG002
    ) -> None:
        if self._recorded:
            return
        self._recorded = True
        with suppress(StorageError):
            self._record(Attempt(driver=self._driver(), epochs_done=epoch - 1))

    def _record(self, attempt: Attempt) -> None:
        self._write(attempt)
        now = self._last_write(ATTEMPTS_FILE) if self._since is not None else None
        if self._since is not None and now is not None:
            self._write(attempt.model_copy(update={"lost": max(0.0, (now - self._since).total_seconds())}))

    def _write(self, attempt: Attempt) -> None:
        self._home.bucket.put(self._home.key(ATTEMPTS_FILE), attempts_json([*self._before, attempt]))

    def _last_write(self, *names: str) -> datetime | None:
        found = [self._home.bucket.find(self._home.key(name)) for name in names]
        return max((item.modified for item in found if item is not None), default=None)

    def _driver(self) -> str:
        try:
            state = read_state(self._home)
        except (ObjectNotFoundError, JobError):  # its driver could not write it, or it is damaged
            return ""
        return f"{state.host} {state.process} {state.since.isoformat()}"
