import hashlib
import json
import pickle

import pytest

from nucleus.config.names import Kind
from nucleus.data import dataset as datasets
from nucleus.data import dataset_storage
from nucleus.data import samples as samples_module
from nucleus.data.dataset import (
    Dataset,
    DatasetLocation,
    DatasetManifest,
    Shard,
    content_version,
    list_versions,
    open_dataset,
)
from nucleus.data.dataset_storage import manifest_document, verify_dataset
from nucleus.data.samples import SPLITS, Sample, Samples, column_key
from nucleus.errors import IntegrityError
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri


def made_sample(number: int) -> Sample:
    return Sample(
        name=f"image-{number}",
        split=SPLITS[number % 3 if number < 6 else 0],
        kind=list(Kind)[number % 3],
        group=number // 2,
        height=60 + number,
        width=90,
        nuclei=number % 5,
        image_sha256=hashlib.sha256(b"image %d" % number).hexdigest(),
        labels_sha256=hashlib.sha256(b"labels %d" % number).hexdigest(),
    )


@pytest.fixture
def stored(bucket_uri: S3Uri, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Dataset]:
    """A manifest that holds its samples, and the same one with columns beside it; the shards are not there."""
    samples = [made_sample(number) for number in range(12)]
    facts = {"size": 1, "sha256": "0" * 64}
    counts = {split: sum(sample.split == split for sample in samples) for split in SPLITS}
    shards = [Shard(file=f"{s}-00000-of-00001.tfrecord", split=s, records=n, **facts) for s, n in counts.items()]
    manifest = DatasetManifest(
        format=4, name="d", version=content_version(samples, shards), created="2026-01-02T03:04:05", source="s",
        layout="kaggle", seed=0, samples=samples, shards=shards, duplicates=[], left_out=[],
    )  # fmt: skip
    opened = []
    for name, most in (("plain", 12), ("columns", 11)):
        monkeypatch.setattr(dataset_storage, "MOST_IN_MANIFEST", most)
        bucket = Bucket(bucket_uri / name)
        bucket.put(f"{manifest.version}/manifest.json", manifest_document(bucket, manifest))
        opened.append(open_dataset(DatasetLocation(bucket.uri, manifest.version)))
    return opened[0], opened[1]


def problems(dataset: Dataset) -> list[str]:
    return [line for line in verify_dataset(dataset) if line.startswith("samples")]


def test_samples_in_columns_are_the_same(stored: tuple[Dataset, Dataset]) -> None:
    plain, columns = stored
    document = json.loads(Bucket(columns.version_uri).get("manifest.json"))
    assert (document["format"], document["samples"], document["columns"]["rows"]) == (4, [], 12)
    assert json.loads(Bucket(plain.version_uri).get("manifest.json"))["format"] == 3
    assert columns.manifest.samples == plain.manifest.samples
    assert list(columns.manifest.samples) == list(plain.manifest.samples)
    assert columns.manifest.version == plain.manifest.version
    for split in SPLITS:
        assert list(columns.manifest.split_samples(split)) == [s for s in plain.manifest.samples if s.split == split]
    assert [each.manifest.samples for each in list_versions(columns.uri)] == [plain.manifest.samples]
    assert problems(columns) == problems(plain) == []


def test_a_worker_reads_what_it_needs(stored: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, columns = stored
    asked = []
    get = Bucket.get
    monkeypatch.setattr(Bucket, "get", lambda bucket, key: asked.append(key) or get(bucket, key))
    worker = pickle.loads(pickle.dumps(open_dataset(DatasetLocation(columns.uri, columns.manifest.version))))
    train = worker.manifest.split_samples("train")
    assert (len(worker.manifest.samples), len(train), train.nuclei) == (
        12,
        len(plain.manifest.split_samples("train")),
        sum(sample.nuclei for sample in plain.manifest.split_samples("train")),
    )
    assert asked == [f"{columns.manifest.version}/manifest.json", "samples/split.npy", "samples/nuclei.npy"]


@pytest.mark.parametrize("column", ["nuclei", "labels_sha256"])
def test_damaged_columns_are_found(stored: tuple[Dataset, Dataset], column: str) -> None:
    _, columns = stored
    bucket, key = Bucket(columns.version_uri), column_key(column)
    data = bytearray(bucket.get(key))
    data[-1] ^= 1
    bucket.put(key, bytes(data))
    opened = open_dataset(DatasetLocation(columns.uri, columns.manifest.version))
    with pytest.raises(IntegrityError, match=column):
        opened.manifest.samples.column(column)
    assert [column in line for line in problems(opened)] == [True]


def test_other_columns_with_their_sums_are_found(stored: tuple[Dataset, Dataset]) -> None:
    """A manifest whose columns are whole, but not those that its version is made of."""
    _, columns = stored
    bucket = Bucket(columns.version_uri)
    changed = [sample.model_copy(update={"group": 7}) for sample in columns.manifest.samples]
    data = Samples.of(changed).files()["group"]
    bucket.put(column_key("group"), data)
    document = json.loads(bucket.get("manifest.json"))
    document["columns"]["files"]["group"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    bucket.put("manifest.json", json.dumps(document).encode())
    opened = open_dataset(DatasetLocation(columns.uri, columns.manifest.version))
    assert ["expected those of version" in line for line in problems(opened)] == [True]


def test_columns_of_another_number_of_samples(stored: tuple[Dataset, Dataset]) -> None:
    _, columns = stored
    bucket = Bucket(columns.version_uri)
    document = json.loads(bucket.get("manifest.json"))
    document["columns"]["rows"] = 11
    bucket.put("manifest.json", json.dumps(document).encode())
    with pytest.raises(IntegrityError, match="12 samples"):
        open_dataset(DatasetLocation(columns.uri, columns.manifest.version))


@pytest.mark.parametrize("chunk", [5, 12])
def test_the_version_is_that_of_one_document(
    stored: tuple[Dataset, Dataset], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As versions were computed before: of all samples at once."""
    monkeypatch.setattr(samples_module, "_CHUNK", chunk)
    manifest = stored[0].manifest
    content = {
        "format": datasets._CONTENT_FORMAT,
        "shards": {split: len(manifest.split_shards(split)) for split in SPLITS},
        "samples": [sample.model_dump(mode="json") for sample in manifest.samples],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert content_version(manifest.samples, manifest.shards) == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert content_version([], []) != manifest.version


def test_slices_and_elements(stored: tuple[Dataset, Dataset]) -> None:
    samples = stored[0].manifest.samples
    whole = list(samples)
    assert (samples[-1], list(samples[2:5]), list(samples[2:9][1:3])) == (whole[-1], whole[2:5], whole[3:5])
    assert all(isinstance(sample, Sample) for sample in samples)
    assert samples != Samples.of(whole[:-1])
    assert samples != Samples.of([*whole[:-1], whole[0]])
    with pytest.raises(IndexError):
        samples[12]
    assert list(Samples.of([])) == []
