"""Comparison of runs or model versions: scores, and differences of their recipes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nucleus.config.names import Kind
from nucleus.metrics.scores import HEADLINES
from nucleus.registry.manifest import ModelManifest
from nucleus.runs.listing import EpochMetrics, StoredRun, best_epoch, monitor_of, setting

__all__ = [
    "ComparedRun",
    "ScoreRow",
    "datasets_warning",
    "flat_recipe",
    "of_run",
    "of_version",
    "recipe_differences",
    "score_rows",
]


@dataclass(frozen=True)
class ComparedRun:
    """A run or a model version, as it is compared; None stands for an unknown value.

    Attributes:
        name: Name of the run, or NAME@N.
        run: Name of the run.
        state: State of the run, such as `running` or `published as NAME@N`.
        recipe: The whole recipe.
        dataset: `s3://.../NAME@VERSION`.
        encoder_weights: Source of the encoder's initial weights.
        metrics: Scores of the best weights: split, then `all` or kind of image, then metric; empty until the run ends.
        history: Metrics of each epoch.
        begun: Start of the run, UTC, ISO 8601.
        seconds: Total duration of all stages.
        cpu_seconds: CPU core seconds that the run held.
        gpu_seconds: GPU seconds that the run held.
        workers: Number of workers at the end.
        device: Device of each worker.
        commit: Commit of the code.
        versions: Versions of Python and packages.
    """

    name: str
    run: str
    state: str
    recipe: dict[str, Any]
    dataset: str
    encoder_weights: str
    metrics: dict[str, dict[str, dict[str, float | None]]]
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
        """Name of the validation metric that chose the best weights."""
        return monitor_of(self.recipe)

    @property
    def best(self) -> EpochMetrics | None:
        """Metrics of the epoch with the best weights; None before the first validation."""
        return best_epoch(self.history, self.recipe)

    @property
    def epochs_asked(self) -> int | None:
        """Number of epochs in the recipe."""
        asked: int | None = setting(self.recipe, "optimizer.epochs")
        return asked

    @property
    def dataset_version(self) -> str:
        """Version of the dataset: a checksum of its content, independent of its name and location."""
        return self.dataset.rpartition("@")[2]


@dataclass(frozen=True)
class ScoreRow:
    """One metric of every run.

    Attributes:
        split: `val` or `test`.
        kind: `all`, or a kind of image.
        metric: Key of the metric.
        title: Name of the metric in tables.
        values: Value of each run; None where it is unknown or undefined.
    """

    split: str
    kind: str
    metric: str
    title: str
    values: tuple[float | None, ...]

    @property
    def differences(self) -> tuple[float | None, ...]:
        """Each value minus the first one; None where either is unknown."""
        first = self.values[0]
        return tuple(None if value is None or first is None else value - first for value in self.values)


def of_run(run: StoredRun) -> ComparedRun:
    """Return a stored run in the form in which it is compared."""
    record = run.record
    return ComparedRun(
        name=run.run,
        run=run.run,
        state=run.status.short,
        recipe=run.plan.settings,
        dataset=run.plan.dataset,
        encoder_weights=run.plan.weights.source,
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


def of_version(manifest: ModelManifest, history: list[EpochMetrics]) -> ComparedRun:
    """Return a model version, with the history of the run that published it, in the form in which it is compared."""
    origin = manifest.origin
    name = f"{manifest.model}@{manifest.version}"
    return ComparedRun(
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


def score_rows(runs: Sequence[ComparedRun]) -> list[ScoreRow]:
    """Return the headline metrics on `val` and `test`, over all images and for each kind that two or more runs have."""
    rows = []
    for split in ("val", "test"):
        by_kind = [run.metrics.get(split, {}) for run in runs]
        shared = [kind.value for kind in Kind if sum(kind.value in scores for scores in by_kind) > 1]
        for kind in ("all", *shared):
            for metric, title in HEADLINES:
                values = tuple(scores.get(kind, {}).get(metric) for scores in by_kind)
                if any(value is not None for value in values):
                    rows.append(ScoreRow(split, kind, metric, title, values))
    return rows


def flat_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with dotted keys instead of nested tables.

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


def recipe_differences(runs: Sequence[ComparedRun]) -> dict[str, dict[int, Any]]:
    """Return the keys whose values differ: dotted key, then index of the run, then value.

    A run whose recipe lacks a key, as one of an older version of this package may, has no entry for it.
    """
    recipes = [flat_recipe(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    found = {key: {place: recipe[key] for place, recipe in enumerate(recipes) if key in recipe} for key in keys}
    return {
        key: values
        for key, values in found.items()
        if len(values) < len(recipes) or any(value != values[0] for value in values.values())
    }


def datasets_warning(runs: Sequence[ComparedRun]) -> str | None:
    """Return a warning if test scores do not compare, because the dataset versions of the runs differ; else None."""
    scored = [run for run in runs if run.metrics]
    if len({run.dataset_version for run in scored}) < 2:
        return None
    places = ", ".join(f"{run.name} on {run.dataset}" for run in scored)
    return (
        f"test scores do not compare: these were scored on different dataset versions: {places}. To score models on "
        "the same images, run: nucleus evaluate NAME@N DATASET"
    )
