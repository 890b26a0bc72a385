"""`memory_growth`: a worker's peak memory with ten times the data. `cost_per_image`: the same with a hundred times."""

import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.benchmarks.measure import RECIPE, generated_dataset, report, temporary_store

_SIDE = 96


def memory_growth() -> None:
    """An epoch over 300 and over 3,000 generated images, each in a process of its own."""
    with temporary_store() as root:
        peaks = {}
        for count in (300, 3000):
            dataset = generated_dataset(root, count, _SIDE)
            peaks[count] = _child("epoch", root, str(dataset))["peak_mib"]
    report("memory_growth", peaks[3000] / peaks[300], mib_300_images=peaks[300], mib_3000_images=peaks[3000])


def cost_per_image() -> None:
    """Milliseconds an image: import and epoch at 500 and 5,000 images; batches alone at 500, 5,000 and 50,000."""
    ingest, epoch, imported = {}, {}, {}
    with temporary_store() as root:
        for count in (500, 5000):
            folder = root / f"generated-{count}"
            from nucleus.data.synthetic import write_generated

            write_generated(folder, count, side=_SIDE)
            found = _child("import", root, str(folder))
            imported[count] = found["ms"]
            epoch[count] = _child("epoch", root, found["dataset"])["ms"]
        for count in (500, 5000, 50_000):
            _write_shards(root / f"shards-{count}", count)
        for count in (500, 5000, 50_000):
            ingest[count] = _child("ingest", root, str(root / f"shards-{count}"))["ms"]
    report(
        "cost_per_image",
        ingest[50_000] / ingest[500],
        ratio_import=imported[5000] / imported[500],
        ratio_epoch=epoch[5000] / epoch[500],
        ms_ingest=list(ingest.values()),
        ms_epoch=list(epoch.values()),
        ms_import=list(imported.values()),
    )


def _child(mode: str, root: Path, what: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.growth", mode, str(root), what],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _write_shards(folder: Path, count: int) -> None:
    """24 shards of that many generated images, each another one."""
    folder.mkdir()
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write_shard, *zip(*((folder, number, count) for number in range(24)), strict=True)))


def _write_shard(folder: Path, number: int, count: int) -> None:
    from nucleus.data.shards import encode_record, write_shard
    from nucleus.data.synthetic import generated_image

    records = (encode_record(str(i), *generated_image(i, _SIDE, _SIDE)) for i in range(number, count, 24))
    write_shard(folder / f"train-{number:05d}-of-00024.tfrecord", records)


def _import(root: Path, folder: str) -> dict[str, object]:  # noqa: ARG001
    import tensorflow  # noqa: F401  not part of the cost of an image

    from nucleus.data.importing import SplitOptions, import_dataset
    from nucleus.storage.uri import parse_uri

    started = time.perf_counter()
    dataset = import_dataset(Path(folder), parse_uri("s3://nucleus/datasets/bench"), SplitOptions()).dataset
    taken = time.perf_counter() - started
    return {"ms": 1e3 * taken / len(dataset.manifest.samples), "dataset": str(dataset)}


def _epoch(root: Path, dataset: str) -> dict[str, object]:
    """The first epoch of a run without its first steps, which compile."""
    from nucleus.config.settings import parse_recipe
    from nucleus.data.cache import ShardCache
    from nucleus.data.dataset import locate_dataset, open_dataset
    from nucleus.training.callbacks import Callback, Signals
    from nucleus.training.distributed import Workers
    from nucleus.training.trainer import TrainingInput, TrainingRun

    network = {"weights": "none", "freeze_encoder": False, "decoder_channels": [8, 8, 8, 8, 8]}
    sizes = {"crop": 32, "batch_size": 8, "tile": 64, "overlap": 0}
    recipe = parse_recipe({**RECIPE, "network": network, "input": sizes}, "bench")
    cache = ShardCache(root / f"cache-{os.getpid()}")
    given = TrainingInput(open_dataset(locate_dataset(dataset)), cache, None)
    run = TrainingRun(recipe, given, Workers(), Callback(), Signals(), root / f"best-{os.getpid()}.weights.h5")
    batches, step = run.batches(0, 0), run.step(0)
    step.run(batches, 8)
    steps = run.steps_per_epoch - 8
    started = time.perf_counter()
    for _ in range(steps // 8):
        step.run(batches, 8)
    taken = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ms": 1e3 * taken / (steps // 8 * 64), "peak_mib": peak}


def _ingest(root: Path, folder: str) -> dict[str, object]:  # noqa: ARG001
    """One epoch of batches, after a second of warming up."""
    from functools import partial
    from itertools import islice

    from nucleus.config.recipe import AugmentOptions, NormalizationOptions
    from nucleus.data.pipeline import Feed, training_batches
    from nucleus.data.reader import SplitReader
    from nucleus.data.sampling import epoch_plan
    from nucleus.data.shards import ShardFile
    from nucleus.model.losses import pixel_targets

    paths = sorted(Path(folder).iterdir())
    files = [ShardFile.open(path) for path in paths]
    counts = [len(file) for file in files]
    reader = SplitReader(
        lambda number: files[number],
        lambda epoch: epoch_plan(counts, seed=0, epoch=epoch, rank=0, world=1, global_batch=8),
    )
    feed = Feed(
        reader=reader,
        targets=partial(pixel_targets, heads="both"),
        crop=64,
        normalization=NormalizationOptions(),
        batch=8,
        augment=AugmentOptions(),
        seed=0,
        threads=2,
    )
    batches = iter(training_batches(feed, range(100)))
    wanted = max(sum(counts) // 8, 400)
    for _ in islice(batches, 40):
        pass
    started = time.perf_counter()
    for _ in islice(batches, wanted):
        pass
    return {"ms": 1e3 * (time.perf_counter() - started) / (8 * wanted)}


if __name__ == "__main__":
    mode, top, argument = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    print(json.dumps({"import": _import, "epoch": _epoch, "ingest": _ingest}[mode](top, argument)), flush=True)
