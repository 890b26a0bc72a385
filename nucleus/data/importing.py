"""Import of a folder or zip of annotated images as a dataset version in a bucket."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nucleus.config.names import clean_name
from nucleus.data.dataset import (
    DATASET_FORMAT,
    MANIFEST_FILE,
    SPLITS,
    Dataset,
    DatasetManifest,
    LeftOut,
    Sample,
    Shard,
    content_version,
    read_manifest,
)
from nucleus.data.images import Kind, decode_pixels, kind_of, open_pixels
from nucleus.data.layouts import Annotated, MaskForm, find_images
from nucleus.data.masks import MaskFacts, MaskLabels, labels_from_mask, labels_from_masks, mask_warnings
from nucleus.data.sampling import shard_count, stored_order
from nucleus.data.shards import encode_record, renamed_record, write_shard
from nucleus.data.sources import Source, open_source
from nucleus.data.splits import Fingerprint, fingerprint, group_images, split_images
from nucleus.errors import DataError, ImageError, ObjectExistsError, ObjectNotFoundError, UsageError
from nucleus.progress import Advance, no_progress, split_progress
from nucleus.storage.bucket import TEST_FILE, Bucket, check_conditional_writes
from nucleus.storage.files import sha256_of, temporary_folder
from nucleus.storage.uri import S3Uri

__all__ = ["Imported", "SplitOptions", "import_dataset"]


@dataclass(frozen=True)
class SplitOptions:
    """Options of the splits.

    Attributes:
        seed: Seed of the folds.
        val: Fraction of the images for validation, between 0 and 1.
        test: Fraction of the images for the test split, between 0 and 1.
        group_by: Pattern that is searched for in the titles of the images. Images with the same first group (or the
            same whole match, if the pattern has no group) stay in one split.
    """

    seed: int = 0
    val: float = 0.1
    test: float = 0.1
    group_by: re.Pattern[str] | None = None

    def __post_init__(self) -> None:
        if not (0 < self.val < 1 and 0 < self.test < 1 and self.val + self.test < 1):
            raise UsageError(
                f"Expected fractions above 0 that leave some for training; found val {self.val}, test {self.test}."
            )


@dataclass(frozen=True)
class Imported:
    """Result of an import.

    Attributes:
        dataset: The dataset version.
        created: Whether this import created the version; False if it existed already.
        warnings: What is unlikely in its masks, a sentence each, such as images without nuclei.
    """

    dataset: Dataset
    created: bool
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Prepared:
    """An image that was read, checked and written to a temporary file; only its fingerprint stays in memory."""

    title: str
    given_split: str | None
    kind: Kind
    shape: tuple[int, int]
    masks: MaskFacts
    image_sha256: str
    labels_sha256: str
    fingerprint: Fingerprint
    spooled: Path


def import_dataset(
    src: Path,
    uri: S3Uri,
    options: SplitOptions,
    advance: Advance = no_progress,
    upload: Advance = no_progress,
    *,
    single_writer: bool = False,
) -> Imported:
    """Import a folder or zip as a version of the dataset at `uri`.

    The version is computed from the content, so importing the same images again gives the same version and changes
    nothing. The manifest is written last, so no command sees an incomplete version.

    Args:
        src: Folder or zip in one of the layouts of `nucleus.data.layouts`.
        uri: `s3://bucket/datasets/<name>`.
        options: Options of the splits.
        advance: Called with the number of images read and their total.
        upload: Called with the bytes of shards sent and their total.
        single_writer: Whether nobody else writes at the same time, so that a server may lack conditional writes.

    Raises:
        DataError: The source contains no usable images, or too few to split.
        OutputError: The folder for temporary files (TMPDIR) has no room.
        StorageError: The bucket cannot be read or written.
    """
    bucket = Bucket(uri, single_writer=single_writer)
    bucket.check()
    source = open_source(src)
    layout = find_images(source)
    with temporary_folder("import") as spool:
        prepared, unusable = _prepare_all(source, layout.images, spool, advance)
        left_out = [*(LeftOut(title=path, reason=reason) for path, reason in layout.left_out.items()), *unusable]
        unique, duplicates = _without_duplicates(prepared)
        if not unique:
            reasons = "; ".join(f"{item.title}: {item.reason}" for item in left_out[:3])
            raise DataError(f"Expected usable images in {source.title}; found none ({reasons}).")
        samples = _samples(unique, options)
        shards = _write_shards(samples, unique, spool)
        manifest = DatasetManifest(
            format=DATASET_FORMAT,
            name=uri.name,
            version=content_version(samples, shards),
            created=datetime.now(UTC).isoformat(),
            source=Path(source.title).name,
            layout=layout.name,
            seed=options.seed,
            samples=samples,
            shards=shards,
            duplicates=duplicates,
            left_out=left_out,
        )
        warnings = mask_warnings([image.masks for image in unique], manifest.splits_without_nuclei)
        return replace(_upload(bucket, manifest, spool, upload), warnings=warnings)


def _prepare_all(
    source: Source, images: Sequence[Annotated], spool: Path, advance: Advance
) -> tuple[list[_Prepared], list[LeftOut]]:
    def prepare(numbered: tuple[int, Annotated]) -> _Prepared | LeftOut:
        index, image = numbered
        try:
            return _prepare(source, image, spool / f"{index}.record")
        except ImageError as error:
            return LeftOut(title=image.title, reason=str(error))

    prepared: list[_Prepared] = []
    left_out: list[LeftOut] = []
    with ThreadPoolExecutor() as pool:
        for done, result in enumerate(pool.map(prepare, enumerate(images)), 1):
            if isinstance(result, LeftOut):
                left_out.append(result)
            else:
                prepared.append(result)
            advance(done, len(images))
    return prepared, left_out


def _prepare(source: Source, annotated: Annotated, spooled: Path) -> _Prepared:
    if annotated.problem:
        raise ImageError(annotated.problem)
    if not annotated.masks:
        raise ImageError(f"Expected a mask for {annotated.image}; found none.")
    file = open_pixels(source.read(annotated.image), annotated.image)
    image = decode_pixels(file)
    height, width = image.shape[:2]
    masks = _labels(source, annotated, (height, width), file.facts.orientation)
    # The name is unknown until all titles have been read, so it is filled in later.
    spooled.write_bytes(encode_record("", image, masks.labels))
    return _Prepared(
        title=annotated.title,
        given_split=annotated.given_split,
        kind=kind_of(image),
        shape=(height, width),
        masks=MaskFacts.of(masks, labels_expected=annotated.form is MaskForm.LABELS),
        image_sha256=_pixel_sum(image),
        labels_sha256=_pixel_sum(masks.labels),
        fingerprint=fingerprint(image),
        spooled=spooled,
    )


def _labels(source: Source, annotated: Annotated, shape: tuple[int, int], orientation: int) -> MaskLabels:
    masks = [(entry, source.read(entry)) for entry in annotated.masks]
    if annotated.form is MaskForm.PER_NUCLEUS:
        return labels_from_masks(masks, shape, orientation)
    (mask,) = masks
    return labels_from_mask(mask, shape, orientation)


def _pixel_sum(pixels: NDArray[np.generic]) -> str:
    """Return the SHA-256 of an array's shape and values."""
    digest = hashlib.sha256(repr((pixels.shape, pixels.dtype.str)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _without_duplicates(prepared: list[_Prepared]) -> tuple[list[_Prepared], list[LeftOut]]:
    """Keep the first of identical images, but prefer images in the source's test folder."""
    first: dict[str, _Prepared] = {}
    duplicates = []
    for image in sorted(prepared, key=lambda image: image.given_split != "test"):
        kept = first.setdefault(image.image_sha256, image)
        if kept is not image:
            same = "and labels" if kept.labels_sha256 == image.labels_sha256 else "but other labels"
            duplicates.append(LeftOut(title=image.title, reason=f"same pixels {same} as {kept.title}"))
    return list(first.values()), duplicates


def _samples(images: list[_Prepared], options: SplitOptions) -> list[Sample]:
    """Return the samples of a dataset, in the order of the images."""
    groups = group_images([image.fingerprint for image in images], _pictures(images, options.group_by))
    splits = split_images(
        [image.kind for image in images],
        groups,
        [image.given_split for image in images],
        seed=options.seed,
        val=options.val,
        test=options.test,
    )
    names = _unique_names([image.title for image in images])
    return [
        Sample(
            name=name,
            split=split,
            kind=image.kind,
            group=group,
            height=image.shape[0],
            width=image.shape[1],
            nuclei=image.masks.nuclei,
            image_sha256=image.image_sha256,
            labels_sha256=image.labels_sha256,
        )
        for image, name, group, split in zip(images, names, groups, splits, strict=True)
    ]


def _pictures(images: list[_Prepared], pattern: re.Pattern[str] | None) -> list[str | None]:
    if pattern is None:
        return [None] * len(images)
    matches = [pattern.search(image.title) for image in images]
    return [match and match.group(1 if pattern.groups else 0) for match in matches]


def _unique_names(titles: list[str]) -> list[str]:
    used: set[str] = set()
    names = []
    for title in titles:
        cleaned = name = clean_name(title)
        number = 2
        while name in used:
            name = f"{cleaned}-{number}"
            number += 1
        used.add(name)
        names.append(name)
    return names


def _write_shards(samples: list[Sample], images: list[_Prepared], spool: Path) -> list[Shard]:
    """Write the samples of each split, in their stored order, to its shards in turn."""
    shards = []
    for split in SPLITS:
        members = [i for i, sample in enumerate(samples) if sample.split == split]
        total = sum(images[i].spooled.stat().st_size for i in members)
        count = shard_count(len(members), total)
        order = [members[i] for i in stored_order(len(members))]
        for number in range(count):
            path = spool / f"{split}-{number:05d}-of-{count:05d}.tfrecord"
            chosen = order[number::count]
            write_shard(path, (renamed_record(images[i].spooled.read_bytes(), samples[i].name) for i in chosen))
            shards.append(
                Shard(
                    file=path.name,
                    split=split,
                    records=len(chosen),
                    size=path.stat().st_size,
                    sha256=sha256_of(path),
                )
            )
    return shards


def _upload(bucket: Bucket, manifest: DatasetManifest, spool: Path, advance: Advance) -> Imported:
    key = f"{manifest.version}/{MANIFEST_FILE}"
    try:
        return _existing(bucket, key)
    except ObjectNotFoundError:
        pass
    datasets = Bucket(bucket.uri.parent, single_writer=bucket.single_writer)
    check_conditional_writes(datasets, TEST_FILE)  # before gigabytes are sent
    shares = split_progress({shard.file: shard.size for shard in manifest.shards}, advance)

    def put(file: str) -> None:
        bucket.put(f"{manifest.version}/{file}", spool / file, advance=shares[file])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, shares))
    try:
        bucket.put(key, manifest.model_dump_json(indent=1).encode(), if_absent=True)
    except ObjectExistsError:  # another import of the same content was faster
        return _existing(bucket, key)
    return Imported(Dataset(bucket.uri, manifest), created=True)


def _existing(bucket: Bucket, key: str) -> Imported:
    return Imported(Dataset(bucket.uri, read_manifest(bucket.get(key), f"{bucket.uri}/{key}")), created=False)
