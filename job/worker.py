"""What TensorFlow may use of a machine: no more than Ray has given this process."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.train.backend import Backend, BackendConfig

import job
import nucleus
from nucleus.lazy import tf
from nucleus.runs.plan import RUNS, WANDB_FOLDER, RunFolder, RunPlan
from nucleus.storage.files import check_sums
from nucleus.versions import installed_versions

if TYPE_CHECKING:
    from nucleus.tracking.wandb_run import Tracker

__all__ = ["MultiWorkerConfig", "limit_devices", "train_worker"]


def limit_devices(cpus: int, gpus: int) -> None:
    """Let TensorFlow use so many cores, and GPUs (0 or 1: the one that Ray has left visible). Before its first use."""

    tf.config.threading.set_intra_op_parallelism_threads(cpus)
    tf.config.threading.set_inter_op_parallelism_threads(2)  # one would deadlock with the collectives
    if not gpus:  # Ray 2.60 leaves all GPUs visible to a worker that asked for none
        tf.config.set_visible_devices([], "GPU")
    for device in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, enable=True)


def train_worker(config: dict[str, Any]) -> None:
    """Train as one of the workers of `config["plan"]`; tell `config["events"]`, and hear `config["stop"]`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    plan = RunPlan.model_validate_json(config["plan"])
    _tell_that_it_began(config["events"])
    limit_devices(plan.recipe.cpus_per_worker, plan.recipe.gpus_per_worker)
    _reach_workers_directly()

    workers = nucleus.training.Workers()
    cache_dir = Path(plan.recipe.cache_dir) if plan.recipe.cache_dir else nucleus.data.default_cache_dir()
    weights = plan.encoder_weights
    given = nucleus.training.TrainingInput(
        dataset=nucleus.data.open_dataset(nucleus.data.locate_dataset(plan.dataset)),
        cache=nucleus.data.ShardCache(cache_dir, plan.recipe.cache_limit_gib),
        encoder_weights=nucleus.registry.fetch_weights(weights, cache_dir) if weights else None,
    )
    tracker = _tracker(plan, cache_dir, first=workers.rank == 0)
    elastic = plan.recipe.workers.elastic
    demands = job.Demands(config["stop"], plan.recipe.resize_interval if elastic else None, first=workers.rank == 0)
    local = _usable(Path(plan.folder), cache_dir / RUNS) / plan.run
    reporter = job.RayReporter(plan, tracker, demands, config["events"] if workers.rank == 0 else None, local)
    try:
        with _checkpoint() as folder:
            finished = nucleus.training.train(plan.recipe, given, workers, reporter, folder)
        if finished is None:
            tracker.abort()
    except BaseException:
        with suppress(Exception):  # or it would hide why
            tracker.abort()
            _keep_offline_files(plan, tracker)
        raise
    finally:
        reporter.close()
    _keep_offline_files(plan, tracker)


def _tell_that_it_began(events: Any) -> None:
    import ray.train

    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        events.put(("stage", (f"Workers that have started: {context.get_world_size()}",)))


@contextmanager
def _checkpoint() -> Iterator[Path | None]:
    """The checkpoint to go on from, if there is one. Raises `IntegrityError` if it is damaged."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="nucleus-checkpoint-") as folder:
        checkpoint.to_directory(folder)  # `as_directory` is one folder for all workers of a machine, written by each
        check_sums(Path(folder), f"s3://{checkpoint.path}")
        yield Path(folder)


def _reach_workers_directly() -> None:
    """Keep TensorFlow's collectives, which are gRPC, from going over an `http_proxy` of this machine."""
    addresses = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"]
    hosts = ",".join(address.rpartition(":")[0] for address in addresses)
    os.environ["no_grpc_proxy"] = hosts  # noqa: SIM112  gRPC knows it in lower case only


def _tracker(plan: RunPlan, cache_dir: Path, *, first: bool) -> Tracker:

    if not first:
        return nucleus.tracking.NoTracker()
    config = {
        **plan.recipe.model_dump(mode="json"),
        "dataset_version": plan.dataset,
        "run": plan.run,
        "commit": plan.commit,
        "versions": installed_versions(),
    }
    folder = _usable(Path(plan.wandb_dir), cache_dir)
    return nucleus.tracking.make_tracker(
        plan.run, plan.recipe.tracking, plan.wandb_mode, folder, config, plan.group, plan.commit
    )


def _usable(folder: Path, otherwise: Path) -> Path:
    """A folder of the driver's machine, if it is there on this one too; it need not be."""
    return folder if folder.is_dir() and os.access(folder, os.W_OK) else otherwise


def _keep_offline_files(plan: RunPlan, tracker: Tracker) -> None:
    """Put what W&B has not been sent beside the run: this machine, or a job's folder on it, may be gone tomorrow."""

    bucket = nucleus.storage.Bucket(nucleus.storage.parse_uri(plan.bucket))
    nucleus.tracking.keep_files(RunFolder(bucket, plan.run).below(WANDB_FOLDER), tracker.kept_files)


@dataclass
class MultiWorkerConfig(BackendConfig):
    """Workers of `tf.distribute.MultiWorkerMirroredStrategy`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _MultiWorkerBackend


class _MultiWorkerBackend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002
        """Set TF_CONFIG on every worker (https://www.tensorflow.org/guide/distributed_training#tf_config)."""
        import ray

        addresses = worker_group.execute(job.free_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, _set_tf_config, addresses=addresses, index=rank)
                for rank in range(len(worker_group))
            ]
        )


def _set_tf_config(addresses: list[str], index: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
