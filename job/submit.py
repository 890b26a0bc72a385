"""A training run packed as a job for Ray's job API."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tenacity import retry_if_exception

from job.capacity import Room, missing, needed
from job.job_api import STOP_SECONDS, asked
from nucleus.config.recipe import Recipe
from nucleus.data.dataset import locate_dataset, open_dataset
from nucleus.errors import ClusterError, JobError
from nucleus.provenance import COMMIT_VARIABLE, commit, installed_versions
from nucleus.storage.uri import bucket_from_environment

__all__ = ["DryRun", "Submission", "dry_run", "prepare"]


_LARGEST_BYTES = 100 << 20
"""Ray's limit for a working directory."""
_PACKAGES = ("nucleus", "job")
_PASSED_ON = (
    "NUCLEUS_BUCKET", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY",
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION",
)  # fmt: skip
"""Variables that the job needs and that are no secrets: Ray shows them to everybody who sees its dashboard."""
_RECIPE = "recipe.toml"
_STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
"""Ray kills a job 3 s after it told it to stop, which is too soon for a checkpoint."""


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
            asked(start, retry_if_exception(lambda error: "No available agent" in str(error)))
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
    command = ["python", "-m", "nucleus", *(["--debug"] if verbose else []), "train", _RECIPE, *arguments]
    environment = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)} | _STOP_WAIT
    of_code = commit()
    if of_code is not None:
        environment[COMMIT_VARIABLE] = of_code
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


@dataclass(frozen=True)
class DryRun:
    """What would be submitted.

    Attributes:
        job: Its id.
        entrypoint: The driver's command.
        environment: Its variables.
        bucket: Where the run would write.
        dataset: The dataset with its version.
        versions: Of Python and of the packages here; Ray's is the cluster's too.
        workers: As the recipe has them.
        needed: CPUs and GPUs that the fewest workers take.
        free: CPUs and GPUs of the cluster that nobody holds.
        total: CPUs and GPUs of the cluster.
        waits_for: What the run would have to wait for; None if it can begin at once.
        images: In the training split.
        epochs: At most; it may stop earlier.
        steps: Of all these epochs.
    """

    job: str
    entrypoint: str
    environment: dict[str, str]
    bucket: str
    dataset: str
    versions: dict[str, str]
    workers: str
    needed: dict[str, int]
    free: dict[str, float]
    total: dict[str, float]
    waits_for: str | None
    images: int
    epochs: int
    steps: int


def dry_run(recipe: Recipe, dataset: str, submission: Submission, rooms: dict[str, Room]) -> DryRun:
    """Look at the dataset in the bucket and at the cluster's room.

    Args:
        recipe: The run's.
        dataset: Its dataset, as the recipe or the run to be resumed names it.
        submission: What would be submitted.
        rooms: The cluster's room by `CPU` and `GPU`.

    Raises:
        NucleusError: The dataset cannot be had.
    """
    data = open_dataset(locate_dataset(dataset, recipe.bucket))
    images = len(data.manifest.split_samples("train"))
    return DryRun(
        job=submission.job,
        entrypoint=submission.entrypoint,
        environment=submission.environment,
        bucket=str(bucket_from_environment(recipe.bucket)),
        dataset=str(data),
        versions=installed_versions(),
        workers=str(recipe.workers),
        needed=needed(recipe),
        free={name: room.free for name, room in rooms.items()},
        total={name: room.total for name, room in rooms.items()},
        waits_for=missing(needed(recipe), rooms),
        images=images,
        epochs=recipe.optimizer.epochs,
        steps=images // recipe.input.batch_size * recipe.optimizer.epochs,
    )
