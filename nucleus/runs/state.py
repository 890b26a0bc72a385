"""The state of a run, `runs/<run>/state.json`: running, stopped, failed, published or finished.

The run's driver writes it when it changes, and again every minute while the run goes on, so the object's time tells
whether the driver is alive. Nothing of this ends a run or holds it up: writes are made by a thread of their own.
"""

import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict

from nucleus.errors import JobError, RunStoppedError
from nucleus.runs.plan import RUNS, RunFolder
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import read_document
from nucleus.text import moment_text

__all__ = [
    "HEARTBEAT_SECONDS",
    "LOST_SECONDS",
    "STATE_FILE",
    "UNKNOWN",
    "RunState",
    "StateWriter",
    "Status",
    "read_state",
    "server_time",
    "status_of",
]


STATE_FILE = "state.json"
STATE_FORMAT = 1
HEARTBEAT_SECONDS = 60.0
"""How often a driver writes its run's state again."""
LOST_SECONDS = 300.0
"""A run whose state was not written again for so long is lost: its driver was killed, or cannot reach the bucket."""

_LAST_WRITE_SECONDS = 10.0
_LONGEST_CAUSE = 300

Word = Literal["running", "lost", "stopped", "failed", "published", "finished", "unknown"]


class RunState(BaseModel):
    """What the driver of a run has written of its state.

    Attributes:
        format: Format of this document.
        state: `running`; `stopped` (it was asked to, and can go on); `failed`; `published`; or `finished`, as a sweep's
            trial that was not published.
        since: When the run came into this state, by the driver's clock.
        host: The driver's machine.
        process: The driver's process id.
        cause: Why the run failed, in one line.
        version: NAME@N, the version that it published.
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
    """Where a run stands.

    Attributes:
        state: That of `RunState`; `lost` if it says running and its driver was not heard of; `unknown` for a run that
            has left neither a state nor a record, as older versions of this package did not.
        since: When the run came into this state, UTC, ISO 8601; of a lost one, when its driver was last heard of.
        host: The driver's machine.
        process: The driver's process id.
        last_heard: When the state was last written, by the server's clock.
        cause: Why the run failed, in one line.
        version: NAME@N, the version that it published.
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
        """The state alone: `published as NAME@N`, or its word."""
        return f"published as {self.version}" if self.version else self.state

    @property
    def text(self) -> str:
        """The state with what is known of it, in one line."""
        if self.state in {"published", "finished", "unknown"}:
            return self.short
        heard = moment_text(self.last_heard) if self.last_heard else ""
        since = f" since {moment_text(datetime.fromisoformat(self.since))}" if self.since else ""
        driver = f" on {self.host} (process {self.process})" if self.host else ""
        if self.state == "running":
            return f"running{since}{driver}, last heard of {heard}"
        if self.state == "lost":
            return f"lost: not heard of since {heard}, when it ran{driver}"
        return f"failed{since}: {self.cause}" if self.state == "failed" else f"stopped{since}, can go on"


UNKNOWN = Status("unknown")


def status_of(state: RunState | None, heard: datetime | None, now: datetime) -> Status:
    """Where a run stands that has published nothing and left no record.

    Args:
        state: What its driver wrote last; None if it wrote nothing.
        heard: When the server stored that.
        now: What the server's clock says now: the driver's and the reader's may differ.
    """
    if state is None or heard is None:
        return UNKNOWN
    known = {**state.model_dump(exclude={"format", "state"}), "since": state.since.isoformat()}
    if state.state == "running" and now - heard > timedelta(seconds=LOST_SECONDS):
        return Status("lost", **{**known, "since": heard.isoformat()}, last_heard=heard)
    return Status(state.state, **known, last_heard=heard)


def server_time(bucket: Bucket) -> datetime:
    """What the bucket's server takes the time for, which it writes on objects; this machine's if it does not say."""
    return datetime.now(UTC) - timedelta(seconds=bucket.seconds_ahead(RUNS) or 0.0)


def read_state(folder: RunFolder) -> RunState:
    """The state that a run's driver wrote last.

    Raises:
        ObjectNotFoundError: It wrote none.
        JobError: The document is damaged or newer than this package.
    """
    data, where = folder.bucket.get(folder.key(STATE_FILE)), str(folder.uri(STATE_FILE))
    return read_document(RunState, data, what="a run's state", where=where, newest=STATE_FORMAT, error=JobError)


class StateWriter:
    """Writes the state of a run while the block goes on: running, and at the end what became of it.

    `RunStoppedError` and Ctrl-C leave the run stopped, any other exception failed. A block that ends well says before
    its end what the run came to: `published` or `finished`; else the run stays as it is.

    Args:
        folder: The run's.
        beat_seconds: How often the state is written again.
    """

    def __init__(self, folder: RunFolder, beat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self._files = folder.below()  # with a client of its own: this is used by a thread of its own
        self._beat_seconds = beat_seconds
        self._state = _here("running")
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._write_all, name="run-state", daemon=True)

    def published(self, version: str) -> None:
        """The run has published NAME@N."""
        self._set(_here("published", version=version))

    def finished(self) -> None:
        """The run is done and publishes nothing."""
        self._set(_here("finished"))

    def __enter__(self) -> "StateWriter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._state.state == "running":  # what has been published has not failed
            stopped = isinstance(error, RunStoppedError | KeyboardInterrupt)
            self._set(_here("stopped") if stopped else _here("failed", cause=_one_line(error)))
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join(_LAST_WRITE_SECONDS)  # a bucket that does not answer holds nothing up

    def _set(self, state: RunState) -> None:
        with self._changed:
            self._state = state
            self._changed.notify()

    def _write_all(self) -> None:
        written: RunState | None = None
        while True:
            with self._changed:
                if self._state is written and not self._over:
                    self._changed.wait(self._beat_seconds)
                state, over = self._state, self._over
            if state is not written or (state.state == "running" and not over):
                with suppress(Exception):  # a run is worth more than word of it
                    self._files.put(STATE_FILE, state.model_dump_json(indent=1).encode())
            written = state
            if over:
                return


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
