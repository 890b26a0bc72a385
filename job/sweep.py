"""Several runs of one recipe with different settings, as trials of Ray Tune; only the best is published."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from job.capacity import Room, needed
from job.cluster import connected, rooms
from job.events import Listener, forwarded
from job.filesystem import run_storage
from job.publishing import FinishedRun, publish_run
from job.reporting import report_published, report_run
from job.train import RunOptions, fit_trial, plan_run
from nucleus.config.recipe import Recipe
from nucleus.errors import JobError, NucleusError, RecipeError
from nucleus.progress import Advance, no_progress
from nucleus.registry.manifest import ModelManifest
from nucleus.runs.plan import RUNS, RunFolder, RunPlan, save_plan
from nucleus.runs.state import StateWriter
from nucleus.storage.retries import set_storage_timeout, storage_timeout
from nucleus.storage.uri import parse_uri

__all__ = ["Outcome", "SweepResult", "Trial", "sweep"]

_TRIAL_BYTES = 256 << 20
"""What a trial takes beside its workers; Ray Tune has none that takes nothing."""
_NUMBER, _FITTED, _ERROR = "trial", "fitted", "error"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        settings: What it has instead of the recipe's, as KEY=VALUE.
        recipe: With these settings.
    """

    settings: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        run: Its run.
        settings: Its settings.
        fitted: What it left, if it finished.
        score: The gate's metric on the validation split, if it finished.
        error: Why it did not.
    """

    run: str
    settings: tuple[str, ...]
    fitted: FinishedRun | None
    score: float | None
    error: str | None


@dataclass(frozen=True)
class SweepResult:
    """All trials, the best first, and the version that the best one became."""

    outcomes: list[Outcome]
    published: ModelManifest


class _SweepSide:
    """Passes on what trials tell, each line with its number.

    Args:
        listener: Who hears it.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def stage(self, number: int, text: str) -> None:
        """A new part of a trial's work begins."""
        self._listener.stage(f"trial {number}: {text}")

    def warn(self, number: int, text: str) -> None:
        """Something that a person should know."""
        self._listener.warn(f"trial {number}: {text}")

    def steps(self, *_: object) -> None:
        """Do nothing: trials run beside each other."""

    def epoch(self, number: int, metrics: dict[str, float]) -> None:
        """An epoch of a trial is done."""
        names = {"loss": "loss", "val_loss": "val loss", "val_map": "mAP", "val_iou": "IoU", "val_dice": "Dice"}
        scores = ", ".join(f"{title} {metrics[name]:.4f}" for name, title in names.items() if name in metrics)
        self._listener.stage(f"trial {number}: epoch {metrics['epoch'] + 1:.0f}: {scores}")


class _TrialSide:
    """A `job.events.Listener` in a trial, which tells the sweep's queue."""

    def __init__(self, events: Any, number: int) -> None:
        self._events = events
        self._number = number

    def stage(self, text: str) -> None:
        self._events.put(("stage", (self._number, text)))

    def warn(self, text: str) -> None:
        self._events.put(("warn", (self._number, text)))

    def watch(self, title: str, unit: str = "items") -> AbstractContextManager[Advance]:  # noqa: ARG002
        return nullcontext(no_progress)

    def steps(self, *_: object) -> None:
        pass

    def epoch(self, metrics: dict[str, float]) -> None:
        self._events.put(("epoch", (self._number, metrics)))


