"""Datasets in the bucket: the manifest of a version, and how versions are located, listed and opened."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from nucleus.config.names import check_name, parse_reference
from nucleus.data.origins import UNSTATED, DataOrigin, DataSource
from nucleus.data.samples import SPLITS, Count, Sample, SampleColumns, SampleList, Samples, Sha256
from nucleus.errors import DataError, IntegrityError, ObjectNotFoundError
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import read_document
from nucleus.storage.uri import S3Uri, bucket_from_environment, parse_uri
from nucleus.text import plural

__all__ = [
    "DATASETS",
    "DATASET_FORMAT",
    "MANIFEST_FILE",
    "Addition",
    "DamagedDataset",
    "Dataset",
    "DatasetLocation",
    "DatasetManifest",
    "LeftOut",
    "Shard",
    "check_has_nuclei",
    "content_version",
    "list_datasets",
    "list_versions",
    "locate_dataset",
    "open_dataset",
    "read_manifest",
    "stored_manifest",
    "version_of",
]


DATASET_FORMAT = 4
"""2: with `additions`. 3: with `stated`. 4: with `columns`, if it has many samples."""
_CONTENT_FORMAT = 1
_SPLIT = rf"({'|'.join(SPLITS)})"

DATASETS = "datasets/"
"""Prefix of all datasets in the project's bucket; in the cache, the folder of shards."""
MANIFEST_FILE = "manifest.json"
_MANIFEST_KEY = re.compile(rf"[0-9a-f]{{12}}/{re.escape(MANIFEST_FILE)}")

Version = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """A TFRecord file of a split. Of S shards, shard s stores image i * S + s as record i (see `sampling`).

    Attributes:
        file: File name, `<split>-<s>-of-<S>.tfrecord`, five digits each.
        split: `train`, `val` or `test`.
        records: Number of records.
        size: Size of the file, bytes.
        sha256: SHA-256 of the file.
    """

    file: Annotated[str, Field(pattern=rf"^{_SPLIT}-\d{{5}}-of-\d{{5}}\.tfrecord$")]
    split: Annotated[str, Field(pattern=rf"^{_SPLIT}$")]
    records: Annotated[int, Field(ge=1)]
    size: Annotated[int, Field(ge=1)]
    sha256: Sha256


class LeftOut(_Frozen):
    """An image of the source that is not in the dataset, and why.

    Attributes:
        title: Name of the image in the source.
        reason: Why it was left out.
    """

    title: str
    reason: str


class Addition(_Frozen):
    """Images that were added to a version of a dataset, which gave the next one.

    Attributes:
        parent: Version that they were added to.
        created: Time of the addition, ISO 8601.
        source: Name of the imported folder or zip.
        layout: Name of the layout that was recognised.
        seed: Seed of the splits of the added images.
        added: Number of added images.
        replaced: Number of images that were there, and whose labels were replaced.
        known: Number of images that were there with the same labels.
        stated: What was stated about its images and labels.
        relabelled: Names of the images whose labels were replaced.
    """

    parent: Version
    created: str
    source: str
    layout: str
    seed: int
    added: Count
    replaced: Count
    known: Count
    stated: DataOrigin = UNSTATED
    relabelled: list[str] = []


class DatasetManifest(_Frozen):
    """Description of a dataset version: its samples, its shards with their SHA-256, and its origin.

    Attributes:
        format: Format of this document.
        name: Name of the dataset.
        version: `content_version` of the samples and shards.
        created: Time of the import, ISO 8601.
        source: Name of the folder or zip that was imported first.
        layout: Name of the layout that was recognised in it.
        seed: Seed of its splits.
        samples: All images: those of the first import, then what each addition added.
        shards: All shards.
        duplicates: Images with the same pixels as another one of their source, which were removed.
        left_out: Images that could not be used.
        additions: What was added since then, the oldest first.
        stated: What was stated about the images and labels that were imported first.
        columns: Where the samples stand, if they are many; None if in this document.
    """

    format: int
    name: str
    version: Version
    created: str
    source: str
    layout: str
    seed: int
    samples: SampleList
    shards: list[Shard]
    duplicates: list[LeftOut]
    left_out: list[LeftOut]
    additions: list[Addition] = []
    stated: DataOrigin = UNSTATED
    columns: SampleColumns | None = None

    @property
    def parent(self) -> str | None:
        """The version that this one was added to; None if it was imported as a whole."""
        return self.additions[-1].parent if self.additions else None

    @property
    def sources(self) -> list[str]:
        """The names of all imported folders and zips, the first one first, each once."""
        return list(dict.fromkeys([self.source, *(addition.source for addition in self.additions)]))

    @property
    def all_stated(self) -> list[DataOrigin]:
        """What was stated at each import, the first one first."""
        return [self.stated, *(addition.stated for addition in self.additions)]

    @property
    def sample_sources(self) -> list[int]:
        """The import that each image is from, in the order of `samples`: 0 for the first, n for the nth addition."""
        added = [addition.added for addition in self.additions]
        return [n for n, images in enumerate([len(self.samples) - sum(added), *added]) for _ in range(images)]

    @property
    def data_sources(self) -> list[DataSource]:
        """The imports that this version has images or labels of, with what was stated about them; equal ones as one."""
        imports = [(self.source, self.stated), *((each.source, each.stated) for each in self.additions)]
        added = [addition.added for addition in self.additions]
        images: Counter[tuple[str, DataOrigin]] = Counter()
        for source, number in zip(imports, [len(self.samples) - sum(added), *added], strict=True):
            images[source] += number
        new = {name: imports[n] for n, addition in enumerate(self.additions, 1) for name in addition.relabelled}
        names = self.samples.texts("name") if new else []
        pairs = ((new.get(name), imports[n]) for name, n in zip(names, self.sample_sources if new else [], strict=True))
        labels = Counter(source for source, own in pairs if source is not None and source != own)
        for each in self.additions:
            labels[each.source, each.stated] += 0 if each.relabelled else each.replaced  # older ones have no names
        return [
            DataSource(name=name, images=images[source], labels=labels[source], **stated.model_dump())
            for source in dict.fromkeys(imports)
            if images[source] or labels[source]
            for name, stated in [source]
        ]

    def split_samples(self, split: str) -> Samples:
        """Return the samples of a split."""
        return self.samples.where("split", split)

    def split_shards(self, split: str) -> list[Shard]:
        """Return the shards of a split, ordered by number."""
        return sorted((shard for shard in self.shards if shard.split == split), key=lambda shard: shard.file)

    @property
    def splits_without_nuclei(self) -> list[str]:
        """Splits of which no image has a nucleus, those without images included."""
        return [split for split in SPLITS if not self.split_samples(split).nuclei]


