"""The driver of a training run: from a recipe to a published model.

`nucleus train` calls it; `python -m job.train RECIPE` is the same for a Ray job. Options before the recipe are those of
`nucleus` itself, such as `--debug`.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from job.causes import our_error
from job.cluster import connected, rooms
from job.demands import stop_request, stops_on_sigterm
from job.events import Listener, SilentListener, forwarded
from job.gate import judge
from job.placement import missing, needed
from job.plan import RunPlan, load_plan, new_run_name, save_plan
from job.worker import FINAL_FOLDER, train_worker
from nucleus import __version__
from nucleus.config.recipe import Recipe
from nucleus.data.datasets import locate_dataset, open_dataset
from nucleus.errors import DataError, JobError, NucleusError, RunStoppedError, WeightsError
from nucleus.registry.card import model_card
from nucleus.registry.encoder_weights import provide_weights
from nucleus.registry.manifest import EncoderWeightsOrigin, ModelManifest, Origin
from nucleus.registry.versions import publish, version_of_run
from nucleus.storage.bucket import Bucket
from nucleus.storage.conditions import check_conditional_writes
from nucleus.storage.retries import storage_timeout
from nucleus.storage.sums import check_sums
from nucleus.storage.uri import bucket_from_environment, parse_uri
from nucleus.tracking.weights_and_biases import check_tracking, tracking_mode

__all__ = ["RunOptions", "resume", "train"]

_CHECKPOINTS_KEPT = 2
_START_TIMEOUT, _ELASTIC_START_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10"
_STALL_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what.

    Attributes:
        run: Name of a new run; None makes one up.
        weights_optional: Whether to go on with a random encoder when no weights can be had. Only the demo may.
        own_cluster: Whether to start a Ray cluster on this machine even if another is at hand.
        verbose: Whether to show the logs of Ray and the workers.
        single_writer: Whether nobody else publishes meanwhile, so that the server may ignore conditional writes.
    """

    run: str | None = None
    weights_optional: bool = False
    own_cluster: bool = False
    verbose: bool = False
    single_writer: bool = False

    def bucket(self, uri: str | None) -> Bucket:
        """The bucket `uri`, or else the environment's."""
        return Bucket(bucket_from_environment(uri), single_writer=self.single_writer)


def train(recipe: Recipe, options: RunOptions | None = None, listener: Listener | None = None) -> ModelManifest:
    """Train by a recipe on the Ray cluster at hand and publish the best weights.

    Raises:
        NucleusError: Whatever prevents it, before anything is started where it can be known.
    """
    options = options or RunOptions()
    listener = listener or SilentListener()
    return _execute(_plan(recipe, options, listener), options, listener, new=True)


def resume(
    run: str, bucket: str | None, options: RunOptions | None = None, listener: Listener | None = None
) -> ModelManifest:
    """Go on with a run from its last checkpoint, by the recipe and data that it began with.

    Raises:
        JobError: There is no such run.
    """
    options = options or RunOptions()
    listener = listener or SilentListener()
    store = options.bucket(bucket)
    check_conditional_writes(store)
    plan = load_plan(store, run)
    published = version_of_run(store, plan.recipe.model, run)
    if published is None:
        return _execute(plan, options, listener, new=False)
    judge(store, published, plan, listener)
    return published


def _plan(recipe: Recipe, options: RunOptions, listener: Listener) -> RunPlan:
    """Find out what can be wrong before a cluster is used."""
    bucket = options.bucket(recipe.bucket)
    bucket.check("runs/")
    dataset = open_dataset(locate_dataset(recipe.dataset, recipe.bucket))
    images = len(dataset.manifest.split_samples("train"))
    if images < recipe.input.batch_size:
        raise DataError(
            f"Expected at least one batch of {recipe.input.batch_size} images in the training split of {dataset}; "
            f"found {images}. Set input.batch_size lower or import more."
        )
    mode = tracking_mode(recipe.tracking)
    check_tracking(mode)
    check_conditional_writes(bucket)
    run = options.run or new_run_name(recipe.model)
    try:
        weights = provide_weights(recipe.network.weights, recipe.network.encoder, bucket, run)
    except WeightsError as error:
        if not (options.weights_optional and recipe.network.weights == "imagenet"):
            raise
        weights = None
        recipe = recipe.with_random_encoder()
        listener.warn(f"Going on WITHOUT pretrained encoder weights, so results will be worse. {error}")
    return RunPlan(
        run=run,
        bucket=str(bucket.uri),
        recipe=recipe,
        dataset=str(dataset),
        weights_uri=str(weights.uri) if weights else None,
        weights=weights.origin if weights else EncoderWeightsOrigin(source="none", sha256=None),
        wandb_mode=mode,
        wandb_dir=str(Path(os.environ.get("WANDB_DIR") or Path.cwd()).absolute()),
    )