def sweep(
    name: str, trials: Sequence[Trial], options: RunOptions, listener: Listener, at_once: int | None = None
) -> SweepResult:
    """Run every trial, as many at once as there is room for, and publish the one that validates best.

    Args:
        name: The sweep's; its runs are `<name>-01` and so on, and it is their group in W&B.
        trials: What to run; all of one model and dataset.
        options: How to run.
        listener: Who hears of it.
        at_once: How many at once at most.

    Raises:
        RecipeError: The trials have different models, datasets or buckets.
        JobError: No trial finished, or a name is in use.
        NucleusError: Whatever prevents all, before anything is started where it can be known.
    """
    if len({(trial.recipe.model, trial.recipe.dataset, trial.recipe.bucket) for trial in trials}) > 1:
        raise RecipeError("Expected trials of one model on one dataset in one bucket; --over changes them.")
    plans = [
        plan_run(trial.recipe, replace(options, run=f"{name}-{number:02d}"), listener, name)
        for number, trial in enumerate(trials, 1)
    ]
    listener.stage(f"Sweep {name}: {len(plans)} trials")
    largest = max(plans, key=lambda plan: sum(needed(plan.recipe).values()))
    with connected(largest.recipe, own=False, verbose=options.verbose):
        room = _trials_in_room(largest.recipe, rooms())
        bucket = options.bucket(largest.bucket)
        options.local_folder.mkdir(parents=True, exist_ok=True)
        for plan in plans:
            save_plan(bucket, plan)
        results = _tune(name, plans, options, listener, min(room, at_once or room))
        outcomes = [_outcome(plan, trial, result) for plan, trial, result in zip(plans, trials, results, strict=True)]
        outcomes.sort(key=lambda outcome: -1.0 if outcome.score is None else outcome.score, reverse=True)
        best = outcomes[0]
        if best.fitted is None:
            raise JobError(f"Expected a trial of {name} to finish; none did. The first: {best.error}")
        by_run = {plan.run: plan for plan in plans}
        with StateWriter(RunFolder(bucket, best.run)) as state:
            published = publish_run(by_run[best.run], best.fitted, bucket, listener)
            state.published(f"{published.model}@{published.version}")
    report_published(by_run[best.run], published, bucket, listener, {})
    for outcome in outcomes[1:]:
        if outcome.fitted is not None:
            fitted = outcome.fitted
            report_run(by_run[outcome.run], fitted.metrics, fitted.wandb_run, bucket, listener)
    return SweepResult(outcomes, published)


def _trials_in_room(recipe: Recipe, room: dict[str, Room]) -> int:
    """How many runs of a recipe a cluster has room for, at least one."""
    return max(1, min(int(room[name].most // count) for name, count in needed(recipe).items() if count))


def _tune(
    name: str, plans: Sequence[RunPlan], options: RunOptions, listener: Listener, at_once: int
) -> list[dict[str, Any]]:
    """What each trial reported, in the order of the plans."""
    from ray import tune

    if not options.verbose:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints boxes in spite of verbose=0
    home = parse_uri(plans[0].bucket)
    with forwarded(_SweepSide(listener), lambda: None) as events:
        trial = tune.with_parameters(
            _run_trial,
            plans=[plan.model_dump_json() for plan in plans],
            options=options,
            timeout=storage_timeout(),
            events=events,
        )
        tuner = tune.Tuner(
            tune.with_resources(trial, {"memory": _TRIAL_BYTES}),  # the CPUs are its workers'
            param_space={_NUMBER: tune.grid_search(list(range(len(plans))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
            run_config=tune.RunConfig(
                name=name,
                storage_path=f"{home.bucket}/{(home / RUNS).key}",
                storage_filesystem=run_storage(home, storage_timeout()),
                verbose=1 if options.verbose else 0,
            ),
        )
        found = {result.config[_NUMBER]: _told(result) for result in tuner.fit()}
    return [found[number] for number in range(len(plans))]


def _run_trial(config: dict[str, int], plans: list[str], options: RunOptions, timeout: float, events: Any) -> None:
    """A trial, in an actor of Ray Tune: one whole run but for the publishing."""
    from ray import tune

    set_storage_timeout(timeout)
    number = config[_NUMBER]
    plan = RunPlan.model_validate_json(plans[number])
    try:
        with connected(plan.recipe, own=False, verbose=options.verbose):
            side = _TrialSide(events, number + 1)
            fitted = fit_trial(plan, options, side)
    except NucleusError as error:
        tune.report({_ERROR: str(error)})
        return
    metric = plan.recipe.gate.metric
    side.stage(f"done: val {metric} {fitted.metrics['val']['all'][metric]:.4f}")
    tune.report({_FITTED: vars(fitted)})


def _told(result: Any) -> dict[str, Any]:
    """What a trial reported, or why Ray ended it."""
    if result.error is not None:
        return {_ERROR: (str(result.error).strip().splitlines() or [type(result.error).__name__])[-1]}
    return dict(result.metrics)


def _outcome(plan: RunPlan, trial: Trial, told: dict[str, Any]) -> Outcome:
    if _ERROR in told:
        return Outcome(plan.run, trial.settings, None, None, told[_ERROR])
    fitted = FinishedRun(**told[_FITTED])
    return Outcome(plan.run, trial.settings, fitted, fitted.metrics["val"]["all"][plan.recipe.gate.metric], None)
