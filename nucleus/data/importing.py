"""Import of a folder or zip of annotated images as a dataset version in a bucket."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from nucleus.config.names import clean_name, unique_names
from nucleus.data.cache import ShardCache
from nucleus.data.dataset import (
    DATASET_FORMAT,
    Addition,
    Dataset,
    DatasetLocation,
    DatasetManifest,
    LeftOut,
    content_version,
    open_dataset,
)
from nucleus.data.dataset_storage import upload_version
from nucleus.data.fingerprints import Fingerprint
from nucleus.data.grouping import group_images, join_groups, picture_names
from nucleus.data.intake import SourceImage, SourceImages, SourceOptions, read_source
from nucleus.data.masks import mask_warnings
from nucleus.data.origins import UNSTATED, DataOrigin
from nucleus.data.samples import SPLITS, Sample, Samples
from nucleus.data.shards import RecordPlace, ShardPlan, plan_shards
from nucleus.data.splits import SplitOptions, split_images
from nucleus.data.spooling import Spool, Spread, opened_spool
from nucleus.errors import ObjectExistsError
from nucleus.progress import Advance, no_progress
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri
from nucleus.text import NOT_STATED, plural

__all__ = ["Imported", "add_to_dataset", "import_dataset"]

_ATTEMPTS = 10
"""How often an import adds to the latest version while others add to it too."""
_MOST_NAMED = 5


@dataclass(frozen=True)
class Imported:
    """Result of an import.

    Attributes:
        dataset: The dataset version.
        created: Whether this import created the version; False if it existed already.
        warnings: What is unlikely in its masks, and what could not be done, a sentence each.
        duplicates: Images of the source with the same pixels as another one of it.
        left_out: Images of the source that could not be used.
        addition: What was added to an older version, if the images were.
        read_before: Number of images that an import which was broken off had read; for an import that is spread over
            workers.
    """

    dataset: Dataset
    created: bool
    warnings: list[str] = field(default_factory=list)
    duplicates: list[LeftOut] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    addition: Addition | None = None
    read_before: int = 0


_Record = tuple[Sample, RecordPlace]
"""A sample, and where its record is."""


def import_dataset(
    src: Path | S3Uri,
    uri: S3Uri,
    options: SplitOptions,
    advance: Advance = no_progress,
    upload: Advance = no_progress,
    *,
    stated: DataOrigin = UNSTATED,
    single_writer: bool = False,
    reading: SourceOptions | None = None,
    spread: Spread | None = None,
) -> Imported:
    """Import a folder or zip as a version of the dataset at `uri`.

    The version is computed from the content, so importing the same images again gives the same version and changes
    nothing. The manifest is written last, so no command sees an incomplete version.

    Args:
        src: Folder or zip in one of the layouts of `nucleus.data.layouts`, or the URI of a prefix or zip.
        uri: `s3://bucket/datasets/<name>`.
        options: Options of the splits.
        advance: Called with the number of images read and their total.
        upload: Called with the bytes of shards sent and their total.
        stated: What is stated about the images and labels of the source; it is a part of the content.
        single_writer: Whether nobody else writes at the same time, so that a server may lack conditional writes.
        reading: Options of how the source is read.
        spread: Applies functions to items in workers, such as `job.spread_on_cluster`; None for this process alone.
            The version is the same.

    Raises:
        DataError: The source contains no usable images, or too few to split; or a worker does not see them.
        OutputError: The folder for temporary files (TMPDIR) has no room.
        StorageError: The bucket cannot be read or written.
    """
    bucket = Bucket(uri, single_writer=single_writer)
    bucket.check()
    with opened_spool(bucket, src, None, spread) as spool:
        found = read_source(src, spool.read, advance, reading)
        warnings: list[str] = []
        samples = _samples(found.images, options, warnings.append)
        plans = _planned([(sample, image.record) for sample, image in zip(samples, found.images, strict=True)])
        manifest = DatasetManifest(
            format=DATASET_FORMAT,
            name=uri.name,
            version=content_version(samples, plans, [stated]),
            created=datetime.now(UTC).isoformat(),
            source=found.source,
            layout=found.layout,
            seed=options.seed,
            samples=Samples.of(samples),
            shards=[],
            duplicates=found.duplicates,
            left_out=found.left_out,
            stated=stated,
        )
        warnings += mask_warnings([image.masks for image in found.images], manifest.splits_without_nuclei)
        made = upload_version(bucket, manifest, lambda: spool.write(manifest.version, plans, upload))
        warnings += spool.finish()
        return Imported(*made, warnings, found.duplicates, found.left_out, read_before=spool.read_before)


def add_to_dataset(
    src: Path | S3Uri,
    into: DatasetLocation,
    options: SplitOptions,
    cache: ShardCache,
    advance: Advance = no_progress,
    copied: Advance = no_progress,
    upload: Advance = no_progress,
    *,
    stated: DataOrigin = UNSTATED,
    single_writer: bool = False,
    reading: SourceOptions | None = None,
    spread: Spread | None = None,
) -> Imported:
    """Add a folder or zip to a version of a dataset, which gives a new version; the old one stays as it is.

    The old images keep their groups and splits, and their records are copied byte for byte. An added image that belongs
    to one of their groups goes to its split; it is left out if it would join groups of several splits. The others are
    split among themselves by `options`; if fewer than three of them are independent, they are for training. An image
    that is there already (same pixels) is not added again; if its labels differ, they replace those that are there.

    The version follows from the old one, the source and the options. If nothing is new, it is the old one.

    Args:
        src: Folder or zip in one of the layouts of `nucleus.data.layouts`, or the URI of a prefix or zip.
        into: The dataset and its version. If another import adds to `latest` at the same time, this one adds to the
            version that the other one made.
        options: Options of the splits of the added images. In the names of the old images, which are in lower case,
            `group_by` is searched for without regard to case.
        cache: Cache of shards.
        advance: Called with the number of images read and their total.
        copied: Called with the number of old images copied and their total.
        upload: Called with the bytes of shards sent and their total.
        stated: What is stated about the images and labels of the source; it is a part of the content.
        single_writer: Whether nobody else writes at the same time, so that a server may lack conditional writes.
        reading: Options of how the source is read.
        spread: As for `import_dataset`; each worker has a cache of shards of its own.

    Raises:
        DataError: There is no such dataset or version, or the source contains no usable images.
        ObjectExistsError: Other imports add to the dataset all the time.
        OutputError: The folder for temporary files (TMPDIR) has no room.
        StorageError: The bucket cannot be read or written.
    """
    bucket = Bucket(into.uri, single_writer=single_writer)
    parent = open_dataset(into)
    with opened_spool(bucket, src, cache, spread) as spool:
        found = read_source(src, spool.read, advance, reading)
        for _ in range(_ATTEMPTS):
            manifest, plans, told = _grown(parent, found, options, stated, spool, copied)
            told = replace(told, read_before=spool.read_before)
            if manifest is None:
                return replace(told, warnings=[*told.warnings, *spool.finish()])
            follows = parent.manifest.version if into.ref == "latest" else None
            write = partial(spool.write, manifest.version, plans, upload)
            try:
                dataset, created = upload_version(bucket, manifest, write, follows)
                left = spool.finish()
                return replace(told, dataset=dataset, created=created, warnings=[*told.warnings, *left])
            except ObjectExistsError as error:  # another import has added to this version
                taken = error
            parent = open_dataset(into)
    raise taken


def _samples(images: list[SourceImage], options: SplitOptions, warn: Callable[[str], None]) -> list[Sample]:
    """Return the samples of a dataset, in the order of the images."""
    pictures = picture_names([image.title for image in images], options.group_by)
    groups = group_images([image.fingerprint for image in images], pictures, warn=warn)
    splits = _split(images, groups, options)
    names = unique_names([image.title for image in images])
    return [_sample(*facts) for facts in zip(images, names, groups, splits, strict=True)]


def _split(images: list[SourceImage], groups: list[int], options: SplitOptions, *, few: bool = False) -> list[str]:
    return split_images(
        [image.kind for image in images],
        groups,
        [image.given_split for image in images],
        seed=options.seed,
        val=options.val,
        test=options.test,
        few=few,
    )


def _sample(image: SourceImage, name: str, group: int, split: str) -> Sample:
    return Sample(
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


def _planned(records: Sequence[_Record]) -> list[ShardPlan]:
    """Return the shards of all splits."""
    splits: dict[str, list[tuple[RecordPlace, str]]] = {split: [] for split in SPLITS}
    for sample, place in records:
        splits[sample.split].append((place, sample.name))
    return [plan for split, members in splits.items() for plan in plan_shards(split, members)]


def _grown(
    parent: Dataset,
    found: SourceImages,
    options: SplitOptions,
    stated: DataOrigin,
    spool: Spool,
    copied: Advance,
) -> tuple[DatasetManifest | None, list[ShardPlan], Imported]:
    """Return the manifest of a version with what is added to it, None if nothing is; its shards; and the rest."""
    there = {sample.image_sha256: sample for sample in parent.manifest.samples}
    fresh = [image for image in found.images if image.image_sha256 not in there]
    both = {image.image_sha256: image for image in found.images if image.image_sha256 in there}
    changed = {key: image for key, image in both.items() if image.labels_sha256 != there[key].labels_sha256}
    places, prints = spool.copied(parent, copied, compare=bool(fresh)) if fresh or changed else ([], [])
    remarks: list[str] = []
    added, between = _joined(parent.manifest, prints, fresh, options, remarks.append) if fresh else ([], [])
    found = replace(found, left_out=[*found.left_out, *between])
    addition = Addition(
        parent=parent.manifest.version,
        created=_after(parent.manifest.created),
        source=found.source,
        layout=found.layout,
        seed=options.seed,
        added=len(added),
        replaced=len(changed),
        known=len(both) - len(changed),
        stated=stated,
        relabelled=[there[key].name for key in changed],
    )
    kept = _otherwise_stated(parent.manifest, both.keys() - changed.keys(), stated)
    told = Imported(parent, False, kept, found.duplicates, found.left_out, addition)
    if not added and not changed:
        return None, [], told
    old = zip(parent.manifest.samples, places, strict=True)
    records = [*(_relabelled(record, changed) for record in old), *added]
    plans = _planned(records)
    manifest = _grown_manifest(parent.manifest, records, plans, addition, found)
    used = {place for _, place in records}
    images = [image for image in found.images if image.record in used]
    told = replace(told, warnings=[*remarks, *_remarks(parent, manifest, images, added, addition, options), *kept])
    return manifest, plans, told


def _otherwise_stated(manifest: DatasetManifest, known: Set[str], stated: DataOrigin) -> list[str]:
    """Return a sentence if images that are there already, by their SHA-256, came with another statement than now."""
    if stated == UNSTATED:
        return []
    there = zip(manifest.samples, manifest.sample_sources, strict=True)
    others = [(sample.name, number) for sample, number in there if sample.image_sha256 in known]
    others = [(name, number) for name, number in others if manifest.all_stated[number] != stated]
    if not others:
        return []
    licenses = sorted({manifest.all_stated[number].license or NOT_STATED for _, number in others})
    return [
        f"{plural(len(others), 'image')} were there already, and keep what was stated when they were first imported "
        f"(licence: {', '.join(licenses)}), not what is stated now ({_named([name for name, _ in others])}). To change "
        "it, import the dataset again from its sources."
    ]


def _after(moment: str) -> str:
    """Return the time as ISO 8601, but later than that of an older version, if its machine's clock was ahead."""
    now = datetime.now(UTC).isoformat()
    if now > moment:
        return now
    return (datetime.fromisoformat(moment) + timedelta(microseconds=1)).isoformat()


