"""Whole commands on the same images: `python -m tests.benchmarks.predict_cluster NAME[@REF] SRC [ROUNDS]`.

`NAME` is a model in NUCLEUS_BUCKET, `SRC` a folder or zip whose PNG files below `images/` are predicted: as files by
one process, and from the bucket by one worker and by two of a Ray cluster on this machine, which runs already. A JSON
line with seconds, images a second and ratios, the median of the rounds.
"""

import json
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from nucleus.data.sources import open_source
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import bucket_from_environment
from tests.benchmarks.measure import in_turn
from tests.ray_nodes import started_head


def predict_cluster(model: str, source: Path, rounds: int) -> dict[str, float]:
    """Time the three commands in turn."""
    scratch = Bucket(bucket_from_environment() / f"benchmark-{uuid.uuid4().hex[:8]}")
    with tempfile.TemporaryDirectory(prefix="nucleus-bench-") as temporary:
        folder = Path(temporary) / "images"
        folder.mkdir()
        images = _copy(source, folder)
        for file in folder.iterdir():
            scratch.put(f"images/{file.name}", file)
        stored = ("--out", str(scratch.uri / "labels"), "--overwrite", "--workers")
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid.uuid4().hex * 2)
        with started_head(2, {}) as (address, _):
            os.environ["RAY_ADDRESS"] = address
            seconds = in_turn(
                {
                    "files": lambda: _predict(model, folder, "--out", str(folder.parent / "out"), "--overwrite"),
                    "one_worker": lambda: _predict(model, scratch.uri / "images", *stored, "1"),
                    "two_workers": lambda: _predict(model, scratch.uri / "images", *stored, "2"),
                },
                rounds=rounds,
                warm_up=False,
            )
        for item in list(scratch.objects("")):
            scratch.delete(item.key)
    return {
        "images": images,
        **seconds,
        "images_per_second_files": images / seconds["files"],
        "images_per_second_two_workers": images / seconds["two_workers"],
        "two_workers_over_one": seconds["one_worker"] / seconds["two_workers"],
        "two_workers_over_files": seconds["files"] / seconds["two_workers"],
    }


def _copy(source: Path, folder: Path) -> int:
    """Copy the images of a dataset in Kaggle's layout; give how many."""
    files = open_source(source)
    names = [name for name in files.entries() if "/images/" in f"/{name}" and name.endswith(".png")]
    for name in names:
        (folder / Path(name).name).write_bytes(files.read(name))
    return len(names)


def _predict(model: str, *arguments: object) -> None:
    command = [sys.executable, "-m", "nucleus", "predict", *map(str, arguments), "--model", model, "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    name, given = sys.argv[1], Path(sys.argv[2])
    found = predict_cluster(name, given, int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    print(json.dumps({"bench": "predict_cluster", **{key: round(value, 2) for key, value in found.items()}}))