class _OfSplit(Protocol):
    """A shard, or the plan of one: all that matters is its split."""

    @property
    def split(self) -> str:
        """`train`, `val` or `test`."""


def content_version(samples: Sequence[Sample], shards: Iterable[_OfSplit], stated: Sequence[DataOrigin] = ()) -> str:
    """Return the version of a dataset with this content: 12 hexadecimal digits of a SHA-256.

    It depends on the samples (pixels, labels, names, splits, kinds, groups), on the number of shards, and on what is
    stated about each import (if anything is), but not on the time of the import, nor on the seed if the splits are the
    same. It is that of one JSON document, of which only some samples at a time are in memory.
    """
    counts = Counter(shard.split for shard in shards)
    rest: dict[str, Any] = {"shards": {split: counts[split] for split in SPLITS}}
    if any(each != UNSTATED for each in stated):
        rest["stated"] = [each.model_dump(mode="json") for each in stated]
    digest = hashlib.sha256(f'{{"format":{_CONTENT_FORMAT},"samples":['.encode())
    for number, some in enumerate(Samples.of(samples).json()):
        digest.update(b"," if number else b"")
        digest.update(some.encode())
    digest.update(b"]," + _canonical(rest)[1:])
    return digest.hexdigest()[:12]


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def read_manifest(data: bytes, where: str) -> DatasetManifest:
    """Parse and check a manifest. Raises `DataError` if it is damaged or newer than this package."""
    return read_document(
        DatasetManifest, data, what="a dataset manifest", where=where, newest=DATASET_FORMAT, error=DataError
    )


@dataclass(frozen=True)
class DatasetLocation:
    """Address of a dataset and the requested version.

    Attributes:
        uri: `s3://bucket/datasets/<name>`.
        ref: A version, or `latest` for the last import.
    """

    uri: S3Uri
    ref: str


@dataclass(frozen=True)
class Dataset:
    """One version of a dataset: its address and its manifest."""

    uri: S3Uri
    manifest: DatasetManifest

    @property
    def version_uri(self) -> S3Uri:
        """Folder of this version."""
        return self.uri / self.manifest.version

    def __str__(self) -> str:
        return f"{self.uri}@{self.manifest.version}"

    def __repr__(self) -> str:
        counts = ", ".join(f"{split} {len(self.manifest.split_samples(split))}" for split in SPLITS)
        return f"<Dataset {self}: images {counts}>"


def locate_dataset(text: str, bucket: str | None = None) -> DatasetLocation:
    """Parse `NAME[@VERSION]`, in `bucket` or NUCLEUS_BUCKET, or `s3://bucket/prefix/NAME[@VERSION]`.

    Raises:
        UriError: Neither of these forms, or an invalid name.
    """
    if "://" not in text:
        reference = parse_reference(text, "dataset")
        return DatasetLocation(bucket_from_environment(bucket) / DATASETS / reference.name, reference.ref)
    base, _, ref = text.partition("@")
    uri = parse_uri(base)
    check_name(uri.name, "dataset")
    return DatasetLocation(uri, ref or "latest")


@dataclass(frozen=True)
class DamagedDataset:
    """A dataset version whose manifest cannot be read.

    Attributes:
        uri: `s3://bucket/datasets/<name>`.
        version: The version.
        problem: Error message, with the address of the manifest.
    """

    uri: S3Uri
    version: str
    problem: str


