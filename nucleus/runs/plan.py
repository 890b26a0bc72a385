"""The folder of a run in the bucket, and its plan, `runs/<run>/run.json`, which every worker receives."""

import json
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nucleus.config.names import check_name
from nucleus.config.recipe import Recipe
from nucleus.data.dataset import locate_dataset
from nucleus.errors import JobError, ObjectExistsError, ObjectNotFoundError, RecipeError, UriError
from nucleus.model.architecture import recipe_as_started
from nucleus.registry.encoder_weights import EncoderWeights
from nucleus.registry.manifest import EncoderWeightsOrigin, StartOrigin
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import read_document
from nucleus.storage.uri import BUCKET_VARIABLE, S3Uri, parse_uri
from nucleus.surroundings import cache_folder

__all__ = [
    "CHECKPOINT_PREFIX",
    "PLAN_FILE",
    "RUNS",
    "STATES",
    "WANDB_FOLDER",
    "RunFolder",
    "RunPlan",
    "check_new_run",
    "check_same_recipe",
    "load_plan",
    "new_run_name",
    "read_plan",
    "save_plan",
]


RUNS = "runs/"
"""Prefix of all runs in the project's bucket, and name of the local folder for their reports."""
STATES = f"{RUNS}.states/"
"""Prefix of the states of all runs; no run has a name that begins with a dot."""
PLAN_FILE = "run.json"
WANDB_FOLDER = "wandb"
"""Folder of a run with W&B's files that were kept offline, in the bucket and on disk."""
CHECKPOINT_PREFIX = "checkpoint_"
"""Prefix of the names of a run's checkpoint folders, which Ray Train chooses."""
PLAN_FORMAT = 2
"""Plans of format 1 were written before 0.3.0."""

_ELSEWHERE = ("bucket", "dataset")
"""Keys of a recipe that are not compared as text: the run was found in its bucket, and a dataset has two spellings."""
_HARMLESS = ("cache_dir", "cache_limit_gib")
"""Keys without any effect on a run's result."""


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
        """Return the key of a file or folder of the run, below the bucket's prefix; without names, of the folder."""
        return RUNS + "/".join((self.run, *names))

    def uri(self, *names: str) -> S3Uri:
        """Return the address of a file or folder of the run."""
        return self.bucket.uri / self.key(*names)

    @property
    def state_key(self) -> str:
        """Key of the run's state, which lies beside those of all runs, so that one listing tells which ones changed."""
        return f"{STATES}{self.run}.json"

    def apart(self) -> Bucket:
        """Return the project's bucket with a client of its own, for another thread."""
        return Bucket(self.bucket.uri)

    def below(self, *names: str) -> Bucket:
        """Return a folder of the run as a bucket whose keys are relative to it."""
        return Bucket(self.uri(*names))


class RunPlan(BaseModel):
    """Everything that was decided before a run started, so that resuming it continues the same run.

    Attributes:
        format: Format of this document.
        run: Name of the run.
        bucket: `s3://bucket[/prefix]`.
        settings: The recipe as stored under the key `recipe`; one of another version of this package may have other
            keys.
        dataset: `s3://.../NAME@VERSION`, always with the version.
        mix: Share of the training crops by dataset, `s3://.../NAME@VERSION`, of the datasets besides `dataset`.
        weights_uri: Address of the encoder's weights; None for random weights.
        weights: Origin of the encoder's weights; with `start`, of those that the training of that version started with.
        start_uri: Folder in a bucket with the version that training starts with; None without one.
        start: That version.
        wandb_mode: `online`, `offline` or `disabled`.
        group: Group of the run in W&B, such as a sweep.
        wandb_dir: Folder for W&B's files on the first worker's machine.
        folder: Folder on the driver's and the first worker's machine; report and TensorBoard events go to `<run>/`.
        commit: Commit of the code; None if it did not come from a clone.
        begun: Start of the run, UTC, ISO 8601.
        token: Random text that distinguishes this plan from another one with the same name and content.
        submitted: Whether the run was started as a job of a cluster.
        encoder_replaced: Whether the encoder has random weights because pretrained ones were not available; None in a
            plan of an older version of this package, which did not record it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", serialize_by_alias=True)

    format: int = PLAN_FORMAT
    run: str
    bucket: str
    settings: dict[str, Any] = Field(alias="recipe")
    dataset: str
    mix: dict[str, float] = {}
    weights_uri: str | None
    weights: EncoderWeightsOrigin
    start_uri: str | None = None
    start: StartOrigin | None = None
    wandb_mode: str
    group: str | None = None
    wandb_dir: str
    folder: str = "runs"
    commit: str | None = None
    begun: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    token: str = Field(default_factory=lambda: secrets.token_hex(8))
    submitted: bool = False
    encoder_replaced: bool | None = None

    @field_validator("settings")
    @classmethod
    def _names_a_model(cls, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            check_name(str(settings.get("model")), "model")
        except UriError as error:
            raise ValueError(str(error)) from error
        return settings

    @property
    def cache_dir(self) -> Path:
        """The folder for caches on this machine: that of the recipe, or the user's (`cache_folder`)."""
        return Path(self.recipe.cache_dir) if self.recipe.cache_dir else cache_folder()

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, validated. Raises pydantic's `ValidationError` if this version of the package rejects it."""
        return Recipe.model_validate_json(json.dumps(self.settings))

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.settings["model"])

    @property
    def first_epoch(self) -> int:
        """Number of the run's first epoch in W&B, in which rows stay as they are: 0 for one that began before 0.3.0."""
        return 0 if self.format == 1 else 1

    @property
    def resume_command(self) -> str:
        """Command that resumes the run."""
        command = f"nucleus {'submit' if self.submitted else 'train'} --resume {self.run}"
        if self.settings.get("bucket"):  # it is not that of the environment
            return f"{BUCKET_VARIABLE}={shlex.quote(self.bucket)} {command}"
        return command

    @property
    def how_to_go_on(self) -> str:
        """Sentence for an error message: how to resume a run that did not finish."""
        return f"To resume from its last checkpoint, run: {self.resume_command}"

    @property
    def encoder_weights(self) -> EncoderWeights | None:
        """Address and origin of the encoder's weights; None for random weights."""
        return EncoderWeights(parse_uri(self.weights_uri), self.weights) if self.weights_uri else None


