"""The plan of a run, `runs/<run>/run.json`, which every worker gets, and the folder of a run in the bucket."""

import json
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nucleus.config.names import check_name
from nucleus.config.recipe import Recipe
from nucleus.errors import JobError, ObjectExistsError, ObjectNotFoundError, UriError
from nucleus.registry.encoder_weights import EncoderWeights
from nucleus.registry.manifest import EncoderWeightsOrigin
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import read_document
from nucleus.storage.uri import S3Uri, parse_uri

__all__ = [
    "CHECKPOINT_PREFIX",
    "PLAN_FILE",
    "RUNS",
    "WANDB_FOLDER",
    "RunFolder",
    "RunPlan",
    "load_plan",
    "new_run_name",
    "read_plan",
    "save_plan",
]


RUNS = "runs/"
"""Prefix of all runs in the project's bucket; the folder of the same name on a machine has their reports."""
PLAN_FILE = "run.json"
WANDB_FOLDER = "wandb"
"""Folder of a run with the files that W&B has not been sent, in the bucket as on disk."""
CHECKPOINT_PREFIX = "checkpoint_"
"""What the names of a run's checkpoint folders begin with; Ray Train chooses them."""

PLAN_FORMAT = 1


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run in the project's bucket, `runs/<run>/`.

    >>> from nucleus.storage.uri import S3Uri
    >>> str(RunFolder(Bucket(S3Uri("cells")), "trial").uri("report", "report.html"))
    's3://cells/runs/trial/report/report.html'
    """

    bucket: Bucket
    run: str

    def key(self, *names: str) -> str:
        """Key, below the bucket's prefix, of a file or folder of the run; without names, of the folder itself."""
        return RUNS + "/".join((self.run, *names))

    def uri(self, *names: str) -> S3Uri:
        """Address of a file or folder of the run."""
        return self.bucket.uri / self.key(*names)

    def below(self, *names: str) -> Bucket:
        """A folder of the run as a bucket whose keys begin there."""
        return Bucket(self.uri(*names))


class RunPlan(BaseModel):
    """A run with all that was found out before it began, so that resuming it means the same run.

    Attributes:
        format: Format of this document.
        run: Name of the run.
        bucket: `s3://bucket[/prefix]`.
        settings: The recipe as it is stored, under the key `recipe`; one of an older version may have other keys.
        dataset: `s3://.../NAME@VERSION`, always with the version.
        weights_uri: Address of the encoder's weights; None without.
        weights: Origin of these weights.
        wandb_mode: `online`, `offline` or `disabled`.
        group: What the run belongs to, such as a sweep; its group in W&B.
        wandb_dir: Folder for W&B's files on the first worker's machine.
        folder: Folder on the driver's and the first worker's machine, in whose `<run>/` people find report and events.
        commit: Commit of the code; None if it did not come from a clone.
        begun: When, UTC, ISO 8601.
        token: Distinguishes this plan from another of the same name and content.
        submitted: Whether the run was begun as a job of a cluster.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", serialize_by_alias=True)

    format: int = PLAN_FORMAT
    run: str
    bucket: str
    settings: dict[str, Any] = Field(alias="recipe")
    dataset: str
    weights_uri: str | None
    weights: EncoderWeightsOrigin
    wandb_mode: str
    group: str | None = None
    wandb_dir: str
    folder: str = "runs"
    commit: str | None = None
    begun: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    token: str = Field(default_factory=lambda: secrets.token_hex(8))
    submitted: bool = False

    @field_validator("settings")
    @classmethod
    def _names_a_model(cls, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            check_name(str(settings.get("model")), "model")
        except UriError as error:
            raise ValueError(str(error)) from error
        return settings

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, checked: pydantic's `ValidationError` if this version of the package does not know its keys."""
        return Recipe.model_validate_json(json.dumps(self.settings))

    @property
    def model(self) -> str:
        """Name under which the run publishes."""
        return str(self.settings["model"])

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run."""
        command = "submit" if self.submitted else "train"
        recipe = "RECIPE " if self.settings.get("bucket") else ""  # which names the bucket
        return f"nucleus {command} {recipe}--resume {self.run}"

    @property
    def how_to_go_on(self) -> str:
        """What to do when the run did not finish, in words."""
        return f"Go on from its last checkpoint with: {self.resume_command}"

    @property
    def encoder_weights(self) -> EncoderWeights | None:
        """The encoder's weights in their bucket."""
        return EncoderWeights(parse_uri(self.weights_uri), self.weights) if self.weights_uri else None


def new_run_name(model: str) -> str:
    """A name that no other run has: model, moment (UTC) and four random digits."""
    moment = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return f"{model[:40]}-{moment}-{secrets.token_hex(2)}"


def save_plan(bucket: Bucket, plan: RunPlan) -> None:
    """Write a new run's plan. Raises `JobError` if a run of this name exists."""
    key = RunFolder(bucket, check_name(plan.run, "run")).key(PLAN_FILE)
    try:
        bucket.put(key, plan.model_dump_json(indent=1).encode(), if_absent=True)
    except ObjectExistsError as error:
        raise JobError(
            f"Expected a run name that is not in use; {plan.run!r} is. Choose another with --run, or go on with that "
            f"run: {plan.resume_command}"
        ) from error


def read_plan(bucket: Bucket, run: str) -> RunPlan:
    """The plan of a run, whose recipe is not checked.

    Raises:
        ObjectNotFoundError: There is none.
        JobError: It is damaged, another run's, or newer than this package.
    """
    folder = RunFolder(bucket, check_name(run, "run"))
    where = str(folder.uri(PLAN_FILE))
    data = bucket.get(folder.key(PLAN_FILE))
    plan = read_document(RunPlan, data, what="a run's plan", where=where, newest=PLAN_FORMAT, error=JobError)
    if plan.run != run:
        raise JobError(f"Expected the plan of the run {run!r} at {where}; found that of {plan.run!r}.")
    return plan


def load_plan(bucket: Bucket, run: str) -> RunPlan:
    """The plan of a run that is to go on, whose recipe this version of the package knows.

    Raises:
        JobError: There is no such run, or what `read_plan` raises.
    """
    folder = RunFolder(bucket, run)
    try:
        plan = read_plan(bucket, run)
        _ = plan.recipe
    except ObjectNotFoundError as error:
        raise JobError(
            f"Expected a run {run!r} in {bucket.uri / RUNS}; there is none to resume. Run: nucleus runs list"
        ) from error
    except ValidationError as error:
        raise JobError(
            f"Expected a recipe of this version of the package in {folder.uri(PLAN_FILE)}; it is damaged, or another "
            f"version wrote it: {error}"
        ) from error
    return plan
