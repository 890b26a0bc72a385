"""A dataset version in the bucket: written once, as a whole, after the version that it was added to; and verified."""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from nucleus.data.dataset import MANIFEST_FILE, Dataset, DatasetManifest, Shard, stored_manifest, version_of
from nucleus.data.samples import MOST_IN_MANIFEST, ColumnFile, SampleColumns, Samples, column_key
from nucleus.errors import IntegrityError, ObjectExistsError, ObjectNotFoundError
from nucleus.progress import Advance, no_progress, split_progress
from nucleus.storage.bucket import TEST_FILE, Bucket, check_conditional_writes

__all__ = ["claim_succession", "manifest_document", "upload_version", "verify_dataset"]

_SUCCESSION = "followed"
"""Folder of a dataset with a file for each version that was added to, which has the version that followed it."""
_FORMAT_WITH_SAMPLES = 3
"""Format of a manifest that holds its samples, as older versions of this package read it."""
_CLAIM_POLLS, _POLL_SECONDS = 20, 0.5
_AT_ONCE = 8
"""Shards that are verified at once."""


def upload_version(
    bucket: Bucket, manifest: DatasetManifest, write: Callable[[], list[Shard]], follows: str | None = None
) -> tuple[Dataset, bool]:
    """Write a version, shards first and manifest last.

    Args:
        bucket: The bucket at `s3://bucket/datasets/<name>`.
        manifest: Its manifest, without shards.
        write: Writes its shards into the bucket and returns them; not called if the version is there.
        follows: The version that it is added to, which no other one may follow; None for no such claim.

    Returns:
        The version in the bucket, and whether this call made it.

    Raises:
        ObjectExistsError: Another version follows that one.
        StorageError: The bucket cannot be read or written.
    """
    key = f"{manifest.version}/{MANIFEST_FILE}"
    try:
        return _existing(bucket, key)
    except ObjectNotFoundError:
        pass
    datasets = Bucket(bucket.uri.parent, single_writer=bucket.single_writer)
    check_conditional_writes(datasets, TEST_FILE)  # before gigabytes are sent
    manifest = manifest.model_copy(update={"shards": write()})
    if follows is not None:
        claim_succession(bucket, follows, manifest.version)
    document = manifest_document(bucket, manifest)
    try:
        bucket.put(key, document, if_absent=True)
    except ObjectExistsError:  # another import of the same content was faster
        return _existing(bucket, key)
    return Dataset(bucket.uri, stored_manifest(bucket, document, f"{bucket.uri}/{key}")), True


def manifest_document(bucket: Bucket, manifest: DatasetManifest) -> bytes:
    """Return the manifest as JSON; write the columns of its samples beside it, if they are many."""
    if len(manifest.samples) <= MOST_IN_MANIFEST:
        update: dict[str, object] = {"format": _FORMAT_WITH_SAMPLES, "columns": None}
        return manifest.model_copy(update=update).model_dump_json(indent=1, exclude={"columns"}).encode()
    columns = {}
    for name, data in manifest.samples.files().items():
        bucket.put(f"{manifest.version}/{column_key(name)}", data)
        columns[name] = ColumnFile(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    described = SampleColumns(rows=len(manifest.samples), files=columns)
    return (
        manifest.model_copy(update={"samples": Samples.of([]), "columns": described}).model_dump_json(indent=1).encode()
    )


def _existing(bucket: Bucket, key: str) -> tuple[Dataset, bool]:
    return Dataset(bucket.uri, stored_manifest(bucket, bucket.get(key), f"{bucket.uri}/{key}")), False


def claim_succession(bucket: Bucket, parent: str, version: str) -> None:
    """Record that `version` follows `parent`, before its manifest is written: only one import may add to a version.

    A claim whose version has no manifest after some seconds belongs to an import that was killed, and is replaced.

    Args:
        bucket: The bucket at `s3://bucket/datasets/<name>`.
        parent: The version that was added to.
        version: The version that is about to be written.

    Raises:
        ObjectExistsError: Another import has added to this version.
    """
    key, body = f"{_SUCCESSION}/{parent}", version.encode()
    try:
        bucket.put(key, body, if_absent=True)
    except ObjectExistsError as error:
        claimed, etag = bucket.get_tagged(key)
        if claimed != body and _appears(bucket, f"{claimed.decode(errors='replace')}/{MANIFEST_FILE}"):
            raise ObjectExistsError(
                f"Expected to be the only import that adds to {bucket.uri}@{parent}; another one was faster. Add to "
                f"what it made: nucleus data import SRC --into {bucket.uri}"
            ) from error
        bucket.put(key, body, if_match=etag)


def _appears(bucket: Bucket, key: str) -> bool:
    """Return whether an object is there, or another process writes it within some seconds."""
    for _ in range(_CLAIM_POLLS):
        if bucket.find(key) is not None:
            return True
        time.sleep(_POLL_SECONDS)
    return False


def verify_dataset(dataset: Dataset, advance: Advance = no_progress) -> list[str]:
    """Compare the size and SHA-256 of every shard, and the samples, with the manifest; return a line per problem.

    Args:
        dataset: The version.
        advance: Called with the bytes read and the total of all shards.

    Raises:
        StorageError: The bucket cannot be read.
    """
    bucket = Bucket(dataset.version_uri)

    def check(shard: Shard) -> str | None:
        try:
            data = bucket.get(shard.file)
        except ObjectNotFoundError:
            return f"{shard.file}: missing"
        if len(data) != shard.size or hashlib.sha256(data).hexdigest() != shard.sha256:
            return f"{shard.file}: expected {shard.size} bytes with SHA-256 {shard.sha256}; found other bytes"
        return None

    problems = _sample_problems(dataset)
    shards = dataset.manifest.shards
    shares = split_progress({shard.file: shard.size for shard in shards}, advance)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for shard, problem in zip(shards, pool.map(check, shards), strict=True):
            shares[shard.file](shard.size, shard.size)
            if problem:
                problems.append(problem)
    return problems


def _sample_problems(dataset: Dataset) -> list[str]:
    """Check that samples in columns, which are not read when a dataset is opened, give its version."""
    if dataset.manifest.columns is None:
        return []
    try:
        computed = version_of(dataset.manifest)
    except (IntegrityError, ObjectNotFoundError) as error:
        return [f"samples: {error}"]
    if computed == dataset.manifest.version:
        return []
    return [f"samples: expected those of version {dataset.manifest.version}; found those of {computed}"]
