"""A Ray cluster by the address of its dashboard, where its job API is: reached only in ways that let nobody else in."""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception, retry_if_result, stop_after_delay, wait_fixed
from tenacity.retry import retry_base

import job
from job.capacity import Room
from nucleus.errors import ClusterError, UsageError

__all__ = [
    "DEFAULT_ADDRESS",
    "STOP_SECONDS",
    "Job",
    "all_jobs",
    "asked",
    "check_address",
    "cluster_address",
    "find_job",
    "follow",
    "job_client",
    "job_log",
    "rooms_of",
    "stop_job",
]


DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_ANSWER_SECONDS = 10.0
_TALKATIVE = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Loggers that tell of every request; the two modules set their own level."""
_HTTP_OK, _REFUSED = 200, (401, 403)


def cluster_address(given: str | None) -> str:
    """The address that the user means: given, or RAY_ADDRESS if it is an HTTP one, or this machine's dashboard."""
    address = given or os.environ.get("RAY_ADDRESS") or ""
    if given is None and urlsplit(address).scheme not in {"http", "https"}:
        return DEFAULT_ADDRESS
    return address.rstrip("/")


def check_address(address: str, *, insecure: bool) -> None:
    """Refuse what would send code and token in plain text over a network.

    Args:
        address: URL of a cluster's dashboard.
        insecure: Whether the user takes the risk.

    Raises:
        UsageError: No HTTP URL, or plain HTTP to another machine.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:  # what urllib says of a port that is no number
        host = None
    if not host or parts.scheme not in {"http", "https"}:
        raise UsageError(
            f"Expected an address such as https://cluster.example or {DEFAULT_ADDRESS}; found {address!r}."
        )
    if parts.scheme == "http" and host not in _LOOPBACK and not insecure:
        raise UsageError(
            f"Expected HTTPS to another machine; found {address}, where anybody on the way reads code and token. Use "
            f"https://, or a tunnel: ssh -L 8265:localhost:{port or 80} {host} and --address {DEFAULT_ADDRESS}; or "
            "say --insecure."
        )


def job_client(address: str, *, insecure: bool) -> Any:
    """A `JobSubmissionClient` for a cluster that asks for a token and runs this Ray.

    Args:
        address: One that `check_address` lets pass.
        insecure: Whether the user takes the risk of a cluster without a token.

    Raises:
        ClusterError: Nobody answers; or the cluster takes jobs from anybody, refuses the token or runs another Ray.
    """
    if _takes_jobs_from_anybody(address) and not insecure:
        raise ClusterError(
            f"Expected a Ray cluster that asks for a token at {address}; it runs the code of anybody who reaches it. "
            "Start it with RAY_AUTH_MODE=token (ray get-auth-token --generate makes a token), or say --insecure."
        )
    if _token_at_hand():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # or Ray's client would not send it
    os.environ.pop("RAY_ADDRESS", None)  # or it would go before the address given
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ClusterError(
            f"Expected the token of the Ray cluster at {address}; it refused this one, or there is none. Set "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or put it in ~/.ray/auth_token."
        ) from error
    except (ConnectionError, RuntimeError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(f"Expected the job API of a Ray cluster at {address}; {text}") from error
    found = job.server_ray_version(client)
    if found != ray.__version__:
        raise ClusterError(
            f"Expected Ray {ray.__version__} at {address}, as here; found {found}. Install the same on both sides: "
            f"ray=={found} here, or ray=={ray.__version__} there."
        )
    return client


def rooms_of(client: Any) -> dict[str, Room]:
    """The room of a cluster, by `CPU` and `GPU`, as it was seconds ago.

    Args:
        client: One of `job_client`.

    Raises:
        ClusterError: The cluster does not say.
    """
    ask = Retrying(
        retry=retry_if_result(lambda usage: "CPU" not in usage),  # it has just begun and does not know itself yet
        wait=wait_fixed(1.0),
        stop=stop_after_delay(_ANSWER_SECONDS),
        retry_error_callback=lambda _: {},
    )
    usage = ask(_usage, client)
    if not usage:
        raise ClusterError(
            f"Expected the cluster at {client.get_address()} to tell its CPUs and GPUs; it has told none for "
            f"{_ANSWER_SECONDS:.0f} s. Look at its dashboard, and try again when its nodes are there."
        )
    pairs = {name: usage.get(name, (0.0, 0.0)) for name in ("CPU", "GPU")}
    return {name: Room(total=total, free=total - used, most=total) for name, (used, total) in pairs.items()}


def _usage(client: Any) -> dict[str, tuple[float, float]]:
    """How much of each resource is used, and how much there is."""
    answer = job.job_api_answer(client, "/api/cluster_status")
    status = answer.json().get("data", {}).get("clusterStatus") if answer.status_code == _HTTP_OK else None
    return dict(status["loadMetricsReport"]["usage"]) if status else {}


def _takes_jobs_from_anybody(address: str) -> bool:
    """Whether the list of jobs is given without a token."""
    import requests

    try:
        answer = requests.get(f"{address}/api/jobs/", timeout=_ANSWER_SECONDS, allow_redirects=False)
    except requests.RequestException as error:
        raise ClusterError(
            f"Expected a Ray cluster at {address}; it does not answer ({type(error).__name__}). Start one (ray start "
            "--head), correct --address, or open the tunnel to it."
        ) from error
    if answer.status_code not in {_HTTP_OK, *_REFUSED}:
        raise ClusterError(
            f"Expected the dashboard of a Ray cluster at {address}; it answered {answer.status_code} to /api/jobs/. "
            "Correct --address; its port is 8265 unless the cluster says otherwise."
        )
    return bool(answer.status_code == _HTTP_OK)


def _token_at_hand() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser().is_file()


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
