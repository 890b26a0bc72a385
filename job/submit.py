"""Submission of a training run as a job: code, command, environment and dry run."""

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

from job.capacity import Capacity, resources_needed, shortage
from job.job_api import STOP_SECONDS, cluster_flags, find_job, with_retries
from job.ray_errors import failure_text
from nucleus.config.recipe import Recipe
from nucleus.data.dataset import locate_dataset, open_dataset
from nucleus.errors import ClusterError, JobError
from nucleus.storage.uri import bucket_from_environment
from nucleus.surroundings import COMMIT_VARIABLE, commit, installed_versions

__all__ = ["DryRun", "Submission", "dry_run", "prepare"]


_MAX_BYTES = 100 << 20
"""Ray's limit for a working directory."""
_PACKAGES = ("nucleus", "job")
_PASSED_ON = (
    "NUCLEUS_BUCKET", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL",
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION",
)  # fmt: skip
"""Environment variables that the job needs. None may be secret: Ray's dashboard shows them to everybody."""
_RECIPE = "recipe.toml"
_STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
"""By default Ray kills a job 3 s after the request to stop, too soon for a checkpoint."""
_TAKEN = "already exists"
"""Part of Ray's message about a name in use."""


@dataclass(frozen=True)
class Submission:
    """A job to submit.

    Attributes:
        job: Id of the job.
        entrypoint: Shell command of the driver.
        environment: Environment variables of the driver, without secrets.
        code: Folder to upload.
    """

    job: str
    entrypoint: str
    environment: dict[str, str]
    code: Path

    def start(self, client: Any) -> None:
        """Upload the code and start the job; if the cluster has just started, wait until it accepts jobs.

        Raises:
            ClusterError: The cluster has a job with this name, or refuses the job.
        """
        runtime = {"working_dir": str(self.code), "env_vars": self.environment}
        start = partial(client.submit_job, entrypoint=self.entrypoint, runtime_env=runtime, submission_id=self.job)
        try:
            with_retries(start, retry_if_exception(lambda error: "No available agent" in str(error)))
        except (RuntimeError, ConnectionError, ValueError) as error:
            if _TAKEN in str(error):
                raise ClusterError(_taken(client, self.job)) from error
            raise ClusterError(
                f"Expected the cluster to accept the job {self.job}; it did not: {failure_text(error)}"
            ) from error


def _taken(client: Any, job: str) -> str:
    """Return the message that a cluster has a job of this name; that job may have failed before it began its run."""
    return (
        f"Expected a new run; the cluster already has a job named {job} ({find_job(client, job).status}). Choose "
        f"another name with --run. If that job began its run (nucleus runs show {job}), continue it: nucleus submit "
        f"--resume {job} {cluster_flags(client)}"
    )


def prepare(recipe: Path | None, job: str, arguments: Sequence[str], folder: Path, *, verbose: bool) -> Submission:
    """Copy everything that `nucleus train [RECIPE] ARGUMENTS` needs on the cluster into an empty folder.

    Raises:
        JobError: The code is larger than Ray's limit.
    """
    _copy_code(folder)
    if recipe is not None:
        shutil.copyfile(recipe, folder / _RECIPE)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > _MAX_BYTES:
        raise JobError(
            f"Expected at most {_MAX_BYTES >> 20} MiB of code, Ray's limit; found {size >> 20} MiB in "
            f"{' and '.join(_PACKAGES)}. List files that are not code in .gitignore."
        )
    command = [
        "python",
        "-m",
        "nucleus",
        *(["--debug"] if verbose else []),
        "train",
        *([_RECIPE] if recipe else []),
        *arguments,
    ]
    environment = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)} | _STOP_WAIT
    revision = commit()
    if revision is not None:
        environment[COMMIT_VARIABLE] = revision
    return Submission(job, shlex.join(command), environment, folder)


def _copy_code(folder: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    for path in _code(root):
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _code(root: Path) -> list[Path]:
    """Return the files of this project: those that git does not ignore in a clone, else all."""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PACKAGES]
        listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)  # noqa: S603
        paths = [root / name for name in sorted(set(listed.stdout.split("\0")) - {""})]
    else:
        paths = sorted(path for package in _PACKAGES for path in (root / package).rglob("*"))
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


@dataclass(frozen=True)
class DryRun:
    """A job that would be submitted, and whether the cluster has enough CPUs and GPUs for it.

    Attributes:
        job: Id of the job.
        entrypoint: Command of the driver.
        environment: Environment variables of the driver.
        bucket: Bucket of the run.
        dataset: The dataset with its version.
        versions: Versions of Python and packages on this machine; the cluster runs the same version of Ray.
        workers: Number of workers in the recipe, as text.
        needed: CPUs and GPUs of the smallest number of workers.
        free: Free CPUs and GPUs of the cluster.
        total: CPUs and GPUs of the cluster.
        waits_for: CPUs and GPUs that the run would wait for; None if it can start at once.
        images: Number of images in the training split.
        epochs: Number of epochs, unless the run stops early.
        steps: Number of training steps in these epochs.
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


def dry_run(recipe: Recipe, dataset: str, submission: Submission, capacities: dict[str, Capacity]) -> DryRun:
    """Read the dataset's manifest and compare the run's needs with the cluster, without submitting anything.

    Args:
        recipe: Recipe of the run.
        dataset: Dataset of the recipe, or of the run to resume.
        submission: The job that would be submitted.
        capacities: CPUs and GPUs of the cluster, by Ray's names.

    Raises:
        NucleusError: The dataset cannot be read.
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
        needed=resources_needed(recipe),
        free={name: found.free for name, found in capacities.items()},
        total={name: found.total for name, found in capacities.items()},
        waits_for=shortage(resources_needed(recipe), capacities),
        images=images,
        epochs=recipe.optimizer.epochs,
        steps=recipe.steps_of_epoch(images) * recipe.optimizer.epochs,
    )