def new_run_name(model: str) -> str:
    """Return a name for a new run: model, date and time (UTC) and four random hexadecimal digits."""
    moment = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return f"{model[:40]}-{moment}-{secrets.token_hex(2)}"


def check_new_run(bucket: Bucket, run: str, resume_command: str) -> None:
    """Check before the start of a run that its name is free; `save_plan` decides between runs that start at once.

    Args:
        bucket: The project's bucket.
        run: Name of the new run.
        resume_command: Command that resumes the run that has this name.

    Raises:
        JobError: A run of this name exists.
    """
    if bucket.find(RunFolder(bucket, check_name(run, "run")).key(PLAN_FILE)) is not None:
        raise _taken(run, resume_command)


def _taken(run: str, resume_command: str) -> JobError:
    return JobError(
        f"Expected a run name that is not in use; {run!r} is. Choose another with --run (for a sweep, --name), or "
        f"resume that run: {resume_command}"
    )


def save_plan(bucket: Bucket, plan: RunPlan) -> None:
    """Write a new run's plan. Raises `JobError` if a run of this name exists."""
    key = RunFolder(bucket, check_name(plan.run, "run")).key(PLAN_FILE)
    try:
        bucket.put(key, plan.model_dump_json(indent=1).encode(), if_absent=True)
    except ObjectExistsError as error:
        raise _taken(plan.run, plan.resume_command) from error


def read_plan(bucket: Bucket, run: str) -> RunPlan:
    """Return the plan of a run, without validating its recipe.

    Raises:
        ObjectNotFoundError: The run has no plan.
        JobError: The plan is damaged, that of another run, or newer than this package.
    """
    folder = RunFolder(bucket, check_name(run, "run"))
    where = str(folder.uri(PLAN_FILE))
    data = bucket.get(folder.key(PLAN_FILE))
    plan = read_document(RunPlan, data, what="a run's plan", where=where, newest=PLAN_FORMAT, error=JobError)
    if plan.run != run:
        raise JobError(f"Expected the plan of the run {run!r} at {where}; found that of {plan.run!r}.")
    return plan


def load_plan(bucket: Bucket, run: str) -> RunPlan:
    """Return the plan of a run to resume, with a valid recipe.

    Raises:
        JobError: There is no such run, its plan is damaged or newer than this package, or its recipe is not valid.
    """
    folder = RunFolder(bucket, run)
    try:
        plan = read_plan(bucket, run)
        _ = plan.recipe
    except ObjectNotFoundError as error:
        raise JobError(f"Expected a run {run!r} in {bucket.uri / RUNS}; found none. Run: nucleus runs list") from error
    except ValidationError as error:
        raise JobError(
            f"Expected a recipe of this version of the package in {folder.uri(PLAN_FILE)}; it is damaged, or another "
            f"version wrote it: {error}"
        ) from error
    return plan


def check_same_recipe(plan: RunPlan, recipe: Recipe) -> list[str]:
    """Check that a recipe is that of a run, which is resumed with the recipe that it started with.

    The bucket may be written in another way, because the run was found in it. A dataset without a version is the one
    of the run; so is what `network.start` leaves open. The recipe of a run that found no pretrained weights (`nucleus
    demo`) is the one before that.

    Returns:
        The differences that cannot change the result, in words: other places for the cache, which the run ignores.

    Raises:
        RecipeError: Other keys differ; the message lists all of them, with both values.
    """
    if plan.encoder_replaced is not False and plan.recipe == plan.recipe.with_random_encoder():
        recipe = recipe.with_random_encoder() if recipe.network.weights == "imagenet" else recipe
    if plan.start is not None and recipe.network.start is not None:
        recipe = recipe_as_started(recipe, plan.recipe)
    theirs, ours = _flat(plan.recipe.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    keys = [key for key in sorted({*theirs, *ours} - {*_ELSEWHERE}) if theirs.get(key) != ours.get(key)]
    words = {key: f"{key}: {_value(theirs.get(key))} in the run, {_value(ours.get(key))} here" for key in keys}
    if not _same_dataset(plan, recipe):
        words["dataset"] = f"dataset: {_value(plan.dataset)} in the run, {_value(recipe.dataset)} here"
    refused = [text for key, text in words.items() if key not in _HARMLESS]
    if refused:
        raise RecipeError(
            f"Expected the recipe that the run {plan.run} started with; these keys differ: {'; '.join(refused)}. To "
            f"continue the run as it began, leave the recipe out: {plan.resume_command}. To train with this recipe, "
            "start a new run, without --resume."
        )
    return list(words.values())


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the keys of nested tables as `table.key`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return flat


def _same_dataset(plan: RunPlan, recipe: Recipe) -> bool:
    ours, theirs = locate_dataset(recipe.dataset, plan.bucket), locate_dataset(plan.dataset)
    return ours.uri == theirs.uri and ours.ref in {"latest", theirs.ref}


def _value(value: object) -> str:
    return "not set" if value is None else json.dumps(value)
