"""Client of Ray's job API: a safe connection to a cluster's dashboard, and its jobs: list, log and stop."""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception, retry_if_result, stop_after_delay, wait_fixed
from tenacity.retry import retry_base

import job
from job.capacity import Capacity
from job.ray_errors import failure_text
from nucleus.errors import ClusterError, UsageError
from nucleus.lazy import TRAINING, need
from nucleus.surroundings import exempt_this_machine, proxy_advice

__all__ = [
    "DEFAULT_ADDRESS",
    "STOP_SECONDS",
    "Job",
    "all_jobs",
    "capacities_of",
    "check_address",
    "cluster_address",
    "cluster_flags",
    "find_job",
    "follow",
    "job_client",
    "job_log",
    "stop_job",
    "with_retries",
]


DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_SECONDS = 120
"""Seconds that a stopped job has to save a checkpoint before Ray kills it."""

_accepted: set[str] = set()
"""Addresses of clusters that this process uses although they are insecure, because the user said so."""
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_ANSWER_SECONDS = 30.0
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 120.0
"""Seconds for which a request is repeated while the cluster does not answer."""
_CHATTY_LOGGERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Loggers that report every request. The two modules set levels of their own, so the level of `ray` is not enough."""
_HTTP_OK, _REFUSED = 200, (401, 403)
_NO_ANSWER = (RuntimeError, OSError)
"""Errors of Ray's client if the cluster does not answer."""
_TERMINAL = {"STOPPED", "SUCCEEDED", "FAILED"}
_MISSING = "does not exist"
"""Part of Ray's message about an unknown job."""


def cluster_address(given: str | None) -> str:
    """Return the address `given`, else RAY_ADDRESS if it is an HTTP URL, else that of this machine's dashboard."""
    address = given or os.environ.get("RAY_ADDRESS") or ""
    if given is None and urlsplit(address).scheme not in {"http", "https"}:
        return DEFAULT_ADDRESS
    return address.rstrip("/")


def check_address(address: str, *, insecure: bool) -> None:
    """Check that an address does not send code and token in plain text over a network.

    Args:
        address: URL of a cluster's dashboard.
        insecure: Whether the user accepts plain HTTP to another machine.

    Raises:
        UsageError: The address is not an HTTP URL, or is plain HTTP to another machine.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:  # the port is not a number
        host = None
    if not host or parts.scheme not in {"http", "https"}:
        raise UsageError(
            f"Expected an address such as https://cluster.example or {DEFAULT_ADDRESS}; found {address!r}."
        )
    if parts.scheme == "http" and host not in _LOOPBACK and not insecure:
        raise UsageError(
            f"Expected HTTPS to another machine; found {address}, which sends code and token in plain text. Use "
            f"https://, or a tunnel: ssh -L 8265:localhost:{port or 80} {host} and --address {DEFAULT_ADDRESS}; or "
            "accept the risk with --insecure."
        )


def job_client(address: str, *, insecure: bool) -> Any:
    """Return a `JobSubmissionClient` for a cluster that requires a token and runs the same version of Ray.

    Args:
        address: An address that passes `check_address`.
        insecure: Whether the user accepts a cluster without a token.

    Raises:
        ClusterError: The cluster does not answer, requires no token, refuses the token or runs another version of Ray.
    """
    exempt_this_machine()
    if insecure:
        _accepted.add(address)
    need(*TRAINING)
    if _accepts_anybody(address) and not insecure:
        raise ClusterError(
            f"Expected a Ray cluster that requires a token at {address}; it runs code of anybody who can reach it. "
            "Start it with RAY_AUTH_MODE=token (ray get-auth-token --generate makes a token), or accept the risk with "
            "--insecure."
        )
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # otherwise Ray's client does not send the token
    os.environ.pop("RAY_ADDRESS", None)  # it would take precedence over the address
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ClusterError(
            f"Expected the token of the Ray cluster at {address}; it was refused, or there is none. Set "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or put it in ~/.ray/auth_token."
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(f"Expected the job API of a Ray cluster at {address}; {failure_text(error)}") from error
    found = job.server_ray_version(client)
    if found != ray.__version__:
        raise ClusterError(
            f"Expected Ray {ray.__version__} at {address}, as here; found {found}. Install the same version on both "
            f"sides: ray=={found} here, or ray=={ray.__version__} there."
        )
    return client


def cluster_flags(client: Any) -> str:
    """Return the options with which another command reaches the cluster of a client from `job_client`."""
    address = client.get_address()
    return f"--address {address}{' --insecure' if address in _accepted else ''}"


def capacities_of(client: Any) -> dict[str, Capacity]:
    """Return the CPUs and GPUs of a cluster, by Ray's names, as they were a few seconds ago.

    Args:
        client: A client from `job_client`.

    Raises:
        ClusterError: The cluster does not report them.
    """
    ask = Retrying(
        retry=retry_if_result(lambda usage: "CPU" not in usage),  # a cluster that has just started
        wait=wait_fixed(1.0),
        stop=stop_after_delay(_ANSWER_SECONDS),
        retry_error_callback=lambda _: {},
    )
    usage = ask(_usage, client)
    if not usage:
        raise ClusterError(
            f"Expected the cluster at {client.get_address()} to report its CPUs and GPUs; it reported none for "
            f"{_ANSWER_SECONDS:.0f} s. Look at its dashboard, and try again when its nodes have joined."
        )
    pairs = {name: usage.get(name, (0.0, 0.0)) for name in ("CPU", "GPU")}
    return {name: Capacity(total=total, free=total - used, most=total) for name, (used, total) in pairs.items()}


def _usage(client: Any) -> dict[str, tuple[float, float]]:
    """Return the used and the total amount of each resource; empty if the cluster does not report them."""
    answer = job.job_api_answer(client, "/api/cluster_status")
    status = answer.json().get("data", {}).get("clusterStatus") if answer.status_code == _HTTP_OK else None
    return dict(status["loadMetricsReport"]["usage"]) if status else {}


def _accepts_anybody(address: str) -> bool:
    """Return whether the cluster lists its jobs without a token."""
    import requests

    try:
        answer = requests.get(f"{address}/api/jobs/", timeout=_ANSWER_SECONDS, allow_redirects=False)
    except requests.RequestException as error:
        raise ClusterError(
            f"Expected a Ray cluster at {address}; it does not answer ({type(error).__name__}).{proxy_advice(address)} "
            "Start one (ray start --head), correct --address, or open the tunnel to it."
        ) from error
    if answer.status_code not in {_HTTP_OK, *_REFUSED}:
        raise ClusterError(
            f"Expected the dashboard of a Ray cluster at {address}; it answered {answer.status_code} to /api/jobs/. "
            "Correct --address; the port is 8265 by default."
        )
    return bool(answer.status_code == _HTTP_OK)


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    return os.path.isfile(os.path.expanduser(token))  # noqa: PTH111, PTH113  `Path` raises if there is no home folder


@dataclass(frozen=True)
class Job:
    """A job of a Ray cluster.

    Attributes:
        job: Id of the job; for a new run, the name of the run.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        started: Start time in ISO 8601; None if the job has not started.
        seconds: Duration, so far if it runs; None if it has not started.
        exit_code: Exit status of the driver; None while the driver runs, or if it never started.
        entrypoint: Command of the driver.
        message: Ray's explanation of the status.
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
    """Return all submitted jobs that the cluster still knows, newest first."""
    jobs = [_job(details) for details in _ask(client, client.list_jobs) if details.submission_id]
    return sorted(jobs, key=lambda job: job.started or "9999", reverse=True)


