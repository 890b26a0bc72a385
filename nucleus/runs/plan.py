"""What a run is, as one document: kept as `runs/<run>/run.json` and given to every worker."""

import secrets
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nucleus.config.names import check_name
from nucleus.config.recipe import Recipe
from nucleus.errors import JobError, ObjectExistsError, ObjectNotFoundError
from nucleus.registry.encoder_weights import EncoderWeights
from nucleus.registry.manifest import EncoderWeightsOrigin
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri

__all__ = ["RunPlan", "load_plan", "new_run_name", "save_plan"]


PLAN_FORMAT = 1


class RunPlan(BaseModel):
    """A run with everything that was found out before it began, so that resuming it means the same run.

    Attributes:
        format: Of this document.
        run: Its name.
        bucket: `s3://bucket[/prefix]`.
        recipe: The recipe.
        dataset: `s3://.../NAME@VERSION`, always with the version.
        weights_uri: Where the encoder's weights are; None without.
        weights: Their origin.
        wandb_mode: `online`, `offline` or `disabled`.
        group: What the run belongs to, such as a sweep; its group in W&B.
        wandb_dir: Folder for W&B's files on the first worker's machine.
        folder: Folder on the driver's and the first worker's machine, in whose `<run>/` people find report and events.
        commit: Of the code; None if it did not come from a clone.
        begun: When, UTC, ISO 8601.
        token: Tells this plan from another of the same name and content.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = PLAN_FORMAT
    run: str
    bucket: str
    recipe: Recipe
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

    @property
    def how_to_go_on(self) -> str:
        """What to type when the run did not finish."""
        return f"Go on from its last checkpoint with: nucleus train RECIPE --resume {self.run}"

    @property
    def encoder_weights(self) -> EncoderWeights | None:
        """The encoder's weights in their bucket."""
        return EncoderWeights(parse_uri(self.weights_uri), self.weights) if self.weights_uri else None


def new_run_name(model: str) -> str:
    """A name that no other run has: model, moment (UTC) and four random digits."""
    moment = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return f"{model[:40]}-{moment}-{secrets.token_hex(2)}"


def plan_key(run: str) -> str:
    """Key of a run's plan below the bucket's prefix."""
    return f"runs/{check_name(run, 'run')}/run.json"


def save_plan(bucket: Bucket, plan: RunPlan) -> None:
    """Keep a new run's plan. Raises `JobError` if a run of this name exists."""
    try:
        bucket.put(plan_key(plan.run), plan.model_dump_json(indent=1).encode(), if_absent=True)
    except ObjectExistsError as error:
        raise JobError(
            f"Expected a run name that is not in use; {plan.run!r} is. Choose another with --run, or go on with that "
            f"run: nucleus train RECIPE --resume {plan.run}"
        ) from error


def load_plan(bucket: Bucket, run: str) -> RunPlan:
    """The plan of a run that was begun. Raises `JobError` if there is none."""
    try:
        return RunPlan.model_validate_json(bucket.get(plan_key(run)))
    except ObjectNotFoundError as error:
        raise JobError(f"Expected a run {run!r} in {bucket.uri}/runs; there is none to resume.") from error
    except ValidationError as error:
        raise JobError(f"Expected a run's plan at {bucket.uri / plan_key(run)}; it is damaged: {error}") from error
