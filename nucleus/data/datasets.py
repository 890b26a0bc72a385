"""Dataset versions in a bucket: find, list and verify them."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

from nucleus.config.names import check_name, parse_reference
from nucleus.data.manifest import DatasetManifest, Shard, content_version, read_manifest
from nucleus.errors import DataError, IntegrityError, ObjectNotFoundError
from nucleus.progress import Advance, no_progress, share
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri, bucket_from_environment, parse_uri

__all__ = ["Dataset", "DatasetLocation", "list_versions", "locate_dataset", "open_dataset", "verify_dataset"]

_MANIFEST = "manifest.json"
_MANIFEST_KEY = re.compile(r"[0-9a-f]{12}/manifest\.json")


@dataclass(frozen=True)
class DatasetLocation:
    """Where the versions of a dataset are, and which one is meant.

    Attributes:
        uri: `s3://bucket/datasets/<name>`.
        ref: A version, or `latest` for the one that was imported last.
    """

    uri: S3Uri
    ref: str


@dataclass(frozen=True)
class Dataset:
    """One version of a dataset: its place and its manifest."""

    uri: S3Uri
    manifest: DatasetManifest

    @property
    def version_uri(self) -> S3Uri:
        """The folder of this version."""
        return self.uri / self.manifest.version

    def __str__(self) -> str:
        return f"{self.uri}@{self.manifest.version}"


def locate_dataset(text: str, bucket: str | None = None) -> DatasetLocation:
    """Read `NAME[@VERSION]`, in `bucket` or NUCLEUS_BUCKET, or `s3://bucket/prefix/NAME[@VERSION]`.

    Raises:
        UriError: Neither form, or a name that cannot be one.
    """
    if "://" not in text:
        reference = parse_reference(text, "dataset")
        return DatasetLocation(bucket_from_environment(bucket) / "datasets" / reference.name, reference.ref)
    base, _, ref = text.partition("@")
    uri = parse_uri(base)
    check_name(uri.name, "dataset")
    return DatasetLocation(uri, ref or "latest")


def list_versions(uri: S3Uri) -> list[Dataset]:
    """Every version of the dataset at `uri`, the one imported last at the end."""
    bucket = Bucket(uri)
    keys = [item.key for item in bucket.objects("") if _MANIFEST_KEY.fullmatch(item.key)]
    datasets = [_read(bucket, key.partition("/")[0]) for key in keys]
    return sorted(datasets, key=lambda dataset: dataset.manifest.created)


def open_dataset(location: DatasetLocation) -> Dataset:
    """Read the manifest of a version.

    Raises:
        DataError: No such dataset or version.
        IntegrityError: The manifest does not describe the version that it stands for.
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
    """Read the manifest of a version, and compute from what it says of the samples whether it is this version's."""
    where = f"{bucket.uri}/{version}/{_MANIFEST}"
    manifest = read_manifest(bucket.get(f"{version}/{_MANIFEST}"), where)
    computed = content_version(manifest.samples, manifest.shards)
    if not version == manifest.version == computed:
        raise IntegrityError(
            f"Expected the manifest of version {version} at {where}; its samples are those of {computed}. It was "
            "damaged or replaced: import the images again, or take another version."
        )
    return Dataset(bucket.uri, manifest)


def verify_dataset(dataset: Dataset, advance: Advance = no_progress) -> list[str]:
    """Read every shard and compare size and SHA-256 with the manifest; return what is wrong, a line a shard.

    `advance` is told the bytes of the shards that were read, and of all.
    """
    bucket = Bucket(dataset.version_uri)

    def check(shard: Shard) -> str | None:
        try:
            data = bucket.get(shard.file)
        except ObjectNotFoundError:
            return f"{shard.file}: missing"
        if len(data) != shard.size or sha256(data).hexdigest() != shard.sha256:
            return f"{shard.file}: expected {shard.size} bytes with SHA-256 {shard.sha256}; found others"
        return None

    problems = []
    shards = dataset.manifest.shards
    shares = share({shard.file: shard.size for shard in shards}, advance)
    with ThreadPoolExecutor(8) as pool:
        for shard, problem in zip(shards, pool.map(check, shards), strict=True):
            shares[shard.file](shard.size, shard.size)
            if problem:
                problems.append(problem)
    return problems
