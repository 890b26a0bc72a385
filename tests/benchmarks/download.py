"""`download_large`, `download_small`: cold downloads through the shard cache against `s5cmd cp` of the same objects."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, DatasetManifest, Shard
from nucleus.data.reader import cached_split
from nucleus.data.sampling import epoch_plan
from nucleus.data.shards import write_shard
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri
from tests.benchmarks.measure import in_turn, report, temporary_store


def download_large() -> None:
    """8 shards of 64 MiB."""
    _compare("download_large", count=8, size=64 << 20)


def download_small() -> None:
    """2,400 shards of 20 kB."""
    _compare("download_small", count=2400, size=20_000)


def _compare(bench: str, count: int, size: int) -> None:
    with temporary_store() as root:
        dataset = _dataset(root, count, size)
        target = root / "target"

        def ours() -> None:
            shutil.rmtree(target, ignore_errors=True)
            counts, cache = [1] * count, ShardCache(target)
            reader = cached_split(
                dataset,
                "train",
                cache,
                lambda _: epoch_plan(counts, seed=0, epoch=0, rank=0, world=1, global_batch=0, shuffle=False),
            )
            for block in range(reader.blocks(0)):
                reader.enter(0, block)
            reader.close()

        def theirs() -> None:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            tool = Path(sys.executable).with_name("s5cmd")
            endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
            command = [str(tool), "--endpoint-url", endpoint, "cp", f"{dataset.version_uri}/train-*", f"{target}/"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        found = in_turn({"ours": ours, "s5cmd": theirs}, rounds=7)
    megabytes = count * size / 1e6
    report(
        bench,
        found["s5cmd"] / found["ours"],
        objects=count,
        ours_mb_s=megabytes / found["ours"],
        s5cmd_mb_s=megabytes / found["s5cmd"],
    )


def _dataset(root: Path, count: int, size: int) -> Dataset:
    """A dataset whose shards hold one record of random bytes each."""
    uri = parse_uri("s3://nucleus/datasets/bench")
    noise = os.urandom(size)
    path = root / "shard"
    write_shard(path, [noise])
    data = path.read_bytes()
    shards = [
        Shard(
            file=f"train-{number:05d}-of-{count:05d}.tfrecord",
            split="train",
            records=1,
            size=len(data),
            sha256=sha256(data).hexdigest(),
        )
        for number in range(count)
    ]
    manifest = DatasetManifest(
        format=1,
        name="bench",
        version="0" * 12,
        created="",
        source="",
        layout="",
        seed=0,
        samples=[],
        shards=shards,
        duplicates=[],
        left_out=[],
    )
    dataset = Dataset(uri, manifest)
    bucket = Bucket(dataset.version_uri)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda shard: bucket.put(shard.file, data), shards))
    return dataset
