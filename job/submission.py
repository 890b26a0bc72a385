"""A training run as a job of Ray's job API: its code packed, its log followed to its end."""

import asyncio
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception, retry_if_exception_type, stop_after_delay, wait_fixed
from tenacity.retry import retry_base

from nucleus.errors import ClusterError, JobError

__all__ = ["Submission", "follow", "prepare"]

_LARGEST_BYTES = 100 << 20
"""Ray's limit for a working directory."""
_PACKAGES = ("nucleus", "job")
_PASSED_ON = (
    "NUCLEUS_BUCKET", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY",
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION",
)  # fmt: skip
"""Variables that the job needs and that are no secrets: Ray shows them to everybody who sees its dashboard."""
_RECIPE = "recipe.toml"
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 120.0
_AWAY = (RuntimeError, OSError)
"""What the client of Ray's job API raises when the cluster does not answer."""


@dataclass(frozen=True)
class Submission:
    """What is submitted.

    Attributes:
        job: Its id.
        entrypoint: Shell command of the driver.
        environment: Its variables; no secret is among them.
        code: Folder with what is uploaded.
    """

    job: str
    entrypoint: str
    environment: dict[str, str]
    code: Path

    def start(self, client: Any) -> None:
        """Upload the code and start the job; a cluster that has just begun is given time. Raises `ClusterError`."""
        runtime = {"working_dir": str(self.code), "env_vars": self.environment}
        start = partial(client.submit_job, entrypoint=self.entrypoint, runtime_env=runtime, submission_id=self.job)
        try:
            _asked(start, retry_if_exception(lambda error: "No available agent" in str(error)))
        except (RuntimeError, ConnectionError, ValueError) as error:
            raise ClusterError(f"Expected the cluster to take the job {self.job}; it did not: {error}") from error


def prepare(recipe: Path, job: str, arguments: Sequence[str], folder: Path, *, verbose: bool) -> Submission:
    """Put what `nucleus train RECIPE ARGUMENTS` needs elsewhere into an empty folder.

    Raises:
        JobError: It is more than Ray takes.
    """
    _copy_code(folder)
    shutil.copyfile(recipe, folder / _RECIPE)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > _LARGEST_BYTES:
        raise JobError(
            f"Expected at most {_LARGEST_BYTES >> 20} MiB of code, Ray's limit; found {size >> 20} MiB in "
            f"{' and '.join(_PACKAGES)}. Put what is no code into .gitignore."
        )
    command = ["python", "-m", "job.train", *(["--debug"] if verbose else []), _RECIPE, *arguments]
    environment = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)}
    return Submission(job, shlex.join(command), environment, folder)


def _copy_code(folder: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    for path in _code(root):
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _code(root: Path) -> list[Path]:
    """This project's files: of a clone those that git does not ignore, of an installation all."""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PACKAGES]
        listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)  # noqa: S603
        paths = [root / name for name in sorted(set(listed.stdout.split("\0")) - {""})]
    else:
        paths = sorted(path for package in _PACKAGES for path in (root / package).rglob("*"))
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


def follow(client: Any, job: str, write: Callable[[str], None]) -> Any:
    """Pass on a job's log until its terminal state; give its details.

    The stream of Ray's API may end while the job runs; then it is opened again, and what was passed on is left out.

    Raises:
        ClusterError: The cluster has not answered for two minutes.
    """
    seen = 0
    while True:
        seen = asyncio.run(_tail(client, job, seen, write))
        details = _told(partial(client.get_job_info, job), job)
        if details.status.is_terminal():
            write(_told(partial(client.get_job_logs, job), job)[seen:])
            return details
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


def _told(question: Callable[[], Any], job: str) -> Any:
    try:
        return _asked(question, retry_if_exception_type(_AWAY))
    except _AWAY as error:
        raise ClusterError(
            f"Expected the cluster to tell how {job} is; no answer for {_PATIENCE_SECONDS:.0f} s: {error} The job may "
            f"still run. Its log: ray job logs --follow {job}"
        ) from error


def _asked(question: Callable[[], Any], retry: retry_base) -> Any:
    """The cluster's answer, asked for until it comes or patience ends with the last error."""
    return Retrying(
        retry=retry, wait=wait_fixed(_POLL_SECONDS), stop=stop_after_delay(_PATIENCE_SECONDS), reraise=True
    )(question)