def find_job(client: Any, job: str) -> Job:
    """Return a job. Raises `ClusterError` if the cluster does not know it."""
    return _job(_ask_about(client, job, lambda: client.get_job_info(job)))


def job_log(client: Any, job: str) -> str:
    """Return the log of a job so far. Raises `ClusterError` if the cluster does not know the job."""
    return str(_ask_about(client, job, lambda: client.get_job_logs(job)))


def stop_job(client: Any, job: str) -> Job:
    """Stop a job, wait for its end and return it. A job that has already ended is returned unchanged.

    Raises:
        ClusterError: The cluster does not know the job, or the job does not stop.
    """
    found = find_job(client, job)
    if found.over:
        return found
    _ask(client, lambda: client.stop_job(job))
    deadline = time.monotonic() + STOP_SECONDS + _PATIENCE_SECONDS
    while not (found := find_job(client, job)).over:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"Expected the job {job} to stop; it is still {found.status}. Run: nucleus jobs status {job} "
                f"{cluster_flags(client)}"
            )
        time.sleep(_POLL_SECONDS)
    return found


def follow(client: Any, job: str, write: Callable[[str], None]) -> Job:
    """Write a job's log as it grows, until the job ends; return the job.

    If Ray's log stream breaks off while the job runs, it is opened again, without repeating any text.

    Raises:
        ClusterError: The cluster does not know the job, or has not answered for two minutes.
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
    """Write the log after its first `seen` characters; return the number of characters seen now."""
    import aiohttp

    position = 0
    try:
        async for chunk in client.tail_job_logs(job):
            write(chunk[max(0, seen - position) :])
            position += len(chunk)
            seen = max(seen, position)
    except (*_NO_ANSWER, aiohttp.ClientError):
        pass  # `follow` tries again
    return seen


def _ask(client: Any, request: Callable[[], Any]) -> Any:
    """Return the cluster's answer to a request; repeat the request while the cluster does not answer.

    Raises:
        ClusterError: The cluster has not answered for two minutes.
    """
    try:
        return with_retries(
            request, retry_if_exception(lambda error: isinstance(error, _NO_ANSWER) and _MISSING not in str(error))
        )
    except _NO_ANSWER as error:
        if _MISSING in str(error):
            raise
        raise ClusterError(
            f"Expected the cluster to answer; it has not for {_PATIENCE_SECONDS:.0f} s: {failure_text(error)} Its "
            f"jobs continue without this command. Run: nucleus jobs list {cluster_flags(client)}"
        ) from error


def with_retries(request: Callable[[], Any], retry: retry_base) -> Any:
    """Return the answer to a request; repeat it for up to two minutes, then raise the last error."""
    return Retrying(
        retry=retry, wait=wait_fixed(_POLL_SECONDS), stop=stop_after_delay(_PATIENCE_SECONDS), reraise=True
    )(request)


def _ask_about(client: Any, job: str, request: Callable[[], Any]) -> Any:
    try:
        return _ask(client, request)
    except _NO_ANSWER as error:
        raise ClusterError(
            f"Expected a job of the cluster; found none named {job!r}. Run: nucleus jobs list {cluster_flags(client)}"
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
