"""Training runs on a Ray cluster: plan, train, publish, report and resume."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

import job
from job.capacity import WaitingReport
from job.cluster import connected, lost_cluster, wait_for_certainty
from job.events import event_queue
from job.filesystem import run_storage
from job.publishing import FinishedRun, judge, publish_run
from job.ray_errors import failure_text, our_error
from job.reporting import has_facts, report_published
from job.signals import Interruptions, stop_request, stops_on_signals
from job.worker import train_worker
from nucleus.config.recipe import Recipe
from nucleus.data.dataset import Dataset, check_has_nuclei, locate_dataset, open_dataset
from nucleus.data.origins import check_licenses
from nucleus.errors import ClusterError, DataError, JobError, NucleusError, RecipeError, RunStoppedError, WeightsError
from nucleus.model.architecture import CONFIG_FILE, read_model_config, recipe_from_start
from nucleus.registry.encoder_weights import provide_start, provide_weights, start_origin
from nucleus.registry.manifest import EncoderWeightsOrigin, ModelManifest
from nucleus.registry.versions import version_of_run
from nucleus.runs.plan import (
    RUNS,
    RunFolder,
    RunPlan,
    check_new_run,
    check_same_recipe,
    load_plan,
    new_run_name,
    save_plan,
)
from nucleus.runs.state import StateWriter
from nucleus.storage.bucket import Bucket, check_conditional_writes
from nucleus.storage.retries import storage_timeout
from nucleus.storage.uri import bucket_from_environment, parse_uri
from nucleus.surroundings import commit
from nucleus.text import first_line
from nucleus.tracking.failover import check_tracking, tracking_mode, usable_mode
from nucleus.training.callbacks import Callback

__all__ = ["RunOptions", "fit", "fit_trial", "make_folder", "plan_run", "resume", "tracked_where_possible", "train"]


@dataclass(frozen=True)
class RunOptions:
    """Options of a run.

    Attributes:
        run: Name of a new run; None for a generated name.
        weights_optional: Whether to train a random encoder if pretrained weights are not available; for the demo only.
        own_cluster: Whether to start a Ray cluster on this machine even if another one is available.
        verbose: Whether to show the logs of Ray and the workers.
        folder: Folder on this machine; report and TensorBoard events go to `<run>/` in it. None is `runs`.
        single_writer: Whether nobody else publishes at the same time, so that a server may ignore conditional writes.
    """

    run: str | None = None
    weights_optional: bool = False
    own_cluster: bool = False
    verbose: bool = False
    folder: Path | None = None
    single_writer: bool = False

    @cached_property
    def local_folder(self) -> Path:
        """The folder as an absolute path, computed once: workers run in other folders, and this one may be removed."""
        return (self.folder or Path(RUNS)).absolute()

    def bucket(self, uri: str | None) -> Bucket:
        """Return the bucket `uri`; if None, that of the environment."""
        return Bucket(bucket_from_environment(uri), single_writer=self.single_writer)


_CHECKPOINTS_KEPT = 2
"""Checkpoints of a run that Ray Train does not delete: the last ones."""
_START_TIMEOUT, _ELASTIC_START_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10"
_STALL_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
"""Environment variables of Ray Train."""
_METRICS = "metrics"
"""Key that only the last report of a finished run has; the other reports are metrics of an epoch."""


def fit(
    plan: RunPlan, options: RunOptions, callback: Callback, interruptions: Interruptions, stop: Any = None
) -> FinishedRun:
    """Run the workers of a plan on the cluster that this process is connected to.

    Args:
        plan: The run.
        options: Options of the run.
        callback: Receives the events of the workers.
        interruptions: The signals of this process; the first one asks the workers to save and stop.
        stop: A `stop_request` of another process that can also ask them; None for a new one.

    Raises:
        RunStoppedError: The run was asked to stop; it can be resumed.
        NucleusError: An error of this project in a worker.
        JobError: Ray failed.
    """
    stop = stop or stop_request()
    begun = threading.Event()

    def ask() -> bool:
        if begun.is_set():
            stop.ask.remote()
        return begun.is_set()

    with (
        event_queue(callback, WaitingReport(plan.recipe, callback).tell, begun) as events,
        interruptions.asking(ask),
    ):
        try:
            result = _trainer(plan, events, stop).fit()
        except Exception as error:  # Ray wraps the errors of workers
            raise _explained(error, plan, options) from error
        except KeyboardInterrupt as error:
            if lost_cluster() is None:
                raise
            raise _explained(error, plan, options) from error
    if interruptions.asked or _METRICS not in result.metrics:
        done = "has trained, and publishes when it is resumed" if _METRICS in result.metrics else "saved a checkpoint"
        raise RunStoppedError(
            f"The run {plan.run} was asked to stop and {done}. {plan.how_to_go_on}",
            interruptions.signal or signal.SIGTERM,
        )
    wandb_run, mode = (result.metrics[name] for name in ("wandb_run", "wandb_mode"))
    return FinishedRun(result.metrics[_METRICS], wandb_run, result.checkpoint.path, mode)


def _trainer(plan: RunPlan, events: Any, stop: Any) -> Any:
    """Return Ray's trainer for the workers of a plan."""
    recipe, home = plan.recipe, parse_uri(plan.bucket)
    resources = {"CPU": recipe.cpus_per_worker, **({"GPU": 1} if recipe.gpus_per_worker else {})}
    os.environ[_STALL_TIMEOUT] = str(recipe.stall_timeout)  # Ray passes both variables to its controller
    if recipe.workers.elastic:  # after a request for a machine that is going away, try again soon with those that stay
        os.environ.setdefault(_START_TIMEOUT, _ELASTIC_START_SECONDS)
    return job.trainer_class()(
        train_worker,
        backend_config=job.MultiWorkerConfig(),
        train_loop_config={"plan": plan.model_dump_json(), "events": events, "stop": stop},
        scaling_config=ScalingConfig(
            num_workers=tuple(recipe.workers) if recipe.workers.elastic else recipe.workers.most,
            elastic_resize_monitor_interval_s=recipe.resize_interval,
            use_gpu=bool(recipe.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=plan.run,
            storage_path=f"{home.bucket}/{(home / RUNS).key}",
            storage_filesystem=run_storage(home, storage_timeout()),
            failure_config=FailureConfig(max_failures=recipe.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=_CHECKPOINTS_KEPT),
        ),
    )


def fit_trial(plan: RunPlan, options: RunOptions, callback: Callback, stop: Any) -> FinishedRun:
    """Run `fit` for a sweep's trial, and write its state; nothing is published.

    Args:
        plan: The run.
        options: Options of the run.
        callback: Receives the events of the workers.
        stop: The `stop_request` of the sweep.

    Raises:
        NucleusError: As for `fit`.
    """
    with StateWriter(RunFolder(options.bucket(plan.bucket), plan.run)) as state:
        fitted = fit(plan, options, callback, Interruptions(callback), stop)
        state.finished()
    return fitted


def _explained(error: BaseException, plan: RunPlan, options: RunOptions) -> NucleusError:
    """Return a worker's error of this project, else a `JobError` with the last cause and the command to resume."""
    found = our_error(error)
    if found is None:
        wait_for_certainty()
    lost = lost_cluster()
    if lost is not None:
        return JobError(f"Expected the run {plan.run} to finish; its Ray cluster is lost: {lost}. {plan.how_to_go_on}")
    if found is not None:
        return found
    hint = "" if options.verbose else " Run it again with --debug to see the workers' logs."
    failed = "a worker" if getattr(error, "worker_failures", None) else "Ray's controller"
    return JobError(
        f"Expected the run {plan.run} to finish; {failed} failed: {failure_text(error)}.{hint} {plan.how_to_go_on}"
    )


def train(recipe: Recipe, options: RunOptions | None = None, callback: Callback | None = None) -> ModelManifest:
    """Train by a recipe on the available Ray cluster, and publish the best weights.

    Returns:
        The manifest of the published version.

    Raises:
        NucleusError: Anything that prevents the run; found before the workers start where possible.
    """
    options = options or RunOptions()
    callback = callback or Callback()
    (plan,) = tracked_where_possible([plan_run(recipe, options, callback)], callback)
    return _execute(plan, options, callback, new=True)


def resume(
    run: str,
    bucket: str | None,
    options: RunOptions | None = None,
    callback: Callback | None = None,
    recipe: Recipe | None = None,
) -> ModelManifest:
    """Resume a run from its last checkpoint, with the recipe and the dataset version of its plan.

    For a run that has published its version, only the gate, the report and W&B are repeated.

    Args:
        run: Name of the run.
        bucket: URI of its bucket; None for that of the environment.
        options: Options of the run.
        callback: Shows progress and warnings.
        recipe: A recipe that must be that of the run; None for no such check.

    Returns:
        The manifest of the published version.

    Raises:
        JobError: There is no such run.
        RecipeError: The recipe is another one than that of the run.
        NucleusError: Anything else that prevents the run.
    """
    options = options or RunOptions()
    callback = callback or Callback()
    store = options.bucket(bucket)
    here = {"folder": str(options.local_folder), "submitted": job.is_submitted_job()}
    plan = load_plan(store, run).model_copy(update=here)
    for text in check_same_recipe(plan, recipe) if recipe else ():
        callback.on_warning(f"The run keeps what it started with; ignored: {text}")
    check_conditional_writes(store)
    published = version_of_run(store, plan.recipe.model, run)
    if published is None:
        return _execute(tracked_where_possible([plan], callback)[0], options, callback, new=False)
    judge(store, published, plan, callback)
    if has_facts(store, run):
        report_published(plan, published, store, callback, {})
    else:
        callback.on_warning(f"The run {run} has no report, because an older version of this package trained it.")
    return published


def plan_run(recipe: Recipe, options: RunOptions, callback: Callback, group: str | None = None) -> RunPlan:
    """Check everything that can be checked without a cluster, and return the run's plan.

    Args:
        recipe: The recipe.
        options: Options of the run.
        callback: Shows progress and warnings.
        group: Group of the run, such as a sweep.

    Raises:
        NucleusError: The bucket, the dataset, the recipe, W&B or the encoder's weights cannot be used.
    """
    bucket = options.bucket(recipe.bucket)
    bucket.check(RUNS)
    if options.run:
        check_new_run(bucket, options.run, f"nucleus train --resume {options.run}")
    dataset = open_dataset(locate_dataset(recipe.dataset, recipe.bucket))
    images = len(dataset.manifest.split_samples("train"))
    if not recipe.steps_of_epoch(images):
        raise DataError(
            f"Expected at least one batch of {recipe.input.batch_size} images in the training split of {dataset}; "
            f"found {images}. Set optimizer.steps_per_epoch, so that an epoch reads images several times; or set "
            "input.batch_size lower, or import more."
        )
    check_has_nuclei(dataset)
    check_licenses(dataset.manifest.data_sources, recipe.card, str(dataset))
    mode = tracking_mode(recipe.tracking)
    check_tracking(mode)
    check_conditional_writes(bucket)
    run = options.run or new_run_name(recipe.model)
    return RunPlan(
        run=run,
        bucket=str(bucket.uri),
        dataset=str(dataset),
        mix=_mix(recipe, dataset),
        wandb_mode=mode,
        group=group,
        wandb_dir=str(Path(os.environ.get("WANDB_DIR") or Path.cwd()).absolute()),
        folder=str(options.local_folder),
        commit=commit(),
        submitted=job.is_submitted_job(),
        **_initial_weights(recipe, options, RunFolder(bucket, run), callback),
    )


def _mix(recipe: Recipe, dataset: Dataset) -> dict[str, float]:
    """Return the versions of the datasets that are mixed in, with their shares.

    Raises:
        DataError: A dataset does not exist, or has no nuclei in its training or validation split.
        RecipeError: A dataset is named twice.
    """
    mix: dict[str, float] = {}
    for name, share in recipe.mix.items():
        mixed = open_dataset(locate_dataset(name, recipe.bucket))
        check_has_nuclei(mixed)
        if str(mixed) in {str(dataset), *mix}:
            raise RecipeError(f"Expected other datasets in mix than {dataset}, each once; found {mixed} again.")
        mix[str(mixed)] = share
    return mix


def _initial_weights(recipe: Recipe, options: RunOptions, home: RunFolder, callback: Callback) -> dict[str, Any]:
    """Provide the weights that a run starts with; return what the plan says of them, and the recipe with them."""
    if recipe.network.start is not None:
        return _start(recipe, recipe.network.start, home, callback)
    network, replaced = recipe.network, False
    try:
        with callback.progress("encoder weights", "bytes") as advance:
            weights = provide_weights(
                network.weights, network.encoder, home.bucket, home.key(), advance, callback.on_stage
            )
    except WeightsError as error:
        if not (options.weights_optional and network.weights == "imagenet"):
            raise
        weights, replaced = None, True
        recipe = recipe.with_random_encoder()
        callback.on_warning(f"Training WITHOUT pretrained encoder weights, so results will be worse. {error}")
    return {
        "recipe": recipe.model_dump(mode="json"),
        "weights_uri": str(weights.uri) if weights else None,
        "weights": weights.origin if weights else EncoderWeightsOrigin(source="none", sha256=None),
        "encoder_replaced": replaced,
    }


def _start(recipe: Recipe, start: str, home: RunFolder, callback: Callback) -> dict[str, Any]:
    """Return what the plan says of the version that a run starts with, and the recipe with its architecture."""
    found = provide_start(start, home.bucket, home.key(), callback.progress)
    origin, path = start_origin(found), found.folder / CONFIG_FILE
    config = read_model_config(path.read_bytes(), str(path))
    callback.on_stage(f"Starting with the weights of {origin}")
    return {
        "recipe": recipe_from_start(recipe, config, origin.version).model_dump(mode="json"),
        "weights_uri": None,
        "weights": found.manifest.origin.encoder_weights,
        "start_uri": str(found.uri),
        "start": origin,
        "encoder_replaced": False,
    }


def tracked_where_possible(plans: Sequence[RunPlan], callback: Callback) -> list[RunPlan]:
    """Return the plans, with offline tracking instead of online if W&B's server cannot be used; it is asked once."""
    if not any(plan.wandb_mode == "online" for plan in plans):
        return list(plans)
    mode = usable_mode("online", callback.on_stage, callback.on_warning)
    return [plan.model_copy(update={"wandb_mode": mode}) if plan.wandb_mode == "online" else plan for plan in plans]


def _execute(plan: RunPlan, options: RunOptions, callback: Callback, *, new: bool) -> ModelManifest:
    bucket, versions = options.bucket(plan.bucket), list[str]()

    def how_to_go_on() -> str:
        if versions:
            return f"{versions[0]} is published. To write its report again, run: {plan.resume_command}"
        return plan.how_to_go_on

    callback.on_stage(f"{'Training' if new else 'Resuming'} {plan.run} on {plan.recipe.workers}")
    make_folder(options.local_folder, callback)
    with stops_on_signals(callback, how_to_go_on) as interruptions:
        interruptions.resumable = not new
        with ExitStack() as stack:
            with _resumable(plan), connected(plan.recipe, own=options.own_cluster, verbose=options.verbose):
                if new:  # only now, so that the name of a run that could not start stays free
                    interruptions.resumable = True  # before it is: a signal may arrive in between
                    save_plan(bucket, plan)
                state = stack.enter_context(StateWriter(RunFolder(bucket, plan.run)))
                begun = time.monotonic()
                fitted = fit(plan, options, callback, interruptions)
            trained = time.monotonic()  # nothing from here on needs the cluster, which may be lost now
            manifest = publish_run(plan, fitted, bucket, callback)
            versions.append(f"{manifest.model}@{manifest.version}")
            state.published(versions[0])
        seconds = {"train": trained - begun, "publish": time.monotonic() - trained}
        report_published(plan, manifest, bucket, callback, seconds)
    return manifest


@contextmanager
def _resumable(plan: RunPlan) -> Iterator[None]:
    """Add how to resume a run to the error of its lost cluster."""
    try:
        yield
    except ClusterError as error:
        message = f"{error} {plan.how_to_go_on}"
        raise JobError(message) from error


def make_folder(folder: Path, callback: Callback) -> None:
    """Make the folder for reports on this machine, where workers write too if it exists.

    A run does not need it: everything is in the bucket too. If it cannot be made, a warning says so.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
        problem = "" if writable else "it cannot be written"
    except OSError as error:
        problem = first_line(error)
    if problem:
        callback.on_warning(
            f"The report will be only in the bucket, not in {folder}: {problem}. To choose another folder: --out DIR"
        )