def _relabelled(record: _Record, changed: Mapping[str, SourceImage]) -> _Record:
    sample, _ = record
    image = changed.get(sample.image_sha256)
    if image is None:
        return record
    labels = {"nuclei": image.masks.nuclei, "labels_sha256": image.labels_sha256}
    return sample.model_copy(update=labels), image.record


def _grown_manifest(
    old: DatasetManifest, records: list[_Record], plans: list[ShardPlan], addition: Addition, found: SourceImages
) -> DatasetManifest:
    samples = [sample for sample, _ in records]
    return old.model_copy(
        update={
            "format": DATASET_FORMAT,
            "version": content_version(samples, plans, [*old.all_stated, addition.stated]),
            "created": addition.created,
            "samples": Samples.of(samples),
            "columns": None,
            "shards": [],
            "duplicates": [*old.duplicates, *(item for item in found.duplicates if item not in old.duplicates)],
            "left_out": [*old.left_out, *(item for item in found.left_out if item not in old.left_out)],
            "additions": [*old.additions, addition],
        }
    )


def _joined(
    old: DatasetManifest,
    prints: list[Fingerprint],
    fresh: list[SourceImage],
    options: SplitOptions,
    warn: Callable[[str], None],
) -> tuple[list[_Record], list[LeftOut]]:
    """Return the records of new images, with their groups and splits beside the old ones, and what belongs to none."""
    names, groups, splits = zip(*((sample.name, sample.group, sample.split) for sample in old.samples), strict=True)
    pictures = _pictures_of_both(names, [image.title for image in fresh], options.group_by)
    prints = [*prints, *(image.fingerprint for image in fresh)]
    joined = list(zip(fresh, join_groups(prints, pictures, groups, splits, warn), strict=True))
    left_out = [_between(image, place.splits) for image, place in joined if len(place.splits) > 1]
    kept = [(image, place) for image, place in joined if len(place.splits) <= 1]
    own = [(image, place.group) for image, place in kept if not place.splits]
    dealt = _split([image for image, _ in own], [group for _, group in own], options, few=True)
    split_of = {place.group: place.splits[0] for _, place in kept if place.splits}
    split_of |= {group: split for (_, group), split in zip(own, dealt, strict=True)}
    new_names = unique_names([image.title for image, _ in kept], taken=names)
    return [
        (_sample(image, name, place.group, split_of[place.group]), image.record)
        for (image, place), name in zip(kept, new_names, strict=True)
    ], left_out


