"""An import that is spread over workers: the version of one process, what is read again, and what workers do not see.

The workers are functions of this process, which get copies of all that is sent to them; `tests/job/test_prediction.py`
has those of a Ray cluster.
"""

import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nucleus.data import import_workers, spooling
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import DatasetLocation
from nucleus.data.images import encode_png
from nucleus.data.importing import Imported, add_to_dataset, import_dataset
from nucleus.data.intake import SourceOptions, SourceReader
from nucleus.data.splits import SplitOptions
from nucleus.data.spooling import Spread
from nucleus.data.synthetic import generated_image
from nucleus.data.zarr_labels import ZarrChoice
from nucleus.errors import DataError, JobError
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri
from tests.data.test_bucket_sources import packed, uploaded
from tests.data.test_zarr_buckets import uploaded as uploaded_zarr
from tests.data.test_zarr_labels import written

OPTIONS = SplitOptions(seed=0, val=0.25, test=0.25)


def write_images(root: Path, *seeds: int) -> Path:
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        image, labels = generated_image(seed, 48, 48)
        (root / "images" / f"{seed:02d}.png").write_bytes(encode_png(image))
        (root / "labels" / f"{seed:02d}.png").write_bytes(encode_png(labels.astype(np.uint16)))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts: images with labels, a duplicate, a damaged image, one without a mask and one whose mask is wrong."""
    root = write_images(tmp_path_factory.mktemp("source"), *range(8))
    for kind in ("images", "labels"):
        shutil.copy(root / kind / "03.png", root / kind / "30.png")
    (root / "images" / "05.png").write_bytes((root / "images" / "05.png").read_bytes()[:200])
    (root / "labels" / "06.png").unlink()
    (root / "labels" / "07.png").write_bytes(encode_png(np.zeros((48, 49), np.uint16)))
    return root


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooling, "_ITEMS_OF_A_PART", 6)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image was read."""
    counts: Counter[str] = Counter()
    original = SourceReader.read

    def counted(self: SourceReader, item: Any, path: Path) -> Any:
        counts[item.title] += 1
        return original(self, item, path)

    monkeypatch.setattr(SourceReader, "read", counted)
    return counts


def spread(items: Iterable[Any], make: Callable[[], Callable[[Any], Any]]) -> Iterator[Any]:
    """Two workers, each with its own copy of all that is sent, that answer in another order."""
    workers = [pickle.loads(pickle.dumps(make))() for _ in range(2)]
    for first in items:
        second = next(iter(items), None) if isinstance(items, Iterator) else None
        for number, item in reversed(list(enumerate(filter(None, (first, second))))):
            yield pickle.loads(pickle.dumps(workers[number](pickle.loads(pickle.dumps(item)))))


def broken(after: int) -> Spread:
    """A cluster that is interrupted after this number of answers."""
    left = iter(range(after))

    def spread_until(items: Iterable[Any], make: Callable[[], Callable[[Any], Any]]) -> Iterator[Any]:
        work = make()
        for item in items:
            if next(left, None) is None:
                raise KeyboardInterrupt
            yield work(item)

    return spread_until


def content(imported: Imported) -> dict[str, Any]:
    """All that a manifest says of its content, and what the user is told."""
    manifest = imported.dataset.manifest.model_dump(exclude={"created", "name", "source"})
    return {**manifest, "warnings": imported.warnings}


def kept(bucket: Bucket) -> list[str]:
    return [item.key for item in bucket.objects("datasets/") if "/importing/" in item.key]


