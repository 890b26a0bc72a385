"""Runs or model versions beside each other: their scores, and what was different about how they were made."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nucleus.data.images import Kind
from nucleus.metrics.scores import HEADLINES
from nucleus.registry.manifest import ModelManifest
from nucleus.runs.listing import EpochMetrics, StoredRun, best_epoch, monitor_of, setting

__all__ = [
    "Contender",
    "ScoreRow",
    "flat_recipe",
    "of_run",
    "of_version",
    "recipe_differences",
    "score_rows",
    "scored_apart",
]


@dataclass(frozen=True)
class Contender:
    """A run or a model version, with what is known of it; None is what is not known.

    Attributes:
        name: The run, or NAME@N.
        run: The run.
        state: What became of the run, in words.
        recipe: The whole recipe.
        dataset: `s3://.../NAME@VERSION`.
        encoder_weights: What the encoder began with.
        metrics: Of the best weights: split, then `all` or kind of image, then metric; empty before a run's end.
        history: The metrics of each epoch.
        begun: When, UTC, ISO 8601.
        seconds: How long all stages took.
        cpu_seconds: CPU cores times the seconds that they were held.
        gpu_seconds: GPUs times the seconds that they were held.
        workers: How many trained, at the end.
        device: What each of them trained on.
        commit: Of the code.
        versions: Of Python and packages.
    """

    name: str
    run: str
    state: str
    recipe: dict[str, Any]
    dataset: str
    encoder_weights: str
    metrics: dict[str, dict[str, dict[str, float]]]
    history: list[EpochMetrics]
    begun: str | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    gpu_seconds: float | None = None
    workers: int | None = None
    device: str | None = None
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def monitor(self) -> str:
        """The validation metric that chose the best weights."""
        return monitor_of(self.recipe)

    @property
    def best(self) -> EpochMetrics | None:
        """The epoch whose weights were best."""
        return best_epoch(self.history, self.recipe)

    @property
    def epochs_asked(self) -> int | None:
        """How many the recipe asks for."""
        asked: int | None = setting(self.recipe, "optimizer.epochs")
        return asked

    @property
    def dataset_version(self) -> str:
        """The dataset's version, which is a sum of its content: where it lies and what it is called does not matter."""
        return self.dataset.rpartition("@")[2]


@dataclass(frozen=True)
class ScoreRow:
    """A metric of all contenders.

    Attributes:
        split: `val` or `test`.
        kind: `all`, or a kind of image.
        metric: Its key.
        title: What people call it.
        values: Of each contender; None where it is not known.
    """

    split: str
    kind: str
    metric: str
    title: str
    values: tuple[float | None, ...]

    @property
    def differences(self) -> tuple[float | None, ...]:
        """How far each value is above the first."""
        first = self.values[0]
        return tuple(None if value is None or first is None else value - first for value in self.values)


def of_run(run: StoredRun) -> Contender:
    """A run as a contender."""
    record = run.record
    return Contender(
        name=run.run,
        run=run.run,
        state=run.state,
        recipe=run.outline.recipe,
        dataset=run.outline.dataset,
        encoder_weights=run.outline.weights.source,
        metrics=run.metrics,
        history=run.history,
        begun=record.begun if record else run.begun.isoformat(),
        seconds=sum(stage.seconds for stage in record.stages) if record else None,
        cpu_seconds=record.cpu_seconds if record else None,
        gpu_seconds=record.gpu_seconds if record else None,
        workers=record.workers if record else None,
        device=record.device if record else None,
        commit=record.commit if record else None,
        versions=_versions(record.code_version, record.versions) if record else {},
    )


def of_version(manifest: ModelManifest, history: list[EpochMetrics]) -> Contender:
    """A model version as a contender."""
    origin = manifest.origin
    name = f"{manifest.model}@{manifest.version}"
    return Contender(
        name=name,
        run=origin.run,
        state=f"published as {name}",
        recipe=origin.recipe,
        dataset=origin.dataset,
        encoder_weights=origin.encoder_weights.source,
        metrics=origin.metrics,
        history=history,
        versions=_versions(origin.code_version, {}),
    )


def _versions(code: str, others: dict[str, str]) -> dict[str, str]:
    return {**others, "nucleus": code}


def score_rows(contenders: Sequence[Contender]) -> list[ScoreRow]:
    """The headline metrics on val and test, over all images and of each kind that at least two contenders have."""
    rows = []
    for split in ("val", "test"):
        by_kind = [contender.metrics.get(split, {}) for contender in contenders]
        shared = [kind.value for kind in Kind if sum(kind.value in scores for scores in by_kind) > 1]
        for kind in ("all", *shared):
            for metric, title in HEADLINES:
                values = tuple(scores.get(kind, {}).get(metric) for scores in by_kind)
                if any(value is not None for value in values):
                    rows.append(ScoreRow(split, kind, metric, title, values))
    return rows


def flat_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe by whole keys.

    >>> flat_recipe({"seed": 1, "optimizer": {"epochs": 3}})
    {'seed': 1, 'optimizer.epochs': 3}
    """
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flat_recipe(value).items()}
        else:
            flat[key] = value
    return flat


def recipe_differences(contenders: Sequence[Contender]) -> dict[str, dict[int, Any]]:
    """The keys that do not have the same value in every recipe: by key, the value of each contender that has the key.

    Contenders are told by their place. Recipes of older versions of this package lack some keys.
    """
    recipes = [flat_recipe(contender.recipe) for contender in contenders]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    found = {key: {place: recipe[key] for place, recipe in enumerate(recipes) if key in recipe} for key in keys}
    return {
        key: values
        for key, values in found.items()
        if len(values) < len(recipes) or any(value != values[0] for value in values.values())
    }


def scored_apart(contenders: Sequence[Contender]) -> str | None:
    """Why test scores do not compare, if they do not: the contenders were scored on different dataset versions."""
    scored = [contender for contender in contenders if contender.metrics]
    if len({contender.dataset_version for contender in scored}) < 2:
        return None
    told = ", ".join(f"{contender.name} on {contender.dataset}" for contender in scored)
    return (
        f"test scores do not compare: these were scored on different dataset versions: {told}. Score models on the "
        "same images: nucleus evaluate NAME@N DATASET"
    )
