"""A million images: `grouping` finds groups by their fingerprints, `manifest_open` opens the manifest of a version."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from nucleus.config.names import Kind
from nucleus.data.dataset import (
    DATASET_FORMAT,
    MANIFEST_FILE,
    DatasetLocation,
    DatasetManifest,
    Shard,
    open_dataset,
)
from nucleus.data.dataset_storage import manifest_document
from nucleus.data.fingerprints import Fingerprint, fingerprint
from nucleus.data.grouping import group_images
from nucleus.data.samples import SPLITS, Samples
from nucleus.data.synthetic import generated_image
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri
from tests.all_pairs import groups_of_all_pairs
from tests.benchmarks.measure import report, temporary_store

_SIDE = 256
_MILLION = 1_000_000
_POOL = 200
_RELATED = 50
"""One image of so many is a copy of an earlier one, has a patch of it, or continues it."""
_PATCHES = 24
_CHUNK = 10_000


def grouping() -> None:
    """Groups of 20,000 generated tiles; then CPU time and memory of 100,000 and 1,000,000 made-up fingerprints."""
    tiles = _child("tiles", 20_000)
    small, large = (_child("made", count) for count in (100_000, _MILLION))
    report(
        "grouping",
        large["cpu_s"] / small["cpu_s"],
        same_groups_at_20000=tiles["same"],
        cpu_s_20000=tiles["cpu_s"],
        cpu_s_20000_all_pairs=tiles["cpu_s_all_pairs"],
        cpu_s=[small["cpu_s"], large["cpu_s"]],
        minutes=large["minutes"],
        groups=large["groups"],
        peak_gib=large["peak_gib"],
    )


def manifest_open() -> None:
    """A version of a million samples, opened by a process of its own that reads what a training worker needs of it."""
    with temporary_store():
        bucket = Bucket(parse_uri("s3://nucleus/datasets/bench"))
        manifest = _manifest(_MILLION)
        document = manifest_document(bucket, manifest)
        bucket.put(f"{manifest.version}/{MANIFEST_FILE}", document)
        found = _child("open", str(bucket.uri), manifest.version)
        found["mib_without"] = _child("nothing")["peak_mib"]
    report("manifest_open", found["open_cpu_s"] / 2, json_kib=len(document) / 1024, **found)


def _manifest(count: int) -> DatasetManifest:
    rng = np.random.default_rng(0)
    numbers = np.arange(count)
    columns = {
        "name": np.char.add(b"plate-0042-well-", np.char.zfill(numbers.astype("S7"), 7)),
        "split": rng.choice(np.array([b"train", b"val", b"test"]), count, p=(0.8, 0.1, 0.1)),
        "kind": np.array([kind.value.encode() for kind in Kind])[rng.integers(len(Kind), size=count)],
        "group": numbers,
        "height": np.full(count, 256),
        "width": np.full(count, 256),
        "nuclei": rng.integers(100, size=count),
        "image_sha256": rng.integers(256, size=(count, 32), dtype=np.uint8),
        "labels_sha256": rng.integers(256, size=(count, 32), dtype=np.uint8),
    }
    samples = Samples(columns)
    shards = [_shard(split, len(samples.where("split", split))) for split in SPLITS]
    facts = {"format": DATASET_FORMAT, "name": "bench", "version": "0" * 12, "created": "", "source": "", "layout": ""}
    return DatasetManifest(**facts, seed=0, samples=samples, shards=shards, duplicates=[], left_out=[])


def _shard(split: str, records: int) -> Shard:
    return Shard(file=f"{split}-00000-of-00001.tfrecord", split=split, records=records, size=1, sha256="0" * 64)


def _open(uri: str, version: str) -> dict[str, object]:
    """Open a version, and read kinds, names and numbers of nuclei of its training split."""
    wall, cpu = time.perf_counter(), time.process_time()
    manifest = open_dataset(DatasetLocation(parse_uri(uri), version)).manifest
    opened = time.process_time() - cpu
    train = manifest.split_samples("train")
    used = len(train.texts("name")) + len(train.texts("kind")) + train.nuclei
    taken = {"open_cpu_s": opened, "cpu_s": time.process_time() - cpu, "clock_s": time.perf_counter() - wall}
    return {**taken, **_nothing(), "used": used}


def _nothing() -> dict[str, object]:
    """The memory of a process that has imported as much."""
    status = Path("/proc/self/status").read_text()  # ru_maxrss begins with the memory of the parent
    return {"peak_mib": int(status.partition("VmHWM:")[2].split()[0]) / 1024}


def _tiles(count: int) -> dict[str, object]:
    """The groups of generated tiles, by the product and by a comparison of all pairs."""
    prints = [fingerprint(generated_image(number, 96, 96)[0]) for number in range(count)]
    pictures = [None] * count
    started = time.process_time()
    found = group_images(prints, pictures)
    searched = time.process_time()
    same = found == groups_of_all_pairs(prints)
    taken = {"cpu_s": searched - started, "cpu_s_all_pairs": time.process_time() - searched}
    return {**taken, "same": same, "groups": max(found) + 1}


def _made(count: int) -> dict[str, object]:
    prints = list(made_fingerprints(count))
    cpu, started = time.process_time(), time.perf_counter()
    groups = max(group_images(prints, [None] * count)) + 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    taken = {"cpu_s": time.process_time() - cpu, "minutes": (time.perf_counter() - started) / 60}
    return {**taken, "peak_gib": peak, "groups": groups}


def made_fingerprints(count: int) -> Iterator[Fingerprint]:
    """Yield fingerprints as of images of 256 x 256 pixels, a hundred times faster than such images can be drawn.

    Lines are rows of generated images, shifted, mirrored, and with another brightness, contrast and noise. Thumbnails
    are smooth noise, as those of images with many nuclei are. One image of 50 is like an earlier one.
    """
    rng = np.random.default_rng(0)
    pool = np.stack([cv2.cvtColor(generated_image(n, _SIDE, _SIDE)[0], cv2.COLOR_RGB2GRAY) for n in range(_POOL)])
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        lines = _lines(pool, rng, size)
        patches = rng.integers(2**63, size=(size, _PATCHES), dtype=np.uint64)
        fields = rng.normal(size=(size, 16, 16)).astype(np.float32)
        thumbnails = _grey(60 + 60 * np.stack([cv2.GaussianBlur(field, (0, 0), 0.7) for field in fields]))
        for at in range(_RELATED, size, _RELATED):
            kind = at // _RELATED % 3
            if kind == 0:
                turned = np.rot90(thumbnails[at - 1], at % 4) + rng.normal(0, 3, (16, 16))
                thumbnails[at] = _grey(turned)
            elif kind == 1:
                patches[at, 0] = patches[at - 1, 0]
            else:
                lines[at, 0] = _grey(lines[at - 1, 1] + rng.normal(0, 1, _SIDE))
        patches.sort(axis=1)
        for own in zip(lines, patches, thumbnails, strict=True):
            yield Fingerprint(_SIDE, _SIDE, *(each.tobytes() for each in own))


def _lines(pool: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return rows of generated images that were changed, count x 4 x 256."""
    rows = pool[rng.integers(_POOL, size=(count, 4)), rng.integers(_SIDE, size=(count, 4))]
    shifts, signs = rng.integers(_SIDE, size=(count, 4, 1)), rng.choice((-1, 1), (count, 4, 1))
    rows = np.take_along_axis(rows, (signs * np.arange(_SIDE) + shifts) % _SIDE, axis=2)
    gains, levels = rng.uniform(0.5, 1.3, (count, 4, 1)), rng.uniform(-10, 30, (count, 4, 1))
    return _grey(rows * gains + levels + rng.normal(0, 2, rows.shape))


def _grey(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _child(mode: str, *given: object) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.million", mode, *map(str, given)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    mode, *given = sys.argv[1:]
    if mode in {"tiles", "made"}:
        print(json.dumps({"tiles": _tiles, "made": _made}[mode](int(given[0]))))
    else:
        print(json.dumps(_open(*given) if mode == "open" else _nothing()))