@pytest.mark.parametrize("where", ["folder", "zip", "prefix", "zip in the bucket"])
def test_the_version_is_that_of_one_process(
    where: str, folder: Path, bucket: Bucket, tmp_path: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a path that is relative too, as workers have another current folder."""
    src: Path | S3Uri = Path(folder.name)
    monkeypatch.chdir(folder.parent)
    if where == "zip":
        (tmp_path / "a.zip").write_bytes(packed(folder))
        src = tmp_path / "a.zip"
    elif where == "prefix":
        src = uploaded(folder, bucket).uri
    elif where == "zip in the bucket":
        bucket.put("a.zip", packed(folder))
        src = bucket.uri / "a.zip"
    alone = import_dataset(src, bucket.uri / "datasets" / "a", OPTIONS)
    assert (len(alone.dataset.manifest.samples), len(alone.duplicates), len(alone.left_out)) == (5, 1, 3)
    read.clear()

    def elsewhere(items: Iterable[Any], make: Callable[[], Callable[[Any], Any]]) -> Iterator[Any]:
        monkeypatch.chdir(tmp_path)
        return spread(items, make)

    told: list[tuple[int, int]] = []
    there = import_dataset(src, bucket.uri / "datasets" / "b", OPTIONS, lambda *n: told.append(n), spread=elsewhere)
    assert there.created
    assert content(there) == content(alone)
    assert there.dataset.manifest.source == alone.dataset.manifest.source
    assert set(read.values()) == {1}
    assert told[-1] == (9, 9)
    assert kept(bucket) == []


def test_an_import_that_was_broken_off_goes_on(
    folder: Path, bucket: Bucket, tmp_path: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    src = tmp_path / "source"
    shutil.copytree(folder, src)
    uri = bucket.uri / "datasets" / "d"

    def broken_off(after: int) -> int:
        """Return how many images are read until the import is broken off."""
        read.clear()
        with pytest.raises(KeyboardInterrupt):
            import_dataset(src, uri, OPTIONS, spread=broken(after))
        return sum(read.values())

    assert broken_off(1) == 6
    assert broken_off(1) == 0  # before the second part
    os.utime(src / "images" / "07.png", (1, 1))
    os.utime(src / "labels" / "00.png", (1, 1))
    assert broken_off(1) == 6  # the first part has another file
    assert broken_off(2) == 3
    facts = [key for key in kept(bucket) if key.endswith(".json")]
    records = [key for key in kept(bucket) if key.endswith(".tfrecord")]
    assert (len(facts), len(records)) == (3, 3)  # the first part twice: of files before and after the change
    for key in facts:
        bucket.put(key, bucket.get(key)[:-9])
    assert broken_off(2) == 9  # none is whole
    for key in records:
        bucket.delete(key)
    assert broken_off(2) == 9
    with monkeypatch.context() as other:
        for module in (spooling, import_workers):
            other.setattr(module, "code_sum", lambda: "another one")
        assert broken_off(2) == 9
    assert broken_off(4) == 0  # the first two shards are there

    sent: Counter[str] = Counter()
    put = Bucket.put

    def counted(self: Bucket, key: str, *arguments: Any, **options: Any) -> str:
        sent[key.rpartition("/")[2]] += 1
        return put(self, key, *arguments, **options)

    monkeypatch.setattr(Bucket, "put", counted)
    read.clear()
    ended = import_dataset(src, uri, OPTIONS, spread=spread)
    assert (ended.created, ended.read_before, sum(read.values())) == (True, 9, 0)
    shards = [shard.file for shard in ended.dataset.manifest.shards]
    assert len(shards) > 2
    assert [file for file in shards if file not in sent] == shards[:2]
    assert kept(bucket) == []
    alone = import_dataset(src, bucket.uri / "datasets" / "alone", OPTIONS)
    assert content(ended) == content(alone)


def test_an_addition_is_that_of_one_process(bucket: Bucket, tmp_path: Path) -> None:
    """New images and new labels; the old records are copied from shard to shard."""
    first = write_images(tmp_path / "first", *range(6))
    more = write_images(tmp_path / "more", 2, *range(6, 10))
    labels = generated_image(2, 48, 48)[1].astype(np.uint16)
    (more / "labels" / "02.png").write_bytes(encode_png(np.where(labels == labels.max(), 0, labels).astype(np.uint16)))
    cache, found = ShardCache(tmp_path / "cache"), []
    for name, how in (("a", None), ("b", spread)):
        uri = bucket.uri / "datasets" / name
        import_dataset(first, uri, OPTIONS)
        found += [add_to_dataset(more, DatasetLocation(uri, "latest"), OPTIONS, cache, spread=how) for _ in range(2)]
    alone, nothing, spread_out, again = found
    assert spread_out.addition is not None
    assert (spread_out.addition.added, spread_out.addition.replaced) == (4, 1)
    keys = {"version", "samples", "shards", "left_out"}
    assert {key: content(spread_out)[key] for key in keys} == {key: content(alone)[key] for key in keys}
    assert spread_out.warnings == [text.replace("datasets/a@", "datasets/b@") for text in alone.warnings]
    assert (again.created, again.dataset) == (nothing.created, spread_out.dataset) == (False, spread_out.dataset)
    assert kept(bucket) == []


def test_planes_of_ome_zarr_are_read_by_workers(
    bucket: Bucket, tmp_path: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here and in a bucket; a change of any object is seen, and one that has no labels is left out."""
    monkeypatch.setattr(spooling, "_ITEMS_OF_A_PART", 3)
    for seed in range(5):
        written(tmp_path / "z" / f"{seed:02d}.zarr", seed)
    shutil.rmtree(tmp_path / "z" / "04.zarr" / "labels")
    reading, uri = SourceOptions(zarr=ZarrChoice(labels="nuclei")), bucket.uri / "datasets" / "d"
    alone = import_dataset(tmp_path / "z", bucket.uri / "datasets" / "alone", OPTIONS, reading=reading)
    assert (len(alone.dataset.manifest.samples), len(alone.left_out)) == (4, 1)
    read.clear()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            import_dataset(tmp_path / "z", uri, OPTIONS, reading=reading, spread=broken(2))
    assert set(read.values()) == {1}
    chunk = next(path for path in (tmp_path / "z" / "00.zarr" / "0").rglob("*") if path.is_file() and path.name == "0")
    os.utime(chunk, (1, 1))
    there = import_dataset(tmp_path / "z", uri, OPTIONS, reading=reading, spread=spread)
    assert content(there) == content(alone)
    assert there.read_before == 2  # the other part has the image that was changed
    uploaded_zarr(tmp_path / "z", bucket)
    in_bucket = import_dataset(bucket.uri / "z", bucket.uri / "datasets" / "b", OPTIONS, reading=reading, spread=spread)
    assert in_bucket.dataset.manifest.version == alone.dataset.manifest.version

    def without(items: Iterable[Any], make: Callable[[], Callable[[Any], Any]]) -> Iterator[Any]:
        dealt = list(items)
        shutil.rmtree(tmp_path / "z" / "00.zarr")
        return map(make(), dealt)

    with pytest.raises(DataError, match=r"each worker to see \S*00\.zarr,"):
        import_dataset(tmp_path / "z", uri, SplitOptions(seed=1), reading=reading, spread=without)


def test_what_a_worker_does_not_see_is_told(folder: Path, bucket: Bucket, tmp_path: Path) -> None:
    """An image that only this machine has must not be left out as one that cannot be read."""

    def until(change: Callable[[], object]) -> Spread:
        def spread_changed(items: Iterable[Any], make: Callable[[], Callable[[Any], Any]]) -> Iterator[Any]:
            dealt = list(items)
            change()
            return map(pickle.loads(pickle.dumps(make))(), dealt)

        return spread_changed

    uri = bucket.uri / "datasets" / "d"
    for number, (change, message) in enumerate(
        [
            (lambda src: (src / "images" / "04.png").unlink(), r"each worker to see \S*images/04\.png,.* does not"),
            (lambda src: (src / "labels" / "04.png").write_bytes(b"other"), r"labels/04\.png,.* found another"),
            (shutil.rmtree, r"each worker to see \S*source\d,"),
        ]
    ):
        src = tmp_path / f"source{number}"
        shutil.copytree(folder, src)
        with pytest.raises(DataError, match=message):
            import_dataset(src, uri, OPTIONS, spread=until(lambda src=src, change=change: change(src)))
    place = uploaded(folder, bucket)
    with pytest.raises(DataError, match=r"images/04\.png to stay as it is .* replaced"):
        import_dataset(place.uri, uri, OPTIONS, spread=until(lambda: place.put("images/04.png", b"other")))


def test_a_source_that_cannot_be_used_is_told_as_by_one_process(bucket: Bucket, tmp_path: Path) -> None:
    """Before a cluster is started, if it shows in the listing."""

    def never(*_: object) -> Iterator[Any]:
        raise AssertionError

    uri = bucket.uri / "datasets" / "d"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="Expected image files"):
        import_dataset(tmp_path / "empty", uri, OPTIONS, spread=never)
    bad = write_images(tmp_path / "bad", 1)
    (bad / "images" / "01.png").write_bytes(b"no image")
    messages = []
    for how in (None, spread):
        with pytest.raises(DataError, match="found none") as found:
            import_dataset(bad, uri, OPTIONS, spread=how)
        messages.append(str(found.value))
    assert messages[0] == messages[1]


def test_a_worker_with_other_code_is_refused(folder: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(items: Iterable[Any], make: Callable[[], Callable[[Any], Any]]) -> Iterator[Any]:
        monkeypatch.setattr(import_workers, "code_sum", lambda: "another one")
        return map(make(), items)

    with pytest.raises(JobError, match="same nucleus and libraries"):
        import_dataset(folder, bucket.uri / "datasets" / "d", OPTIONS, spread=other)


def test_large_records_are_in_several_objects(folder: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_workers, "_MOST_BYTES", 3_000)
    uri = bucket.uri / "datasets"
    with pytest.raises(KeyboardInterrupt):
        import_dataset(folder, uri / "d", OPTIONS, spread=broken(2))
    assert len([key for key in kept(bucket) if key.endswith(".tfrecord")]) > 2
    there = import_dataset(folder, uri / "d", OPTIONS, spread=spread)
    assert there.read_before == 9
    assert content(there) == content(import_dataset(folder, uri / "a", OPTIONS))
