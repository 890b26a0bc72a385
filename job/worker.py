"""The loop on each Ray Train worker: one process, one replica."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.devices import limit_devices
from job.plan import RunPlan
from nucleus.storage.sums import check_sums, write_sums

if TYPE_CHECKING:
    from job.demands import Demands
    from nucleus.tracking.weights_and_biases import Tracker
    from nucleus.training.run import Finished
    from nucleus.training.state import History

__all__ = ["FINAL_FOLDER", "train_worker"]

FINAL_FOLDER = "model"
"""Folder of the last checkpoint that holds the model as it is published."""

_PREVIEW_SIDE = 256


def train_worker(config: dict[str, Any]) -> None:
    """Train as one of the workers of `config["plan"]`; tell `config["events"]`, and hear `config["stop"]`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    plan = RunPlan.model_validate_json(config["plan"])
    _tell_that_it_began(config["events"])
    limit_devices(plan.recipe.cpus_per_worker, plan.recipe.gpus_per_worker)
    _reach_workers_directly()

    from job.demands import Demands
    from nucleus.data.cache import ShardCache, default_cache_dir
    from nucleus.data.datasets import locate_dataset, open_dataset
    from nucleus.registry.encoder_weights import fetch_weights
    from nucleus.training.distributed import Workers
    from nucleus.training.run import TrainingInput, train

    workers = Workers()
    cache_dir = Path(plan.recipe.cache_dir) if plan.recipe.cache_dir else default_cache_dir()
    weights = plan.encoder_weights
    given = TrainingInput(
        dataset=open_dataset(locate_dataset(plan.dataset)),
        cache=ShardCache(cache_dir, plan.recipe.cache_limit_gib),
        encoder_weights=fetch_weights(weights, cache_dir) if weights else None,
    )
    tracker = _tracker(plan, cache_dir, first=workers.rank == 0)
    elastic = plan.recipe.workers.elastic
    demands = Demands(config["stop"], plan.recipe.resize_interval if elastic else None, first=workers.rank == 0)
    reporter = _RayReporter(plan, tracker, demands, config["events"] if workers.rank == 0 else None)
    try:
        with _checkpoint() as folder:
            finished = train(plan.recipe, given, workers, reporter, folder)
        if finished is None:
            tracker.abort()
    except BaseException:
        with suppress(Exception):  # or it would hide why
            tracker.abort()
            _keep_offline_files(plan, tracker)
        raise
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


def _tracker(plan: RunPlan, cache_dir: Path, *, first: bool) -> "Tracker":
    from nucleus.tracking.weights_and_biases import NoTracker, make_tracker

    if not first:
        return NoTracker()
    config = {**plan.recipe.model_dump(mode="json"), "dataset_version": plan.dataset, "run": plan.run}
    folder = Path(plan.wandb_dir)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):  # the driver's folder need not exist on this machine
        folder = cache_dir
    return make_tracker(plan.run, plan.recipe.tracking, plan.wandb_mode, folder, config, plan.group)


def _keep_offline_files(plan: RunPlan, tracker: "Tracker") -> None:
    """Put what W&B has not been sent beside the run: this machine, or a job's folder on it, may be gone tomorrow."""
    from nucleus.storage.bucket import Bucket
    from nucleus.storage.uri import parse_uri

    bucket = Bucket(parse_uri(plan.bucket))
    for file in tracker.offline_files:
        bucket.put(f"runs/{plan.run}/wandb/{file.parent.name}/{file.name}", file)


