"""A flipped byte, a truncated or missing file, a manifest that lies: refused by name and sum, the good copy kept."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from job import worker
from job.filesystem import run_storage
from nucleus.cli.main import cli
from nucleus.config.names import Reference
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import Dataset, locate_dataset, open_dataset
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.errors import IntegrityError, ModelError
from nucleus.registry.manifest import MANIFEST_FILE, version_prefix
from nucleus.registry.publish import publish
from nucleus.registry.versions import pull, version_of_run
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import write_sums
from nucleus.storage.uri import S3Uri
from tests.small_model import origin

Damage = Callable[[bytes], bytes | None]

DAMAGES: dict[str, Damage] = {
    "a flipped byte": lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:],
    "truncated": lambda data: data[:-7],
    "empty": lambda _: b"",
    "missing": lambda _: None,
}


def damage(bucket: Bucket, key: str, how: Damage) -> None:
    left = how(bucket.get(key))
    if left is None:
        bucket.delete(key)
    else:
        bucket.put(key, left)


@pytest.mark.parametrize("how", DAMAGES)
def test_pull_and_predict(
    bucket: Bucket, model_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dozen: Path, how: str
) -> None:
    publish(bucket, "m", model_files, origin("one"))
    target = tmp_path / "pulled"
    good = pull(bucket, Reference("m"), target)
    second = publish(bucket, "m", model_files, origin("two"))
    damage(bucket, f"{version_prefix('m', 2)}/model.weights.h5", DAMAGES[how])
    with pytest.raises(
        IntegrityError, match=rf"model\.weights\.h5.*({second.files['model.weights.h5'].sha256}|missing)"
    ):
        pull(bucket, Reference("m"), target)
    assert pull(bucket, Reference("m", "1"), target) == good
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = next(dozen.rglob("images/*.png"))
    run = CliRunner().invoke(cli, ["predict", str(image), "--model", "m@2", "--out", str(tmp_path / "out")])
    assert run.exit_code == 1
    assert "model.weights.h5" in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["a flipped byte", "truncated", "empty", "missing"])
def test_manifests_of_models(
    bucket: Bucket, model_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    publish(bucket, "m", model_files, origin("one"))
    key = f"{version_prefix('m', 1)}/{MANIFEST_FILE}"
    damage(bucket, key, DAMAGES[how])
    with pytest.raises(ModelError, match="damaged" if how != "missing" else "version"):
        pull(bucket, Reference("m"), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    second = publish(bucket, "m", model_files, origin("two"))
    assert version_of_run(bucket, "m", "two") == second
    assert version_of_run(bucket, "m", "three") is None
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    listed = CliRunner().invoke(cli, ["models", "list", "m"])
    assert listed.exit_code == 0, listed.output
    assert ("damaged" in listed.stdout) == (how != "missing")
    if how != "missing":
        with pytest.raises(ModelError, match="damaged"):
            version_of_run(bucket, "m", "one")


def test_manifests_that_lie(bucket: Bucket, model_files: Path, tmp_path: Path) -> None:
    for run in ("one", "two"):
        publish(bucket, "m", model_files, origin(run))
    first, second = (f"{version_prefix('m', number)}/{MANIFEST_FILE}" for number in (1, 2))
    told = json.loads(bucket.get(second))
    bucket.put(second, bucket.get(first))
    with pytest.raises(IntegrityError, match=r"m@2 .*m@1"):
        pull(bucket, Reference("m"), tmp_path / "pulled")
    told["files"]["model.json"]["sha256"] = "0" * 64
    bucket.put(second, json.dumps(told).encode())
    with pytest.raises(IntegrityError, match=r"model\.json .* SHA-256 0{64}"):
        pull(bucket, Reference("m"), tmp_path / "pulled")
    told["files"] = {"../../outside": {"size": 1, "sha256": "0" * 64}}
    bucket.put(second, json.dumps(told).encode())
    with pytest.raises(ModelError, match="damaged"):
        pull(bucket, Reference("m"), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.fixture
def dataset(dozen: Path, bucket_uri: S3Uri) -> Dataset:
    return import_dataset(dozen, bucket_uri / "datasets" / "d", SplitOptions()).dataset


@pytest.mark.parametrize("how", DAMAGES)
def test_shards(dataset: Dataset, tmp_path: Path, how: str) -> None:
    """What training reads, it reads through the cache."""
    first, second = dataset.manifest.split_shards("train")[:2]
    cache = ShardCache(tmp_path)
    cache.open(dataset, first)
    for shard in (first, second):
        damage(Bucket(dataset.version_uri), shard.file, DAMAGES[how])
    assert len(cache.open(dataset, first)) == first.records  # the copy on disk is good
    with pytest.raises(IntegrityError, match=rf"{second.file}.*({second.sha256}|Import)"):
        cache.open(dataset, second)
    assert {path.name for path in tmp_path.rglob("*.tfrecord")} == {first.file}


def test_manifests_of_datasets_that_lie(dataset: Dataset, bucket_uri: S3Uri) -> None:
    bucket, key = Bucket(dataset.version_uri), "manifest.json"
    told = json.loads(bucket.get(key))
    location = locate_dataset(f"d@{dataset.manifest.version}", str(bucket_uri))
    assert open_dataset(location) == dataset
    other_split = "val" if told["samples"][0]["split"] == "test" else "test"
    for change in ({"nuclei": 10_000}, {"split": other_split}, {"labels_sha256": "0" * 64}):
        samples = [{**told["samples"][0], **change}, *told["samples"][1:]]
        bucket.put(key, json.dumps({**told, "samples": samples}).encode())
        with pytest.raises(IntegrityError, match=re.escape(dataset.manifest.version)):
            open_dataset(location)
    other = "0" * 12
    Bucket(dataset.uri).put(f"{other}/manifest.json", json.dumps(told).encode())
    with pytest.raises(IntegrityError, match=other):
        open_dataset(locate_dataset(f"d@{other}", str(bucket_uri)))


@pytest.mark.parametrize("how", DAMAGES)
def test_checkpoints(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What a run goes on from, as a worker takes it from the bucket."""
    import ray.train

    made = tmp_path / "made"
    made.mkdir()
    for name in ("state.json", "current.npz"):
        (made / name).write_text(f"content of {name}")
    write_sums(made)
    for path in made.iterdir():
        bucket.put(f"runs/r/checkpoint/{path.name}", path)
    stored = f"{bucket.uri.bucket}/{bucket.key('runs/r/checkpoint')}"
    checkpoint = ray.train.Checkpoint(stored, run_storage(bucket.uri, 5.0))
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: checkpoint)
    with worker._checkpoint() as folder:
        assert {path.name for path in folder.iterdir()} == {path.name for path in made.iterdir()}
    damage(bucket, "runs/r/checkpoint/current.npz", DAMAGES[how])
    with pytest.raises(IntegrityError, match=rf"{stored} .*current\.npz"), worker._checkpoint():
        pass
