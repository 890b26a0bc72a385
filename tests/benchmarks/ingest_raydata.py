"""`ingest_raydata`: batches of our shards against Ray Data's `iter_tf_batches`, both in two Ray Train workers."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import generated_dataset, report, temporary_store

_EPOCHS = 4
_WARM_UP = 40  # batches of a worker that are not timed: the first epoch


def ingest_raydata() -> None:
    """Images a second over epochs; Ray Data as its guide shows: read, map, `get_dataset_shard`, `iter_tf_batches`."""
    import ray

    with temporary_store() as root:
        dataset = generated_dataset(root, 400)
        folder = _as_parquet(root)
        ray.init(address="local", num_cpus=4, log_to_driver=False, logging_level="error")
        try:
            rates = {}
            for side, data in (
                ("ours", None),
                ("theirs", ray.data.read_parquet(str(folder)).map(_decode)),
            ):
                config = {"dataset": str(dataset), "cache": str(root / "cache"), "out": str(root / f"{side}.json")}
                images, seconds = _fit(side, data, config)
                rates[side] = images / seconds
        finally:
            ray.shutdown()
    report(
        "ingest_raydata",
        rates["ours"] / rates["theirs"],
        ours_images_s=rates["ours"],
        ray_data_images_s=rates["theirs"],
        epochs=_EPOCHS - 1,
    )


def _fit(side: str, data: Any, config: dict[str, str]) -> tuple[int, float]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    with tempfile.TemporaryDirectory() as storage:
        TensorflowTrainer(
            _ours if side == "ours" else _theirs,
            train_loop_config=config,
            datasets={} if data is None else {"train": data},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=storage),
        ).fit()
    metrics = json.loads(Path(config["out"]).read_text())
    return metrics["images"], metrics["seconds"]


def _ours(config: dict[str, str]) -> None:
    import ray.train

    from nucleus.data.cache import ShardCache
    from nucleus.data.dataset import locate_dataset, open_dataset
    from nucleus.data.pipeline import training_batches
    from tests.benchmarks.ingest import feed

    context = ray.train.get_context()
    dataset = open_dataset(locate_dataset(config["dataset"]))
    mine = feed(dataset, ShardCache(Path(config["cache"])), 1, context.get_world_rank(), context.get_world_size())
    batches = training_batches(mine, range(_EPOCHS))
    _count(batches, config["out"])


def _theirs(config: dict[str, str]) -> None:
    import ray.train

    shard = ray.train.get_dataset_shard("train")

    def batches() -> Any:
        for _ in range(_EPOCHS):
            for batch in shard.iter_tf_batches(batch_size=4, drop_last=True):
                yield batch["image"], batch["labels"]

    _count(batches(), config["out"])


def _count(batches: Any, out: str) -> None:
    """Drain; note images and seconds after the first epoch over both workers, which read as many images each."""
    import ray.train

    started, images = time.perf_counter(), 0
    for number, (found, _) in enumerate(batches, start=1):
        images += int(found.shape[0])
        if number == _WARM_UP:
            started, images = time.perf_counter(), 0
    seconds = time.perf_counter() - started
    context = ray.train.get_context()
    if context.get_world_rank() == 0:  # a report without a checkpoint does not reach the driver
        Path(out).write_text(json.dumps({"images": images * context.get_world_size(), "seconds": seconds}))


def _as_parquet(root: Path) -> Path:
    """The same images as Parquet files of PNGs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nucleus.data.images import encode_png
    from nucleus.data.synthetic import generated_image

    folder = root / "parquet"
    folder.mkdir()
    for part in range(8):
        samples = [generated_image(number) for number in range(part, 320, 8)]
        columns = {
            "image": [encode_png(image) for image, _ in samples],
            "labels": [encode_png(labels) for _, labels in samples],
        }
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")
    return folder


def _decode(row: dict[str, Any]) -> dict[str, Any]:
    """Decode, crop at a random place and scale, turn, flip and change colours, as ours does."""
    import cv2
    import numpy as np

    rng = np.random.default_rng()
    image = cv2.imdecode(np.frombuffer(row["image"], np.uint8), cv2.IMREAD_COLOR_RGB)
    labels = cv2.imdecode(np.frombuffer(row["labels"], np.uint8), cv2.IMREAD_UNCHANGED)
    side = min(256, round(192 / 2 ** rng.uniform(-0.3, 0.3)))
    top, left = rng.integers(0, 256 - side + 1, 2)
    window = (slice(top, top + side), slice(left, left + side))
    image = cv2.resize(image[window], (192, 192), interpolation=cv2.INTER_LINEAR)
    labels = cv2.resize(labels[window], (192, 192), interpolation=cv2.INTER_NEAREST)
    turns, flip = int(rng.integers(4)), 1 - 2 * int(rng.integers(2))
    image, labels = (np.rot90(pixels, turns)[:, ::flip] for pixels in (image, labels))
    pixels = image.astype(np.float32)
    if rng.random() < 0.3:
        pixels = np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    if rng.random() < 0.1:
        pixels = 255 - pixels
    mean = pixels.mean()
    pixels = (pixels - mean) * rng.uniform(0.7, 1.3) + mean + 255 * rng.uniform(-0.1, 0.1)
    return {"image": np.clip(np.rint(pixels), 0, 255).astype(np.uint8), "labels": labels.astype(np.int32)}