def _execute(plan: RunPlan, options: RunOptions, listener: Listener, *, new: bool) -> ModelManifest:
    bucket = options.bucket(plan.bucket)
    listener.stage(f"Training {plan.run} on {plan.recipe.workers}")
    with (
        tempfile.TemporaryDirectory(prefix="nucleus-model-") as temporary,
        connected(plan.recipe, own=options.own_cluster, verbose=options.verbose),
    ):
        if new:  # only now, so that a run which could not begin leaves its name free
            save_plan(bucket, plan)
        folder = Path(temporary) / FINAL_FOLDER
        result = _fit(plan, options, listener, folder)
        origin = Origin(
            run=plan.run,
            recipe=plan.recipe.model_dump(mode="json"),
            dataset=plan.dataset,
            encoder_weights=plan.weights,
            metrics=result["metrics"],
            code_version=__version__,
            wandb_run=result["wandb_run"],
        )
        listener.stage(f"Publishing {plan.recipe.model}")
        (folder / "card.md").write_text(model_card(plan.recipe.model, origin))
        manifest = publish(bucket, plan.recipe.model, folder, origin)
        judge(bucket, manifest, plan, listener)
        return manifest


def _fit(plan: RunPlan, options: RunOptions, listener: Listener, folder: Path) -> dict[str, Any]:
    """Run the workers; copy the model's files to `folder` and return what the first worker reported last."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from job.backend import MultiWorkerConfig
    from job.storage import run_storage

    recipe = plan.recipe
    resources = {"CPU": recipe.cpus_per_worker, **({"GPU": 1} if recipe.gpus_per_worker else {})}
    stop, home = stop_request(), parse_uri(plan.bucket)
    os.environ[_STALL_TIMEOUT] = str(recipe.stall_timeout)  # Ray hands both on to its controller
    if recipe.workers.elastic:  # it may ask for a machine that is going, and then asks for what is there
        os.environ.setdefault(_START_TIMEOUT, _ELASTIC_START_SECONDS)

    def no_worker_yet() -> None:
        waits = missing(needed(recipe), rooms())
        if waits:
            listener.stage(f"Waiting for {waits}")

    with forwarded(listener, no_worker_yet) as events, stops_on_sigterm(stop, plan):
        trainer = DataParallelTrainer(
            train_worker,
            backend_config=MultiWorkerConfig(),
            train_loop_config={
                "plan": plan.model_dump_json(),
                "events": events,
                "stop": stop,
            },
            scaling_config=ScalingConfig(
                num_workers=tuple(recipe.workers) if recipe.workers.elastic else recipe.workers.most,
                elastic_resize_monitor_interval_s=recipe.resize_interval,
                use_gpu=bool(recipe.gpus_per_worker),
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=plan.run,
                storage_path=f"{home.bucket}/{(home / 'runs').key}",
                storage_filesystem=run_storage(home, storage_timeout()),
                failure_config=FailureConfig(max_failures=recipe.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=_CHECKPOINTS_KEPT),
            ),
        )
        try:
            result = trainer.fit()
        except Exception as error:  # Ray wraps what a worker raised in errors of its own
            raise _explained(error, plan, options) from error
    with result.checkpoint.as_directory() as checkpoint:
        check_sums(Path(checkpoint), f"s3://{result.checkpoint.path}")
        model = Path(checkpoint) / FINAL_FOLDER
        if not model.is_dir():
            raise RunStoppedError(f"The run {plan.run} was asked to stop and saved a checkpoint. {plan.how_to_go_on}")
        shutil.copytree(model, folder)
    return dict(result.metrics)


def _explained(error: BaseException, plan: RunPlan, options: RunOptions) -> NucleusError:
    """The worker's own error if it is one of ours, else what Ray says with the way to go on."""
    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    for cause in causes:
        found = our_error(cause)
        if found is not None:
            return found
    first = str(causes[0]).strip().splitlines()
    hint = "" if options.verbose else " Run it again with --debug to see the workers' logs."
    failed = "a worker" if getattr(error, "worker_failures", None) else "Ray's controller"
    return JobError(
        f"Expected the run {plan.run} to finish; {failed} failed: {first[-1] if first else type(error).__name__}."
        f"{hint} {plan.how_to_go_on}"
    )


if __name__ == "__main__":
    from nucleus.cli.main import cli

    general = list(takewhile(lambda argument: argument.startswith("--"), sys.argv[1:]))
    cli([*general, "train", *sys.argv[1 + len(general) :]], prog_name="nucleus")
