"""`ingest_cost`: CPU time of a crop from warm shards, against an earlier commit and a copy of the crop's bytes.

Run as a file by each side in a process of its own, with that side's `nucleus` first on the path.
"""

import json
import os
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ZIP = ROOT.parent / "shared" / "data" / "dsb2018" / "stage1_train.zip"
CROPS = (192, 256)
_IMAGES = 80
_BATCH, _SEED = 8, 1
_ROUNDS, _EPOCHS = 2, 3
# What `job/recipes/nuclei.toml` changes; the earlier commit has not all of it, and does less.
FULL = {
    "scale": 0.8,
    "invert": 0.15,
    "grey": 0.3,
    "contrast": 0.5,
    "brightness": 0.1,
    "gamma": 0.4,
    "stain": 0.2,
    "hed": 0.2,
    "shading": 0.2,
    "blur": 0.25,
    "blur_sigma": 2.0,
    "noise": 0.04,
}


def ingest_cost() -> None:
    """CPU milliseconds a crop, everything included: reading, decoding, augmentation, batches."""
    from tests.benchmarks.measure import EARLIER, earlier_checkout, report, temporary_store

    with temporary_store() as root, earlier_checkout() as checkout:
        uri = _imported(root)
        sides = {"ours": ROOT, "ours_with_targets": ROOT, **({"earlier": checkout} if checkout else {})}
        rounds = [{mode: _child(path, mode, root, uri) for mode, path in sides.items()} for _ in range(_ROUNDS)]
    best = {
        f"{mode}_{side}": min(found[mode][place] for found in rounds)
        for mode in sides
        for place, side in enumerate(CROPS)
    }
    more: dict[str, Any] = {"ms_memcpy_192": _copy(CROPS[0]), "images": "DSB2018" if ZIP.exists() else "generated"}
    if not checkout:
        more["left_out"] = f"{EARLIER}: no checkout of it"
    ratio = best.get("earlier_192", float("nan")) / best["ours_192"]
    report("ingest_cost", ratio, **{f"ms_{name}": value for name, value in best.items()}, **more)


def _copy(side: int) -> float:
    """Milliseconds to copy the bytes of a crop."""
    data, times = bytearray(side * side * 3), 2000
    started = time.process_time()
    for _ in range(times):
        bytes(data)
    return 1e3 * (time.process_time() - started) / times


def _imported(root: Path) -> str:
    """Import a part of DSB2018, or generated images where it is missing."""
    from nucleus.data.importing import SplitOptions, import_dataset
    from nucleus.storage.uri import parse_uri
    from tests.benchmarks.measure import generated_dataset

    if not ZIP.exists():
        return str(generated_dataset(root, _IMAGES))
    folder = part_of_dsb2018(root / "images", _IMAGES)
    return str(import_dataset(folder, parse_uri("s3://nucleus/datasets/bench"), SplitOptions()).dataset)


def part_of_dsb2018(folder: Path, count: int) -> Path:
    """Write that many images of DSB2018 with their masks, drawn at random, into a folder; return it."""
    with zipfile.ZipFile(ZIP) as archive:
        names = archive.namelist()
        images = sorted({name.split("/images/")[0] for name in names if "/images/" in name})
        chosen = tuple(f"{image}/" for image in random.Random(_SEED).sample(images, count))
        archive.extractall(folder, [name for name in names if name.startswith(chosen)])
    return folder


def _child(checkout: Path, mode: str, root: Path, dataset: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, __file__, mode, str(root), dataset],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    return list(json.loads(done.stdout.splitlines()[-1]))


def _drain(feed: Any, images: int) -> float:
    """CPU milliseconds a crop of some epochs, after an epoch that is not measured."""
    from nucleus.data.pipeline import training_batches

    steps = images // _BATCH
    batches = iter(training_batches(feed, range(_EPOCHS + 2)))
    for _ in islice(batches, steps):
        pass
    started = time.process_time()
    for _ in islice(batches, _EPOCHS * steps):
        pass
    return 1e3 * (time.process_time() - started) / (_EPOCHS * steps * _BATCH)


def _options() -> dict[str, Any]:
    from nucleus.config.recipe import AugmentOptions, NormalizationOptions

    known = {name: value for name, value in FULL.items() if name in AugmentOptions.model_fields}
    shared = {"normalization": NormalizationOptions(), "augment": AugmentOptions(**known)}
    return {**shared, "batch": _BATCH, "seed": _SEED, "threads": 1}


def _plan(counts: list[int]) -> Callable[[int], Any]:
    from nucleus.data.sampling import epoch_plan

    return lambda epoch: epoch_plan(counts, seed=_SEED, epoch=epoch, rank=0, world=1, global_batch=_BATCH)


def _ours(root: Path, uri: str, side: int, *, targets: bool) -> float:
    from functools import partial

    import numpy as np

    from nucleus.data.cache import ShardCache
    from nucleus.data.dataset import locate_dataset, open_dataset
    from nucleus.data.pipeline import Feed
    from nucleus.data.reader import cached_splits
    from nucleus.model.losses import pixel_targets

    dataset = open_dataset(locate_dataset(uri))
    counts = [shard.records for shard in dataset.manifest.split_shards("train")]
    reader = cached_splits([dataset], "train", ShardCache(root / "cache"), _plan(counts), decoded=True)
    none = np.zeros((side, side, 1), np.float32)
    made = partial(pixel_targets, heads="both") if targets else lambda labels: none[: len(labels)]
    return _drain(Feed(reader=reader, targets=made, crop=side, **_options()), sum(counts))


def _earlier_side(root: Path, side: int) -> float:
    from nucleus.data.reading import SplitReader  # type: ignore[import-not-found]

    from nucleus.data.pipeline import Feed
    from nucleus.data.shards import ShardFile

    files = [ShardFile.open(path) for path in sorted((root / "cache").rglob("train-*.tfrecord"))]
    counts = [len(file) for file in files]
    reader = SplitReader(lambda number: files[number], _plan(counts))
    return _drain(Feed(reader=reader, crop=side, **_options()), sum(counts))


def _main(mode: str, root: Path, uri: str) -> None:
    if mode == "earlier":
        found = [_earlier_side(root, side) for side in CROPS]
    else:
        found = [_ours(root, uri, side, targets=mode == "ours_with_targets") for side in CROPS]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