def _remarks(
    parent: Dataset,
    manifest: DatasetManifest,
    images: list[SourceImage],
    added: list[_Record],
    addition: Addition,
    options: SplitOptions,
) -> list[str]:
    """Return what is unlikely in the masks of added images, and what may not be what was wanted, a sentence each."""
    found = mask_warnings([image.masks for image in images], manifest.splits_without_nuclei)
    if addition.relabelled:
        found.append(
            f"{plural(addition.replaced, 'image')} of {parent} had other labels: the new ones replace them in this "
            f"version ({_named(addition.relabelled)}). The old version keeps its own."
        )
    splits = {place: sample.split for sample, place in added}
    moved = [i.title for i in images if i.given_split == "test" and splits.get(i.record, "test") != "test"]
    if moved:
        found.append(
            f"{plural(len(moved), 'image')} of the source's test folder went to other splits, where images of the same "
            f"group are ({_named(moved)})."
        )
    missing = [split for split in ("val", "test") if split not in splits.values()]
    independent = len({sample.group for sample, _ in added} - {sample.group for sample in parent.manifest.samples})
    if added and missing:
        found.append(
            f"No added image is in the split {' or '.join(missing)}, so no score there says how well images like them "
            f"are segmented. {independent} of {plural(len(added), 'added image')} count as independent: not tiles or "
            "near-duplicates of each other or of older images. From 3 on, each split gets some."
        )
    names = [sample.name for sample in parent.manifest.samples]
    pictures = _pictures_of_both(names, [image.title for image in images], options.group_by)
    if any(pictures) and not any(pictures[: len(names)]):
        found.append(
            f"--group-by matches no name of the older images, such as {names[0]}: names in a dataset have lower-case "
            "letters, digits and . _ - alone. No added image was put beside older ones by its name."
        )
    return found


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")


def _pictures_of_both(names: Sequence[str], titles: list[str], pattern: re.Pattern[str] | None) -> list[str | None]:
    """Return the pictures of old images, of which only the names are known, and of new ones, in the same spelling."""
    of_names = pattern and re.compile(pattern.pattern, pattern.flags | re.IGNORECASE)
    pictures = [*picture_names(names, of_names), *picture_names(titles, pattern)]
    return [None if picture is None else clean_name(picture) for picture in pictures]


def _between(image: SourceImage, splits: Sequence[str]) -> LeftOut:
    reason = (
        f"Expected an image that belongs to one split; its group has older images of {' and '.join(splits)} (tiles of "
        "one picture, overlaps, near-duplicates, or the same --group-by), between which it would leak."
    )
    return LeftOut(title=image.title, reason=reason)
