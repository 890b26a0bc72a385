"""The shard cache against a real server: its limit, crashes, several processes, and blocks that are read ahead."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nucleus.config.recipe import AugmentOptions, NormalizationOptions
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, DatasetManifest, Shard
from nucleus.data.decoded import decoded_bytes
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.data.pipeline import Feed, training_batches
from nucleus.data.reader import SplitReader, cached_splits, split_reader
from nucleus.data.sampling import epoch_plan
from nucleus.data.shards import ShardFile, encode_record, write_shard
from nucleus.data.synthetic import generated_image, write_generated
from nucleus.errors import CacheFullError, IntegrityError, OutputError
from nucleus.storage.bucket import Bucket
from nucleus.storage.claims import remove_unused
from nucleus.storage.files import sha256_of
from nucleus.storage.uri import S3Uri
from nucleus.surroundings import cache_folder

SIZE = 1 << 20
MIB = 1 / 1024  # in GiB


@pytest.fixture(scope="module")
def shards(store: object, tmp_path_factory: pytest.TempPathFactory) -> Dataset:  # noqa: ARG001
    """A dataset of 48 training shards of about 1 MiB, two records each."""
    root = tmp_path_factory.mktemp("shards")
    uri = S3Uri("nucleus", "cache-test")
    write_generated(root / "images", 6, side=64)
    small = import_dataset(root / "images", uri, SplitOptions()).dataset.manifest
    listed = []
    for number in range(48):
        path = root / f"train-{number:05d}-of-00048.tfrecord"
        write_shard(path, [bytes([number, record]) * (SIZE // 4) for record in range(2)])
        shard = Shard(file=path.name, split="train", records=2, size=path.stat().st_size, sha256=sha256_of(path))
        Bucket(uri / small.version).put(path.name, path)
        listed.append(shard)
    return Dataset(uri, DatasetManifest(**{**small.model_dump(), "shards": listed}))


def cached(folder: Path) -> list[int]:
    return sorted(int(path.name[6:11]) for path in folder.rglob("train-*.tfrecord"))


def test_the_least_recently_used_go_first(shards: Dataset, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3.5 * MIB, wait_seconds=0)
    listed = shards.manifest.shards
    for number in (0, 1, 2):
        assert cache.open(shards, listed[number]).read(1)[:2] == bytes([number, 1])
        time.sleep(0.02)
    cache.open(shards, listed[0])  # now the most recent one
    cache.open(shards, listed[3])
    assert cached(tmp_path) == [0, 2, 3]
    cache.open(shards, listed[4])
    assert cached(tmp_path) == [0, 3, 4]


def test_what_is_in_use_stays(shards: Dataset, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2.5 * MIB, wait_seconds=0.5)
    listed = shards.manifest.shards
    cache.open(shards, listed[0])
    first = cache.open(shards, listed[0])  # from the cache: this lock is another one than the download's
    second = cache.open(shards, listed[1])
    with pytest.raises(CacheFullError, match=r"0\.00244 GiB .*cache_limit_gib"):
        cache.open(shards, listed[2])
    assert cached(tmp_path) == [0, 1]
    del second
    assert cache.open(shards, listed[2]).read(0)[0] == 2
    assert cached(tmp_path) == [0, 2]
    assert first.read(0)[0] == 0
    with pytest.raises(CacheFullError):
        ShardCache(tmp_path, 0.5 * MIB).open(shards, listed[5])


CHILD = """
import sys
from pathlib import Path
from nucleus.data import cache
from nucleus.data.dataset import Dataset
from nucleus.data.dataset import DatasetManifest
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri
mode, folder, manifest = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
dataset = Dataset(S3Uri("nucleus", "cache-test"), DatasetManifest.model_validate_json(manifest.read_bytes()))
shards = dataset.manifest.shards
read_into = Bucket.read_into
def counted(self, key, file, *, sha256=None):
    print("download", key, flush=True)
    if mode == "die":
        file.write(b"half"); file.flush()
        import time; time.sleep(60)
    return read_into(self, key, file, sha256=sha256)
Bucket.read_into = counted
opened = cache.ShardCache(folder, float(sys.argv[4]))
files = [opened.open(dataset, shard) for shard in shards[:6]] if mode != "churn" else []
if mode == "churn":
    import random
    for _ in range(40):
        number = random.randrange(24)
        assert opened.open(dataset, shards[number]).read(1)[:2] == bytes([number, 1])