def list_datasets(uri: S3Uri, on_damaged: Callable[[DamagedDataset], None] | None = None) -> list[Dataset]:
    """Return the latest version of every dataset in the bucket at `uri`, ordered by name.

    Args:
        uri: `s3://bucket[/prefix]`.
        on_damaged: As for `list_versions`. The latest version is then the latest of those that can be read.

    Raises:
        DataError, IntegrityError: A manifest is damaged, and `on_damaged` is not given.
    """
    found = (list_versions(uri / DATASETS / name, on_damaged) for name in Bucket(uri).folders(DATASETS))
    return [versions[-1] for versions in found if versions]


def list_versions(uri: S3Uri, on_damaged: Callable[[DamagedDataset], None] | None = None) -> list[Dataset]:
    """Return every version of the dataset at `uri`, ordered by time of import.

    Args:
        uri: `s3://bucket/datasets/<name>`.
        on_damaged: Called for each version whose manifest cannot be read, which is then left out.

    Raises:
        DataError, IntegrityError: A manifest is damaged, and `on_damaged` is not given.
    """
    bucket = Bucket(uri)
    keys = [item.key for item in bucket.objects("") if _MANIFEST_KEY.fullmatch(item.key)]
    datasets = []
    for version in (key.partition("/")[0] for key in keys):
        try:
            datasets.append(_read(bucket, version))
        except (DataError, IntegrityError) as error:
            if on_damaged is None:
                raise
            on_damaged(DamagedDataset(uri, version, str(error)))
    return sorted(datasets, key=lambda dataset: dataset.manifest.created)


def open_dataset(location: DatasetLocation) -> Dataset:
    """Read the manifest of a version.

    Raises:
        DataError: No such dataset or version.
        IntegrityError: The manifest does not match its version; for `latest`, a manifest of any version is damaged.
    """
    if location.ref == "latest":
        versions = list_versions(location.uri)
        if not versions:
            raise DataError(
                f"Expected a dataset at {location.uri}; none was imported there. "
                f"Run: nucleus data import SRC {location.uri}"
            )
        return versions[-1]
    try:
        return _read(Bucket(location.uri), location.ref)
    except ObjectNotFoundError as error:
        raise DataError(
            f"Expected version {location.ref!r} of the dataset {location.uri}; there is none. "
            f"Run: nucleus data list {location.uri}"
        ) from error


def _read(bucket: Bucket, version: str) -> Dataset:
    """Read the manifest of a version, and check that its samples give this version.

    Samples in columns are read when they are needed, and each column is then compared with its SHA-256 in the manifest;
    `verify_dataset` also checks that they give this version.
    """
    where = f"{bucket.uri}/{version}/{MANIFEST_FILE}"
    manifest = stored_manifest(bucket, bucket.get(f"{version}/{MANIFEST_FILE}"), where)
    computed = version_of(manifest) if manifest.columns is None else manifest.version
    if not version == manifest.version == computed:
        raise IntegrityError(
            f"Expected the manifest of version {version} at {where}; its samples are those of {computed}. It was "
            "damaged or replaced: import the images again, or use another version."
        )
    return Dataset(bucket.uri, manifest)


def check_has_nuclei(dataset: Dataset) -> None:
    """Check that a dataset can be trained on: a model that finds nothing would be perfect on images without nuclei.

    Raises:
        DataError: No image of the training or the validation split has a nucleus.
    """
    for split in dataset.manifest.splits_without_nuclei:
        if split == "test":  # it decides nothing in training; its scores are undefined
            continue
        images = plural(len(dataset.manifest.split_samples(split)), "image")
        raise DataError(
            f"Expected nuclei in the split {split!r} of {dataset}; found {images} without a single nucleus. Look at "
            f"its masks with: nucleus data show {dataset} --out examples.png. If they are right, import more images, "
            "or get others into this split. Run: nucleus data import SRC URI --seed 1"
        )


def version_of(manifest: DatasetManifest) -> str:
    """Return the version that the content of a manifest gives."""
    return content_version(manifest.samples, manifest.shards, manifest.all_stated)


def stored_manifest(bucket: Bucket, data: bytes, where: str) -> DatasetManifest:
    """Parse the manifest of a version of the dataset at a bucket's prefix, with its samples, wherever they stand.

    Raises:
        DataError: It is damaged or newer than this package.
        IntegrityError: Its columns have another number of samples than its shards.
    """
    manifest = read_manifest(data, where)
    if manifest.columns is None:
        return manifest
    records = sum(shard.records for shard in manifest.shards)
    if manifest.columns.rows != records:
        raise IntegrityError(
            f"Expected columns of {records} samples in {where}, as many as its shards have; found "
            f"{manifest.columns.rows}. It was damaged or replaced: import the images again, or use another version."
        )
    samples = Samples.stored(bucket.uri / manifest.version, manifest.columns)
    return manifest.model_copy(update={"samples": samples})
