"""A run's workers on Ray Train, from the first step to the model in the run's last checkpoint."""

import os
from dataclasses import dataclass

from job.causes import our_error
from job.cluster import rooms
from job.demands import stop_request, stops_on_sigterm
from job.events import Listener, forwarded
from job.options import RunOptions
from job.placement import missing, needed
from job.plan import RunPlan
from job.storage import run_storage
from job.worker import train_worker
from nucleus.errors import JobError, NucleusError, RunStoppedError
from nucleus.storage.retries import storage_timeout
from nucleus.storage.uri import parse_uri

__all__ = ["Fitted", "fit"]

_CHECKPOINTS_KEPT = 2
_START_TIMEOUT, _ELASTIC_START_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10"
_STALL_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
_METRICS = "metrics"
"""What only a run that has finished reports."""


@dataclass(frozen=True)
class Fitted:
    """What a finished run left.

    Attributes:
        metrics: By split, kind of image and name.
        wandb_run: Its W&B run.
        checkpoint: `bucket/key` of its last checkpoint, which holds the model.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    wandb_run: str | None
    checkpoint: str


def fit(plan: RunPlan, options: RunOptions, listener: Listener) -> Fitted:
    """Run the workers of a plan on the cluster that this process is connected to.

    Raises:
        RunStoppedError: The run was asked to stop, and can go on.
        NucleusError: What a worker raised.
        JobError: Ray failed.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from job.backend import MultiWorkerConfig

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
    if _METRICS not in result.metrics:
        raise RunStoppedError(f"The run {plan.run} was asked to stop and saved a checkpoint. {plan.how_to_go_on}")
    return Fitted(result.metrics[_METRICS], result.metrics["wandb_run"], result.checkpoint.path)


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
