"""Checks of a dataset version: that it can be trained on, and that the bucket still has what was imported."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from nucleus.data.dataset import Dataset, Shard, version_of
from nucleus.errors import DataError, IntegrityError, ObjectNotFoundError
from nucleus.progress import Advance, no_progress, split_progress
from nucleus.storage.bucket import Bucket
from nucleus.text import plural

__all__ = ["check_has_nuclei", "verify_dataset"]


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


def verify_dataset(dataset: Dataset, advance: Advance = no_progress) -> list[str]:
    """Compare the size and SHA-256 of every shard, and the samples, with the manifest; return a line per problem.

    `advance` is called with the bytes read and the total of all shards.
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
    with ThreadPoolExecutor(8) as pool:
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
