"""The worker of a training run: limits of its process, its input and callbacks, and the call of the trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

import job
import nucleus
from nucleus.lazy import tf
from nucleus.runs.plan import RUNS, RunPlan
from nucleus.storage.files import check_sums, disk_errors, temporary_folder

__all__ = ["MultiWorkerConfig", "limit_devices", "train_worker"]


def limit_devices(cpus: int, gpus: int) -> None:
    """Limit TensorFlow to the CPUs and GPUs of this process; must be called before TensorFlow's first operation.

    With a GPU, threads of its own start the GPU's work, so that the threads of the input do not delay it
    (https://www.tensorflow.org/guide/gpu_performance_analysis), unless TF_GPU_THREAD_MODE says otherwise.

    Args:
        cpus: Number of CPU cores.
        gpus: 0, or 1 for the GPU that Ray has left visible.
    """
    tf.config.threading.set_intra_op_parallelism_threads(cpus)
    tf.config.threading.set_inter_op_parallelism_threads(2)  # a single thread would deadlock with the collectives
    if not gpus:  # Ray 2.60 leaves all GPUs visible to a worker without GPUs
        tf.config.set_visible_devices([], "GPU")
    else:
        os.environ.setdefault("TF_GPU_THREAD_MODE", "gpu_private")
    for device in tf.config.get_visible_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, enable=True)


@disk_errors()
def train_worker(config: dict[str, Any]) -> None:
    """Train as one of the workers of a run.

    Args:
        config: `plan`, the `RunPlan` as JSON; `events`, the queue to the driver; `stop`, the driver's stop request.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    plan = RunPlan.model_validate_json(config["plan"])
    _announce_start(config["events"])
    limit_devices(plan.recipe.cpus_per_worker, plan.recipe.gpus_per_worker)
    _bypass_proxy()

    workers = nucleus.training.Workers()
    cache_dir, weights = plan.cache_dir, plan.encoder_weights
    given = nucleus.training.TrainingInput(
        dataset=nucleus.data.open_dataset(nucleus.data.locate_dataset(plan.dataset)),
        cache=nucleus.data.ShardCache(cache_dir, plan.recipe.cache_limit_gib),
        encoder_weights=nucleus.registry.fetch_weights(weights, cache_dir) if weights else None,
        start=_start(plan),
        mix=tuple(
            nucleus.training.MixedDataset(nucleus.data.open_dataset(nucleus.data.locate_dataset(name)), share)
            for name, share in plan.mix.items()
        ),
    )
    first = workers.rank == 0
    local = _writable(Path(plan.folder), cache_dir / RUNS) / plan.run
    wandb_dir = _writable(Path(plan.wandb_dir), cache_dir)
    callback = job.worker_callbacks(plan, config["events"] if first else None, local, wandb_dir)
    save_every = plan.recipe.resize_interval if plan.recipe.workers.elastic else None
    signals = job.RunSignals(config["stop"], save_every, first=first)
    try:
        with _checkpoint() as folder:
            nucleus.training.train(plan.recipe, given, workers, callback, signals, folder)
    except BaseException:
        with suppress(Exception):  # a second error would hide the first
            callback.on_close(failed=True)
        raise
    callback.on_close(failed=False)


def _start(plan: RunPlan) -> Path | None:
    """Return the folder of the version that training starts with, downloaded if need be; None without one."""
    if plan.start is None or plan.start_uri is None:
        return None
    return nucleus.registry.fetch_start(nucleus.storage.parse_uri(plan.start_uri), plan.start, plan.cache_dir).folder


def _announce_start(events: Any) -> None:
    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        job.EventCallback(events).on_stage(f"Workers started: {context.get_world_size()}")


@contextmanager
def _checkpoint() -> Iterator[Path | None]:
    """Yield a folder with the checkpoint to resume from, or None. Raises `IntegrityError` if it is damaged."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with temporary_folder("checkpoint") as folder:
        checkpoint.to_directory(str(folder))  # `as_directory` would be one folder that all workers of a machine write
        check_sums(folder, f"s3://{checkpoint.path}")
        yield folder


def _bypass_proxy() -> None:
    """Exempt TensorFlow's collectives, which use gRPC, from an `http_proxy` of this machine."""
    addresses = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"]
    hosts = ",".join(address.rpartition(":")[0] for address in addresses)
    os.environ["no_grpc_proxy"] = hosts  # noqa: SIM112  gRPC reads the lower-case name only


def _writable(folder: Path, otherwise: Path) -> Path:
    """Return the driver's folder if it exists and is writable on this machine too, else the other folder."""
    return folder if folder.is_dir() and os.access(folder, os.W_OK) else otherwise


@dataclass
class MultiWorkerConfig(BackendConfig):
    """Ray Train's backend for workers that use `tf.distribute.MultiWorkerMirroredStrategy`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _MultiWorkerBackend


class _MultiWorkerBackend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002
        """Set TF_CONFIG on every worker (https://www.tensorflow.org/guide/distributed_training#tf_config)."""
        addresses = worker_group.execute(job.free_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, _set_tf_config, addresses=addresses, index=rank)
                for rank in range(len(worker_group))
            ]
        )


def _set_tf_config(addresses: list[str], index: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
