"""Sweeps: runs of one recipe with different settings, as trials of Ray Tune; the best one is published."""

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from job.capacity import Capacity, capacities, resources_needed
from job.cluster import connected
from job.events import EventCallback, event_queue
from job.filesystem import run_storage
from job.publishing import FinishedRun, publish_run
from job.ray_errors import failure_text
from job.ray_internals import keep_keys_from_trials
from job.reporting import report_published, report_run
from job.signals import Interruptions, stop_request, stops_on_signals
from job.train import RunOptions, fit_trial, make_folder, plan_run, tracked_where_possible
from nucleus.config.recipe import Recipe
from nucleus.errors import JobError, NucleusError, RecipeError, RunStoppedError
from nucleus.metrics.scores import epoch_scores, score_cell
from nucleus.registry.manifest import ModelManifest
from nucleus.runs.plan import RUNS, RunFolder, RunPlan, save_plan
from nucleus.runs.state import StateWriter, replace_state_of_another
from nucleus.storage.bucket import Bucket
from nucleus.storage.retries import set_storage_timeout, storage_timeout
from nucleus.storage.uri import parse_uri
from nucleus.text import first_line, plural
from nucleus.training.callbacks import Callback

__all__ = ["Outcome", "SweepResult", "Trial", "sweep"]