print("done", flush=True)
"""


def spawn(mode: str, folder: Path, dataset: Dataset, limit: float) -> subprocess.Popen[str]:
    manifest = folder / "manifest.json"
    manifest.write_text(dataset.manifest.model_dump_json())
    command = [sys.executable, "-c", CHILD, mode, str(folder), str(manifest), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_download_a_machine(shards: Dataset, tmp_path: Path) -> None:
    children = [spawn("open", tmp_path, shards, 1.0) for _ in range(3)]
    outputs = [child.communicate(timeout=900) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], outputs
    downloads = [line for out, _ in outputs for line in out.splitlines() if line.startswith("download")]
    assert sorted(downloads) == [f"download train-{number:05d}-of-00048.tfrecord" for number in range(6)]


def test_several_processes_never_exceed_the_limit(shards: Dataset, tmp_path: Path) -> None:
    children = [spawn("churn", tmp_path, shards, 5.5 * MIB) for _ in range(3)]
    highest = 0
    (tmp_path / "datasets").mkdir()
    while any(child.poll() is None for child in children):
        with (tmp_path / "datasets" / ".lock").open("ab") as lock:  # nothing is added or evicted meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX)
            sizes = {}
            for pattern in (".*.part", "train-*.tfrecord"):  # one that is renamed between the two is found twice
                for path in tmp_path.rglob(pattern):
                    with contextlib.suppress(FileNotFoundError):
                        sizes[path.stat().st_ino] = path.stat().st_size
        highest = max(highest, sum(sizes.values()))
        time.sleep(0.01)
    outputs = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], outputs
    assert 3 * SIZE < highest <= 5.5 * (1 << 20)


def test_what_is_renamed_at_the_last_moment_is_not_taken_for_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, whole = tmp_path / ".train-0.part", tmp_path / "train-0.tfrecord"
    part.write_bytes(b"a shard")
    lock = fcntl.flock

    def finished_first(descriptor: int, how: int) -> None:
        part.rename(whole)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", finished_first)
    assert not remove_unused(part)
    assert whole.read_bytes() == b"a shard"


def test_a_killed_download_leaves_nothing_that_counts(shards: Dataset, tmp_path: Path) -> None:
    child = spawn("die", tmp_path, shards, 1.0)
    assert child.stdout is not None
    assert child.stdout.readline().startswith("download train-00000")
    (half,) = tmp_path.rglob(".train-*.part")
    assert half.stat().st_size == shards.manifest.shards[0].size  # its room is reserved
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.communicate()
    assert cached(tmp_path) == []
    assert ShardCache(tmp_path).open(shards, shards.manifest.shards[0]).read(1)[:2] == b"\0\1"
    assert cached(tmp_path) == [0]
    assert not list(tmp_path.rglob(".train-*.part"))


def reader(dataset: Dataset, cache: ShardCache, opened: list[int] | None = None) -> SplitReader:
    counts = [shard.records for shard in dataset.manifest.shards]

    def open_shard(number: int) -> ShardFile:
        if opened is not None:
            opened.append(number)
        return cache.open(dataset, dataset.manifest.shards[number])

    return SplitReader(
        open_shard, lambda epoch: epoch_plan(counts, seed=2, epoch=epoch, rank=1, world=2, global_batch=4)
    )


def test_the_next_block_comes_while_this_one_is_read(shards: Dataset, tmp_path: Path) -> None:
    read = reader(shards, ShardCache(tmp_path))
    first = {int(shard) for _, shard, _ in read.enter(0, 0)}
    deadline = time.monotonic() + 600
    while len(cached(tmp_path)) < 24 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(first) == 12
    assert all(shard % 2 == 1 for shard in cached(tmp_path))
    assert len(cached(tmp_path)) == 24  # both blocks' share, with only the first one entered
    rows = [row for block in range(read.blocks(0)) for row in read.enter(0, block).tolist()]
    assert [position for position, _, _ in rows] == list(range(1, 96, 2))
    for _, shard, record in rows:
        assert read.read(shard, record)[:2] == bytes([shard, record])


def test_one_block_at_a_time_fits(shards: Dataset, tmp_path: Path) -> None:
    """12 shards of 48 fit: every epoch evicts and fetches anew, and every record is right."""
    read = reader(shards, ShardCache(tmp_path, 13 * SIZE / (1 << 30), wait_seconds=600))
    for epoch in range(2):
        seen = []
        for block in range(read.blocks(epoch)):
            for _, shard, record in read.enter(epoch, block):
                assert read.read(shard, record)[:2] == bytes([shard, record])
                seen.append((int(shard), int(record)))
        assert len(set(seen)) == 48
    full = reader(shards, ShardCache(tmp_path / "small", 5 * MIB, wait_seconds=0))
    with pytest.raises(CacheFullError):
        full.enter(0, 0)
    assert isinstance(full.failure, CacheFullError)


def test_damage_in_the_cache_is_repaired(shards: Dataset, tmp_path: Path) -> None:
    shard = shards.manifest.shards[3]
    child = spawn("open", tmp_path, shards, 1.0)
    child.communicate(timeout=900)
    (path,) = tmp_path.rglob(f"train-{3:05d}*")
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[SIZE // 3] ^= 1
    path.write_bytes(data.tobytes())
    assert ShardCache(tmp_path).open(shards, shard).read(0)[0] == 3
    assert sha256_of(path) == shard.sha256


def test_a_lost_shard_is_an_error(shards: Dataset, tmp_path: Path) -> None:
    lost = shards.manifest.shards[0].model_copy(update={"file": "train-00099-of-00100.tfrecord"})
    with pytest.raises(IntegrityError, match="train-00099"):
        ShardCache(tmp_path).open(shards, lost)
    assert not list(tmp_path.rglob("*.tfrecord"))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_without_locks(
    number: int, shards: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    ShardCache(folder).open(shards, shards.manifest.shards[0])
    monkeypatch.setattr(fcntl, "flock", refuse)
    for shard in shards.manifest.shards[:2]:  # one is there, the other is not
        with pytest.raises(OutputError) as caught:
            ShardCache(folder).open(shards, shard)
        for fact in (str(folder), os.strerror(number), "file system with locks", "export XDG_CACHE_HOME=DIR"):
            assert fact in str(caught.value)
    assert cached(tmp_path) == [0]
    assert not list(tmp_path.rglob("*.part"))


def test_a_full_disk(shards: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system writes half of a shard; nothing of it stays, and the error names the variable of the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n{CHILD}"
    manifest = tmp_path / "manifest.json"
    manifest.write_text(shards.manifest.model_dump_json())
    folder = str(cache_folder())
    command = [sys.executable, "-c", code, "open", folder, str(manifest), "1.0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "OutputError: Expected room to write" in last
    assert "export XDG_CACHE_HOME=DIR" in last
    assert cached(tmp_path) == []
    assert not list(tmp_path.rglob("*.part"))


SIZES = np.array([(64, 64), (64, 64)])


def test_decoded_records_count_are_kept_and_are_evicted(shards: Dataset, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3.5 * MIB, wait_seconds=0)
    listed = shards.manifest.shards
    first = cache.open(shards, listed[0], SIZES)
    assert first.pixels is not None
    (path,) = tmp_path.rglob("*.pixels")
    assert path.stat().st_size == decoded_bytes(SIZES)
    first.pixels.write(1, np.full((64, 64), 7, np.uint8), np.full((64, 64), 9, np.uint16))
    first.pixels.write_table(1, bytes(16), np.arange(256, dtype=np.uint8))
    del first
    again = cache.open(shards, listed[0], SIZES).pixels
    assert again is not None
    facts, table = again.find(1, bytes(16))
    assert facts is not None
    assert table is not None
    image, labels = again.window(1, facts, slice(0, 3), slice(0, 4))
    assert (image == 7).all()
    assert (labels == 9).all()
    for number in (1, 2, 3, 4):
        time.sleep(0.02)
        cache.open(shards, listed[number])
    assert path.exists(), "in use"
    assert cached(tmp_path) == [2, 3, 4]
    del again
    cache.open(shards, listed[5])
    assert not path.exists()
    assert not list(tmp_path.rglob("*.part"))


def test_a_damaged_file_of_decoded_records_is_made_anew(shards: Dataset, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path)
    cache.open(shards, shards.manifest.shards[0], SIZES)
    (path,) = tmp_path.rglob("*.pixels")
    path.write_bytes(path.read_bytes()[:1000])
    pixels = cache.open(shards, shards.manifest.shards[0], SIZES).pixels
    assert pixels is not None
    assert pixels.find(0, bytes(16)) == (None, None)
    assert path.stat().st_size == decoded_bytes(SIZES)


def test_without_space_records_are_decoded_for_each_crop(
    shards: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = np.array([(1000, 1000), (1000, 1000)])
    held = ShardCache(tmp_path, 3.5 * MIB)
    assert held.open(shards, shards.manifest.shards[0], large).pixels is None
    assert "space" in caplog.text
    assert not [*tmp_path.rglob("*.pixels"), *tmp_path.rglob("*.part")]


@pytest.mark.parametrize(("room", "kept"), [(0.0, 0), (0.99, 0), (1.0, 1), (2.5, 2), (40.0, 3)])
def test_as_many_shards_are_kept_decoded_as_fit_beside_all_shards(
    room: float, kept: int, shards: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = shards.manifest.samples[:3]
    train = [sample.model_copy(update={"split": "train", "height": 64, "width": 64}) for sample in samples]
    facts = {**shards.manifest.model_dump(), "samples": train, "shards": shards.manifest.shards[:3]}
    dataset = Dataset(shards.uri, DatasetManifest(**facts))
    one = decoded_bytes(SIZES[:1])
    total = sum(shard.size for shard in dataset.manifest.shards)
    cache = ShardCache(tmp_path, (total + room * one + 1) / (1 << 30))
    plan = epoch_plan([1, 1, 1], seed=0, epoch=0, rank=0, world=1, global_batch=0)
    read = cached_splits([dataset], "train", cache, lambda _: plan, decoded=True)
    read.enter(0, 0)
    assert [read.shards[number].pixels is not None for number in range(3)] == [number < kept for number in range(3)]
    assert len([record for record in caplog.records if "cache_limit_gib" in record.message]) == (kept < 3)


@pytest.mark.parametrize(("room", "kept"), [(2.99, 0), (3.0, 1), (40.0, 1)])
def test_validation_images_are_kept_where_they_fit_beside_the_training_images(
    room: float, kept: int, shards: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, splits = shards.manifest, ("train", "train", "val")
    listed = [s.model_copy(update={"split": split}) for s, split in zip(manifest.shards[:3], splits, strict=True)]
    samples = [
        sample.model_copy(update={"split": split, "height": 64, "width": 64})
        for sample, split in zip(manifest.samples[:3], splits, strict=True)
    ]
    dataset = Dataset(shards.uri, DatasetManifest(**{**manifest.model_dump(), "samples": samples, "shards": listed}))
    total = sum(shard.size for shard in listed)
    cache = ShardCache(tmp_path, (total + room * decoded_bytes(SIZES[:1]) + 1) / (1 << 30))
    read = split_reader(dataset, "val", cache, beside=())
    read.enter(0, 0)
    assert (read.shards[0].pixels is not None) == bool(kept)
    assert ("split val" in caplog.text) == (not kept)


def test_batches_of_one_block_at_a_time_fit(store: object, tmp_path: Path) -> None:  # noqa: ARG001
    """Where a block takes the whole cache, its shards are let go of before those of the next one are needed."""
    uri = S3Uri("nucleus", "tight-cache-test")
    write_generated(tmp_path / "images", 12, side=64)
    manifest = import_dataset(tmp_path / "images", uri, SplitOptions()).dataset.manifest
    records = encode_record("n", *generated_image(0, 64, 64)), encode_record("n", *generated_image(1, 64, 64))
    listed = []
    for number in range(48):
        path = tmp_path / f"train-{number:05d}-of-00048.tfrecord"
        write_shard(path, records[: 1 + (number < 24)])
        count = 1 + (number < 24)
        shard = Shard(file=path.name, split="train", records=count, size=path.stat().st_size, sha256=sha256_of(path))
        Bucket(uri / manifest.version).put(path.name, path)
        listed.append(shard)
    dataset = Dataset(uri, DatasetManifest(**{**manifest.model_dump(), "shards": listed}))
    counts = [shard.records for shard in listed]
    room = sum(shard.size for shard in listed[:24]) * 1.05 / (1 << 30)
    cache = ShardCache(tmp_path / "cache", room, wait_seconds=600)
    read = SplitReader(
        lambda number: cache.open(dataset, listed[number]),
        lambda epoch: epoch_plan(counts, seed=2, epoch=epoch, rank=0, world=1, global_batch=5),
    )
    feed = Feed(
        reader=read,
        targets=lambda labels: labels[..., np.newaxis].astype(np.float32),
        crop=32,
        normalization=NormalizationOptions(),
        batch=5,
        augment=AugmentOptions(),
        seed=0,
        threads=2,
    )
    assert len(list(training_batches(feed, range(2)))) == 2 * (72 // 5)
    assert read.failure is None