class _RayReporter:
    """A `nucleus.training.run.Reporter`.

    Checkpoints go to Ray Train (a barrier on all ranks), metrics to the tracker and the driver (first rank alone).
    """

    def __init__(self, plan: RunPlan, tracker: "Tracker", demands: "Demands", events: Any | None) -> None:
        self._epochs = plan.recipe.optimizer.epochs
        self._tracker = tracker
        self._demands = demands
        self.attention = demands.attention
        self.demand = demands.demand
        self._events = events

    def stage(self, text: str) -> None:
        self._send("stage", text)

    def steps(self, epoch: int, done: int, total: int, loss: float, images_per_second: float) -> None:
        self._send("steps", epoch, self._epochs, done, total, loss, images_per_second)

    def resumed(self, history: "History", where: str) -> None:
        for metrics in history:  # those that another machine tracked, which is gone, with what it had not sent
            self._tracker.log(metrics)
        self.stage(f"Going on after {where}")

    def epoch(self, metrics: dict[str, float]) -> None:
        self._tracker.log(metrics)
        self._send("epoch", metrics)

    def checkpoint(self, history: "History", save: Callable[[Path], None]) -> None:
        self._report(history, history[-1] if history else {}, save)

    def finished(self, finished: "Finished", save: Callable[[Path], None]) -> None:
        """Keep the model as it is to be published, in the last checkpoint of the run."""

        def save_all(folder: Path) -> None:
            save(folder)
            _save_model(folder / FINAL_FOLDER, finished)

        overall = {split: scores["all"] for split, scores in finished.metrics.items()}
        self._tracker.finish({f"{split}_{k}": v for split, scores in overall.items() for k, v in scores.items()})
        told = {"wandb_run": self._tracker.run_path, "metrics": finished.metrics}
        self._report(finished.progress.history, told, save_all)

    def _report(self, history: "History", metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        import ray.train

        self._demands.saved()
        if self._events is None:
            ray.train.report(metrics)
            return
        folder = tempfile.mkdtemp(prefix="nucleus-checkpoint-")
        save(Path(folder))
        write_sums(Path(folder))
        ray.train.report(  # Ray uploads while training goes on, in order, and removes the folder then
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=_uploader(list(history)),
        )

    def _send(self, method: str, *arguments: Any) -> None:
        if self._events is not None:
            self._events.put((method, arguments))


def _uploader(history: "History") -> Callable[[Any, str], Any]:
    """Upload a checkpoint into the run's folder, each file by one request of our own client, and the events beside it.

    Ray's own way, `pyarrow.fs.copy_files`, took 2.2 s of the embedded server's time for 21 MB; this takes 0.15 s.
    """
    import ray.train

    from nucleus.storage.bucket import Bucket
    from nucleus.storage.uri import parse_uri
    from nucleus.tracking.tensorboard import EVENTS_FILE, events_of

    storage = ray.train.get_context().get_storage()
    bucket = Bucket(parse_uri(f"s3://{storage.experiment_fs_path}"))

    def upload(checkpoint: Any, name: str) -> Any:
        folder = Path(checkpoint.path)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            bucket.put(f"{name}/{path.relative_to(folder).as_posix()}", path)
        bucket.put(EVENTS_FILE, events_of(history))
        return ray.train.Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)

    return upload


def _save_model(folder: Path, finished: "Finished") -> None:
    """Write a model's files."""
    from nucleus.data.images import encode_png
    from nucleus.model.files import CONFIG_FILE, WEIGHTS_FILE

    folder.mkdir()
    finished.model.save_weights(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(finished.config.model_dump_json(indent=1))
    (folder / "metrics.json").write_text(
        json.dumps({"metrics": finished.metrics, "history": finished.progress.history}, indent=1)
    )
    (folder / "preview.png").write_bytes(encode_png(_preview(finished)))


def _preview(finished: "Finished") -> Any:
    """Image, truth and prediction side by side for a few images of the test split."""
    from nucleus.model.heads import maps_of
    from nucleus.model.instances import label_nuclei
    from nucleus.model.tiling import TiledNetwork
    from nucleus.predict.overlay import CYAN, contact_sheet, draw_outlines

    config = finished.config
    network = TiledNetwork(finished.model, config)
    rows = []
    for example in finished.examples:
        labels = label_nuclei(maps_of(network(example.image), config.heads), config.instances)
        rows.append(
            [
                example.image,
                draw_outlines(example.image, example.labels, CYAN),
                draw_outlines(example.image, labels),
            ]
        )
    return contact_sheet(rows, _PREVIEW_SIDE)
