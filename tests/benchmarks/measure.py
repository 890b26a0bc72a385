"""What the benchmarks share: sides measured in turn, one JSON line, a bucket, datasets and batches of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.data.dataset import Dataset
from nucleus.data.synthetic import generated_image, write_generated
from nucleus.lazy import tf
from nucleus.storage import local_server as server
from nucleus.storage.uri import parse_uri

__all__ = [
    "EARLIER",
    "RECIPE",
    "batches_in_memory",
    "earlier_checkout",
    "generated_crops",
    "generated_dataset",
    "in_turn",
    "report",
    "seconds",
    "temporary_store",
]

EARLIER = "8eae0ed"
"""The commit with which some benchmarks compare."""
_CHECKOUT = "NUCLEUS_BENCH_EARLIER"
"""Variable that names a checkout of `EARLIER`; without it one is made of this repository."""
_ROOT = Path(__file__).resolve().parents[2]

# As job/recipes/dsb2018-cpu.toml, without its pretrained weights: speed does not depend on their values.
RECIPE: dict[str, Any] = {
    "model": "bench",
    "dataset": "bench",
    "input": {"crop": 192, "batch_size": 8},
    "tracking": {"wandb": "disabled"},
}
TARGETS = {
    "step_rate": ">= 2.5",
    "scaling": ">= 1.8",
    "ingest_tfdata": ">= 0.95",
    "ingest_raydata": ">= 10",
    "ingest_cost": ">= 8",
    "download_large": ">= 0.8",
    "download_small": ">= 0.8",
    "checkpoint_overlap": "<= 1.03",
    "memory_growth": "<= 1.1",
    "startup": "<= 1.3",
    "submit_start": "<= 1.3",
    "help": "<= 1.5",
    "cost_per_image": "<= 1.1",
    "grouping": "<= 30",
    "manifest_open": "<= 1",
    "runs_list": "<= 1",
    "predict_rate": "<= 1.33",
    "large_image": "<= 1.5",
    "zarr_rate": ">= 0.9",
    "small_images": "<= 1",
    "serve_load": ">= 0.9",
}


def report(bench: str, ratio: float, **more: Any) -> None:
    """Print a benchmark's one line."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in more.items()}
    line = {"bench": bench, "ratio": round(ratio, 3), "target": TARGETS.get(bench), **rounded}
    print(json.dumps(line), flush=True)


def seconds(work: Callable[[], Any]) -> float:
    """How long some work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turn(sides: dict[str, Callable[[], Any]], rounds: int, *, warm_up: bool = False) -> dict[str, float]:
    """Run every side once a round, the first side first in every other round; return the median seconds of each.

    With `warm_up`, each side runs once before, untimed.
    """
    for side in sides.values() if warm_up else ():
        side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in names:
            found[name].append(seconds(sides[name]))
    return {name: statistics.median(values) for name, values in found.items()}


@contextmanager
def earlier_checkout() -> Iterator[Path | None]:
    """A checkout of the earlier commit; None where there is no such commit."""
    if _CHECKOUT in os.environ:
        yield Path(os.environ[_CHECKOUT])
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "earlier"
        git = ["git", "-C", str(_ROOT), "worktree"]
        made = subprocess.run([*git, "add", "--detach", str(place), EARLIER], capture_output=True, check=False)
        try:
            yield None if made.returncode else place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], capture_output=True, check=False)


@contextmanager
def temporary_store() -> Iterator[Path]:
    """An embedded S3 server, reached through the SDK's variables, for the time of the block; gives an empty folder."""
    with tempfile.TemporaryDirectory(prefix="nucleus-bench-") as folder:
        root = Path(folder)
        running = server.start(root / "store", 0)
        server.make_bucket(running)
        os.environ.update(server.environment(running))
        try:
            yield root
        finally:
            server.stop(root / "store")


def generated_crops(count: int, side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """That many generated images, N x side x side x 3, and their labels, N x side x side."""
    images, labels = zip(*(generated_image(seed, side, side) for seed in range(count)), strict=True)
    return np.stack(images), np.stack(labels)


def batches_in_memory(arrays: tuple[NDArray[Any], ...], batch: int) -> tf.data.Dataset:
    """Whole batches of the rows of some arrays, for ever."""
    options = tf.data.Options()
    options.autotune.enabled = False
    data = tf.data.Dataset.from_tensor_slices(arrays).repeat().batch(batch, drop_remainder=True)
    return data.with_options(options)


def generated_dataset(root: Path, count: int, side: int = 256) -> Dataset:
    """Import that many generated images as the dataset `bench`."""
    from nucleus.data.importing import SplitOptions, import_dataset

    folder = root / f"generated-{count}"
    write_generated(folder, count, side=side)
    return import_dataset(folder, parse_uri("s3://nucleus/datasets/bench"), SplitOptions()).dataset
