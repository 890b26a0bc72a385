"""The jobs of a Ray cluster as its job API tells of them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed
from tenacity.retry import retry_base

from nucleus.errors import ClusterError

__all__ = ["STOP_SECONDS", "Job", "all_jobs", "asked", "find_job", "follow", "job_log", "stop_job"]

_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 120.0
STOP_SECONDS = 120
"""How long a job that is told to stop may take to save a checkpoint, until Ray kills it."""
_AWAY = (RuntimeError, OSError)
"""What the client of Ray's job API raises when the cluster does not answer."""
_TERMINAL = {"STOPPED", "SUCCEEDED", "FAILED"}
_MISSING = "does not exist"


@dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
        job: Its id; that of a new run is the run's name.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        started: When, in ISO 8601; None if it has not.
        seconds: How long it took, or has taken until now.
        exit_code: The driver's; None while it runs, or if it was never started.
        entrypoint: Its command.
        message: What Ray says of the status.
    """

    job: str
    status: str
    started: str | None
    seconds: float | None
    exit_code: int | None
    entrypoint: str
    message: str

    @property
    def over(self) -> bool:
        """Whether the status is terminal."""
        return self.status in _TERMINAL


def all_jobs(client: Any) -> list[Job]:
    """Every submitted job that the cluster remembers, the newest first."""
    jobs = [_job(details) for details in _told(client.list_jobs) if details.submission_id]
    return sorted(jobs, key=lambda job: job.started or "9999", reverse=True)


def find_job(client: Any, job: str) -> Job:
    """One job. Raises `ClusterError` if the cluster does not know it."""
    return _job(_of(job, lambda: client.get_job_info(job)))


def job_log(client: Any, job: str) -> str:
    """What a job has written so far. Raises `ClusterError` if the cluster does not know it."""
    return str(_of(job, lambda: client.get_job_logs(job)))


def stop_job(client: Any, job: str) -> Job:
    """Ask a job to stop, wait until it has, and give it as it is then; one that is over is left alone.

    Raises:
        ClusterError: The cluster does not know it, or it goes on in spite of all.
    """
    found = find_job(client, job)
    if found.over:
        return found
    _told(lambda: client.stop_job(job))
    deadline = time.monotonic() + STOP_SECONDS + _PATIENCE_SECONDS
    while not (found := find_job(client, job)).over:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"Expected the job {job} to stop; it is still {found.status}. Run: nucleus jobs status {job}"
            )
        time.sleep(_POLL_SECONDS)
    return found


def follow(client: Any, job: str, write: Callable[[str], None]) -> Job:
    """Pass on a job's log until its end; give the job as it is then.

    The stream of Ray's API may end while the job runs; then it is opened again, and what was passed on is left out.

    Raises:
        ClusterError: The cluster does not know it, or has not answered for two minutes.
    """
    seen = 0
    while True:
        found = find_job(client, job)
        if found.over:
            write(job_log(client, job)[seen:])
            return found
        seen = asyncio.run(_tail(client, job, seen, write))
        time.sleep(_POLL_SECONDS)


async def _tail(client: Any, job: str, seen: int, write: Callable[[str], None]) -> int:
    """Pass on what comes after the first `seen` characters of a log; give how many there are now."""
    import aiohttp

    position = 0
    try:
        async for chunk in client.tail_job_logs(job):
            write(chunk[max(0, seen - position) :])
            position += len(chunk)
            seen = max(seen, position)
    except (*_AWAY, aiohttp.ClientError):
        pass  # `follow` asks again
    return seen


def _told(question: Callable[[], Any]) -> Any:
    """What the cluster answers, asked for again while it does not.

    Raises:
        ClusterError: It has not answered for two minutes.
    """
    try:
        return asked(
            question, retry_if_exception(lambda error: isinstance(error, _AWAY) and _MISSING not in str(error))
        )
    except _AWAY as error:
        if _MISSING in str(error):
            raise
        raise ClusterError(
            f"Expected the cluster to answer; it has not for {_PATIENCE_SECONDS:.0f} s: {error} Jobs go on without "
            "this command. Run: nucleus jobs list"
        ) from error


def asked(question: Callable[[], Any], retry: retry_base) -> Any:
    """The cluster's answer, asked for until it comes or patience ends with the last error."""
    return Retrying(
        retry=retry, wait=wait_fixed(_POLL_SECONDS), stop=stop_after_delay(_PATIENCE_SECONDS), reraise=True
    )(question)


def _of(job: str, question: Callable[[], Any]) -> Any:
    try:
        return _told(question)
    except _AWAY as error:
        raise ClusterError(
            f"Expected a job of the cluster; it knows none that is called {job!r}. Run: nucleus jobs list"
        ) from error


def _job(details: Any) -> Job:
    end = details.end_time or int(1000 * time.time())
    started = details.start_time or None
    return Job(
        job=details.submission_id,
        status=str(details.status),
        started=datetime.fromtimestamp(started / 1000, UTC).isoformat(timespec="seconds") if started else None,
        seconds=round((end - started) / 1000, 1) if started else None,
        exit_code=details.driver_exit_code,
        entrypoint=details.entrypoint,
        message=details.message or "",
    )