_TRIAL_BYTES = 256 << 20
"""Memory that a trial reserves besides its workers, because Ray Tune requires some resource."""
_NUMBER, _FITTED, _ERROR = "trial", "fitted", "error"
"""Keys of a trial's configuration and of its report."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        settings: Settings that differ from the recipe, as KEY=VALUE.
        recipe: The recipe with these settings.
    """

    settings: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Outcome:
    """The outcome of a trial.

    Attributes:
        run: Name of the run.
        settings: Settings of the trial.
        fitted: The finished run; None if it failed.
        score: The gate's metric on the validation split; None if the trial failed or it is undefined.
        error: Why the trial failed; None if it finished.
    """

    run: str
    settings: tuple[str, ...]
    fitted: FinishedRun | None
    score: float | None
    error: str | None


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep.

    Attributes:
        outcomes: All trials, the best first.
        published: Manifest of the version that was published from the best one.
    """

    outcomes: list[Outcome]
    published: ModelManifest


class _TrialCallback(Callback):
    """Forwards a trial's stages, warnings and epochs as lines that begin with its number.

    Steps are not forwarded, because trials run in parallel.

    Args:
        number: The trial's number, from 1.
        callback: Receives the lines.
    """

    def __init__(self, number: int, callback: Callback) -> None:
        self._number = number
        self._callback = callback

    def on_stage(self, text: str) -> None:
        self._callback.on_stage(f"trial {self._number}: {text}")

    def on_warning(self, text: str) -> None:
        self._callback.on_warning(f"trial {self._number}: {text}")

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        self.on_stage(f"epoch {metrics['epoch']:.0f}: {epoch_scores(metrics)}")


def sweep(
    name: str, trials: Sequence[Trial], options: RunOptions, callback: Callback, at_once: int | None = None
) -> SweepResult:
    """Run all trials, as many in parallel as fit on the cluster, and publish the one with the best validation score.

    Args:
        name: Name of the sweep and of its group in W&B; its runs are named `<name>-01` and so on.
        trials: The trials, all of one model, dataset and bucket.
        options: Options of every run.
        callback: Receives stages, warnings and epochs of all trials as lines.
        at_once: Largest number of trials in parallel.

    Raises:
        RecipeError: The trials have different models, datasets or buckets.
        JobError: No trial finished, or a name is in use.
        NucleusError: Anything else that prevents the sweep; found before the trials start where possible.
    """
    if len({(trial.recipe.model, trial.recipe.dataset, trial.recipe.bucket) for trial in trials}) > 1:
        raise RecipeError("Expected trials of one model on one dataset in one bucket; found --over for one of these.")
    plans = [
        plan_run(trial.recipe, replace(options, run=f"{name}-{number:02d}"), callback, name)
        for number, trial in enumerate(trials, 1)
    ]
    plans = tracked_where_possible(plans, callback)
    callback.on_stage(f"Sweep {name}: {plural(len(plans), 'trial')}")
    for number, (trial, plan) in enumerate(zip(trials, plans, strict=True), 1):
        callback.on_stage(f"trial {number}: {' '.join(trial.settings)} (run {plan.run})")
    bucket = options.bucket(plans[0].bucket)
    make_folder(options.local_folder, callback)
    versions: list[str] = []
    with stops_on_signals(callback, lambda: _how_to_go_on(plans, versions)) as interruptions:
        outcomes = _outcomes(name, list(zip(plans, trials, strict=True)), options, callback, interruptions, at_once)
        best = outcomes[0]
        if best.fitted is None:
            raise JobError(f"Expected a trial of {name} to finish; none did. The first: {best.error}")
        by_run = {plan.run: plan for plan in plans}
        with StateWriter(RunFolder(bucket, best.run)) as state:
            published = publish_run(by_run[best.run], best.fitted, bucket, callback)
            versions.append(f"{published.model}@{published.version}")
            state.published(versions[0])
        report_published(by_run[best.run], published, bucket, callback, {})
        for outcome in outcomes[1:]:
            _report(by_run[outcome.run], outcome, bucket, callback)
    return SweepResult(outcomes, published)


def _outcomes(
    name: str,
    trials: Sequence[tuple[RunPlan, Trial]],
    options: RunOptions,
    callback: Callback,
    interruptions: Interruptions,
    at_once: int | None,
) -> list[Outcome]:
    """Run all trials on the cluster; return their outcomes, the best first.

    Raises:
        RunStoppedError: A signal asked the trials to save and stop.
    """
    plans = [plan for plan, _ in trials]
    largest = max(plans, key=lambda plan: sum(resources_needed(plan.recipe).values()))
    with connected(largest.recipe, own=False, verbose=options.verbose):
        most = _parallel_trials(largest.recipe, capacities())
        interruptions.resumable = True
        for plan in plans:
            save_plan(options.bucket(plan.bucket), plan)
            replace_state_of_another(RunFolder(options.bucket(plan.bucket), plan.run))
        results = _tune(name, plans, options, callback, min(most, at_once or most), interruptions)
    outcomes = [_outcome(plan, trial, result) for (plan, trial), result in zip(trials, results, strict=True)]
    if interruptions.asked:
        raise RunStoppedError(
            f"Expected the sweep {name} to finish; it was asked to stop, and publishes nothing. {_how_to_go_on(plans)}",
            interruptions.signal or signal.SIGTERM,
        )
    return sorted(outcomes, key=lambda outcome: -1.0 if outcome.score is None else outcome.score, reverse=True)


def _how_to_go_on(plans: Sequence[RunPlan], versions: Sequence[str] = ()) -> str:
    """Return the sentence that says how to continue a trial: a sweep as a whole cannot be resumed.

    Args:
        plans: The trials.
        versions: The version that the sweep has published, or nothing.
    """
    if versions:
        return f"{versions[0]} is published; reports of the trials are missing."
    return f"To continue and publish one of its {len(plans)} trials, such as the first: {plans[0].resume_command}"


def _report(plan: RunPlan, outcome: Outcome, bucket: Bucket, callback: Callback) -> None:
    """Write the report of a trial that was not published; a problem is a warning, because the sweep has its result."""
    if outcome.fitted is None:
        return
    try:
        tracked = (outcome.fitted.wandb_run, outcome.fitted.wandb_mode)
        report_run(plan, outcome.fitted.metrics, tracked, bucket, callback)
    except Exception as error:
        callback.on_warning(f"The report of {outcome.run} is not complete: {first_line(error) or type(error).__name__}")


def _parallel_trials(recipe: Recipe, capacity: dict[str, Capacity]) -> int:
    """Return the number of runs of a recipe that fit on a cluster, at least 1."""
    return max(1, min(int(capacity[name].most // count) for name, count in resources_needed(recipe).items() if count))


def _tune(
    name: str,
    plans: Sequence[RunPlan],
    options: RunOptions,
    callback: Callback,
    at_once: int,
    interruptions: Interruptions,
) -> list[dict[str, Any]]:
    """Run the trials; return the report of each, in the order of the plans."""
    from ray import tune

    if not options.verbose:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints boxes despite verbose=0
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # `job.signals` handles it
    keep_keys_from_trials()
    home, stop, begun = parse_uri(plans[0].bucket), stop_request(), threading.Event()

    def ask() -> bool:
        if begun.is_set():
            stop.ask.remote()
        return begun.is_set()

    with event_queue(callback, lambda: None, begun) as events, interruptions.asking(ask):
        trial = tune.with_parameters(
            _run_trial,
            plans=[plan.model_dump_json() for plan in plans],
            options=options,
            timeout=storage_timeout(),
            events=events,
            stop=stop,
        )
        tuner = tune.Tuner(
            tune.with_resources(trial, {"memory": _TRIAL_BYTES}),  # the workers reserve the CPUs and GPUs
            param_space={_NUMBER: tune.grid_search(list(range(len(plans))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
            run_config=tune.RunConfig(
                name=name,
                storage_path=f"{home.bucket}/{(home / RUNS).key}",
                storage_filesystem=run_storage(home, storage_timeout()),
                verbose=1 if options.verbose else 0,
            ),
        )
        found = {result.config[_NUMBER]: _reported(result) for result in tuner.fit()}
    return [found[number] for number in range(len(plans))]


def _run_trial(
    config: dict[str, int], plans: list[str], options: RunOptions, timeout: float, events: Any, stop: Any
) -> None:
    """Run one trial, in an actor of Ray Tune: a complete run without publishing. After a stop, begin none."""
    import ray
    from ray import tune

    set_storage_timeout(timeout)
    number = config[_NUMBER]
    plan = RunPlan.model_validate_json(plans[number])
    if ray.get(stop.asked.remote()):
        tune.report({_ERROR: "the sweep was asked to stop before this trial began"})
        return
    try:
        with connected(plan.recipe, own=False, verbose=options.verbose):
            callback = _TrialCallback(number + 1, EventCallback(events))
            fitted = fit_trial(plan, options, callback, stop)
    except NucleusError as error:
        tune.report({_ERROR: str(error)})
        return
    metric = plan.recipe.gate.metric
    callback.on_stage(f"done: val {metric} {score_cell(fitted.metrics['val']['all'], metric)}")
    tune.report({_FITTED: vars(fitted)})


def _reported(result: Any) -> dict[str, Any]:
    """Return a trial's report, or the error with which Ray ended the trial."""
    if result.error is not None:
        return {_ERROR: failure_text(result.error)}
    return dict(result.metrics)


def _outcome(plan: RunPlan, trial: Trial, report: dict[str, Any]) -> Outcome:
    if _ERROR in report:
        return Outcome(plan.run, trial.settings, None, None, report[_ERROR])
    fitted = FinishedRun(**report[_FITTED])
    return Outcome(plan.run, trial.settings, fitted, fitted.metrics["val"]["all"][plan.recipe.gate.metric], None)
