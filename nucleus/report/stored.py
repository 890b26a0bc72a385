"""Runs as values: what each is and where it stands, by what it has left in the bucket."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from nucleus.config.names import check_name
from nucleus.registry.manifest import EncoderWeightsOrigin, ModelManifest
from nucleus.report.record import RunRecord

__all__ = [
    "PLAN_FORMAT",
    "DamagedRun",
    "EpochMetrics",
    "RunOutline",
    "StoredRun",
    "best_epoch",
    "monitor_of",
    "setting",
]

EpochMetrics = dict[str, float]
"""What is known of one epoch: `epoch` (from 0), `loss`, `learning_rate` and, where it was validated, `val_` metrics."""

PLAN_FORMAT = 1
"""Newest format of a run's plan that is understood."""

_DEFAULT_MONITOR = "val_map"
"""Chooses the best weights where a recipe does not say by what."""


class RunOutline(BaseModel):
    """What a run was to do: the part of its plan that is needed to tell of it.

    The recipe is not checked: one of an older version of this package may have other keys.

    Attributes:
        format: Of the plan.
        run: Its name.
        recipe: The whole recipe.
        dataset: `s3://.../NAME@VERSION`.
        weights: What the encoder began with.
        group: What it belongs to, such as a sweep.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = PLAN_FORMAT
    run: str
    recipe: dict[str, Any]
    dataset: str
    weights: EncoderWeightsOrigin
    group: str | None = None

    @field_validator("recipe")
    @classmethod
    def _names_a_model(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        check_name(str(recipe.get("model")), "model")
        return recipe


@dataclass(frozen=True)
class StoredRun:
    """A run.

    Attributes:
        outline: What it was to do.
        begun: When its plan was written.
        written: When an object directly in its folder was last written; each checkpoint writes some.
        folders: Names of the folders in it.
        history: What is known of each epoch that is done.
        record: What it left at its end; None if it has not ended, or ended before runs left records.
        manifest: Of the version that it published, where there is no record to tell.
    """

    outline: RunOutline
    begun: datetime
    written: datetime
    folders: tuple[str, ...]
    history: list[EpochMetrics]
    record: RunRecord | None = None
    manifest: ModelManifest | None = None

    @property
    def run(self) -> str:
        """Its name."""
        return self.outline.run

    @property
    def model(self) -> str:
        """Under which name its recipe publishes."""
        return str(self.outline.recipe["model"])

    @property
    def published(self) -> str | None:
        """NAME@N, the version that it published, if it did."""
        if self.record is not None and self.record.version is not None:
            return f"{self.record.model}@{self.record.version}"
        return f"{self.manifest.model}@{self.manifest.version}" if self.manifest else None

    @property
    def state(self) -> str:
        """`published as NAME@N`, `finished` (a trial that was not), or `no record`.

        The bucket does not tell whether a run without a record goes on, was stopped or has failed; `written` may.
        """
        if self.published:
            return f"published as {self.published}"
        return "finished" if self.record else "no record"

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, float]]]:
        """Scores of the best weights: split, then `all` or kind, then metric; empty before the end."""
        if self.record is not None:
            return self.record.metrics
        return self.manifest.origin.metrics if self.manifest else {}

    @property
    def epochs(self) -> tuple[int, int | None]:
        """How many are done, and how many the recipe asks for."""
        return len(self.history), setting(self.outline.recipe, "optimizer.epochs")

    @property
    def monitor(self) -> str:
        """The validation metric that chooses the best weights."""
        return monitor_of(self.outline.recipe)

    @property
    def best(self) -> EpochMetrics | None:
        """The epoch whose weights were best."""
        return best_epoch(self.history, self.outline.recipe)


@dataclass(frozen=True)
class DamagedRun:
    """A run with a document that cannot be read.

    Attributes:
        run: Its name.
        begun: When its plan was written.
        written: When an object directly in its folder was last written.
        problem: Names the document.
        outline: What it was to do, if that can be read.
    """

    run: str
    begun: datetime
    written: datetime
    problem: str
    outline: RunOutline | None


def setting(recipe: dict[str, Any], key: str) -> Any:
    """The value of a key such as `optimizer.epochs`; None if the recipe does not have it."""
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def monitor_of(recipe: dict[str, Any]) -> str:
    """The validation metric that chooses the best weights."""
    return str(setting(recipe, "optimizer.monitor") or _DEFAULT_MONITOR)


def best_epoch(history: Sequence[EpochMetrics], recipe: dict[str, Any]) -> EpochMetrics | None:
    """The first validated epoch with the largest value of the recipe's monitor; None before the first validation."""
    monitor = monitor_of(recipe)
    return max((epoch for epoch in history if monitor in epoch), key=lambda epoch: epoch[monitor], default=None)
