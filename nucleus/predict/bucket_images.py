"""Prediction of images in a bucket: the settings, the images, which of them are done, and the tables of all.

The output prefix contains, for each image, `<image>.labels.tif` (or other formats), `<image>.overlay.png`, the table
`parts/<settings>/<image>.<etag>.parquet`; at the end also `nuclei.parquet` and `images.parquet`, joined from these
tables, and `<plate>.plate.png`. An image is done when its table exists, which is written last. The key of the table
contains a hash of the settings and the ETag of the image, so an image is predicted again if it, the model or an option
changed. While a prediction runs it holds a claim on the prefix, so that no other one replaces its results.

An object that holds several images (planes, series) has one table, and labels and an overlay for each, such as
`<image>.z3.labels.tif`. If some of them cannot be read, the key of its table has `.in-part`, and it is not done.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from nucleus.config.names import FormatName, Reference
from nucleus.data.images import IMAGE_SUFFIXES, encode_png
from nucleus.data.slides import SLIDE_SUFFIXES, WITH_OTHER_FILES
from nucleus.data.stacks import PlaneOptions
from nucleus.data.zarr_images import read_group
from nucleus.data.zarr_plates import image_paths, in_zarr
from nucleus.data.zarr_store import ZARR_SUFFIX, bucket_zarr, is_zarr
from nucleus.errors import AccessDeniedError, DataError, ImageError, ObjectNotFoundError, UsageError
from nucleus.lazy import pq
from nucleus.predict.cells import Expansion, parse_expansion
from nucleus.predict.formats import DEFAULT_FORMATS, OVERLAY_ENDING
from nucleus.predict.image_files import check_stems, is_input, stem_of
from nucleus.predict.measurement import write_tables
from nucleus.predict.model import PredictionOptions
from nucleus.predict.plates import PLATE_ENDING, Wells, draw_plate, plates_of
from nucleus.predict.table_files import csv_of_parquet, write_anndata
from nucleus.storage.bucket import Bucket, StoredObject
from nucleus.storage.claims import PrefixClaim, claimed_prefix
from nucleus.storage.files import read_document, temporary_folder
from nucleus.storage.uri import LONGEST_KEY, S3Uri, key_problem, parse_uri

__all__ = [
    "BucketImage",
    "FoundImages",
    "PredictionSettings",
    "claim_output",
    "find_images",
    "join_tables",
    "not_done",
]

_NUCLEI_TABLE, _IMAGES_TABLE = "nuclei.parquet", "images.parquet"
_SETTINGS_FILE, _CLAIM_FILE = "prediction.json", "prediction.claim.json"
_FORMAT = 1
_DIGITS = 12
_AT_ONCE = 16
_LAST = "\uffff"
"""What no part of a key begins with, but all are before."""
_PLANE = re.compile(r"(\.s\d+)?(\.z\d+)?(\.t\d+)?$")
"""The ending of a `ChosenPlane`."""
_IN_PART = ".in-part"
"""In the key of a table that lacks images of its object: such an object is predicted again."""


class PredictionSettings(BaseModel):
    """Settings of a prediction, stored beside its results.

    Attributes:
        format: Format of this document.
        images: URI of the images.
        out: URI of the results.
        model: NAME@VERSION.
        registry: URI of the bucket that holds the model; None for the model that comes along, whose VERSION is the
            start of its manifest's SHA-256.
        diameter: See `PredictionOptions`.
        pixel_size: See `PredictionOptions`.
        turns: See `PredictionOptions`.
        as_is: See `PredictionOptions`.
        denoise: See `PredictionOptions`.
        channel: Channel to segment, its number from 0 or its name; None segments grey and RGB images as a whole.
        z: See `nucleus.data.PlaneOptions`.
        t: See `nucleus.data.PlaneOptions`.
        series: See `nucleus.data.PlaneOptions`.
        formats: Formats of the results.
        expand: How far cells reach beyond their nuclei, such as `5um`; None for nuclei alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int = _FORMAT
    images: str
    out: str
    model: str
    registry: str | None
    diameter: float | None = None
    pixel_size: float | None = None
    turns: bool = False
    as_is: bool = False
    denoise: bool = False
    channel: int | str | None = None
    z: int | str | None = None
    t: int | str | None = None
    series: int | str | None = None
    formats: Annotated[tuple[FormatName, ...], Field(strict=False)] = DEFAULT_FORMATS  # JSON has lists
    expand: str | None = None

    @property
    def reference(self) -> Reference:
        """Reference to the model version."""
        return Reference(*self.model.split("@"))

    @property
    def options(self) -> PredictionOptions:
        """Options of the model."""
        return PredictionOptions(
            diameter=self.diameter, pixel_size=self.pixel_size, turns=self.turns, as_is=self.as_is, denoise=self.denoise
        )

    @property
    def folder(self) -> S3Uri:
        """What the keys of the images are relative to: the URI of the images; of a Zarr, the prefix that it is in."""
        uri = parse_uri(self.images)
        while in_zarr(uri.key):
            uri = uri.parent
        return uri

    @property
    def planes(self) -> PlaneOptions:
        """Which images and planes of files to take. Raises `UsageError`."""
        return PlaneOptions(self.z, self.t, self.series)

    @property
    def expansion(self) -> Expansion | None:
        """How far cells reach beyond their nuclei. Raises `UsageError`."""
        return parse_expansion(self.expand) if self.expand else None

    @property
    def tables(self) -> str:
        """Prefix of the tables of images with these settings, below the output."""
        return f"parts/{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:_DIGITS]}"

    def table(self, image: "BucketImage", *, whole: bool = True) -> str:
        """Return the key of the table of an object: of all its images, or without those that cannot be read."""
        return f"{self.tables}/{image.key}.{image.etag}{'' if whole else _IN_PART}.parquet"


@dataclass(frozen=True)
class BucketImage:
    """An image in a bucket.

    Attributes:
        key: Key below `PredictionSettings.folder`; of an image in OME-Zarr, that of its group.
        etag: Letters and digits of the ETag, which changes with the content; of an image in OME-Zarr, of all its ETags.
        size: Size, bytes.
    """

    key: str
    etag: str
    size: int

    @property
    def stem(self) -> str:
        """The key without the suffix."""
        return stem_of(self.key)


@dataclass(frozen=True)
class FoundImages:
    """The images below a prefix.

    Attributes:
        images: The images, sorted by key.
        unread: Error message for each key that cannot be predicted.
        notes: What plates list, but do not have, and what else the user should know: one sentence for each.
    """

    images: list[BucketImage]
    unread: dict[str, str]
    notes: list[str] = field(default_factory=list)


def find_images(settings: PredictionSettings, *, anonymous: bool = False) -> FoundImages:
    """Return the images below a prefix, at any depth, except hidden ones and the outputs of earlier predictions.

    Args:
        settings: Settings, with the URI of the images: a prefix, or one OME-Zarr or a part of one.
        anonymous: Whether requests for the images are not signed, as public buckets allow.

    Raises:
        UsageError: There are no images, or two images would have the same output.
    """
    uri, bucket = parse_uri(settings.images), Bucket(settings.folder, anonymous=anonymous)
    found = FoundImages([], {})
    if in_zarr(uri.key):
        _add_zarr(bucket, uri.key.removeprefix(bucket.uri.key).strip("/"), found, settings.series)
    else:
        _add_listed(bucket, found, settings.series)
    for image in list(found.images):
        problem = _problem(settings, image)
        if problem is not None:
            found.images.remove(image)
            found.unread[image.key] = f"{problem}, in {f'{bucket.uri}/{image.key}'!r}. Copy the object to another key."
    if not found.images and not found.unread:
        raise UsageError(
            f"Expected images below {uri}/; found none ({', '.join(sorted(IMAGE_SUFFIXES | SLIDE_SUFFIXES))}, "
            f"{ZARR_SUFFIX})."
        )
    check_stems([(image.stem, image.key) for image in found.images])
    _check_endings({image.stem for image in found.images})
    return replace(found, images=sorted(found.images, key=lambda image: image.key))


def _add_listed(bucket: Bucket, found: FoundImages, series: int | str | None) -> None:
    """Add the images of a listing; the objects of a Zarr, of which there may be millions, are passed over."""
    start: str | None = ""
    while start is not None:
        passed, start = start, None
        for item in bucket.objects("", f"{passed}/{_LAST}" if passed else ""):
            zarr = _zarr_of(item.key)
            if zarr is not None and zarr != passed:
                start = zarr
                if is_input(zarr):
                    _add_zarr(bucket, zarr, found, series)
                break
            if zarr is None and is_input(item.key) and not (item.key.endswith("/") and item.size == 0):  # of a console
                _add_object(bucket, item, found)


def _add_object(bucket: Bucket, item: StoredObject, found: FoundImages) -> None:
    """Add an image, or why it is none: a worker gets one object, and some slides are several."""
    if item.key.lower().endswith(tuple(WITH_OTHER_FILES)):
        found.unread[item.key] = (
            f"Expected an image in one object; {bucket.uri / item.key} is a slide of several files (MIRAX or DICOM). "
            "Download its folder, and predict it there."
        )
    else:
        found.images.append(BucketImage(item.key, "".join(filter(str.isalnum, item.etag)), item.size))


def _zarr_of(key: str) -> str | None:
    """Return the key of the Zarr that an object is in, or None."""
    parts = key.split("/")[:-1]
    return next(("/".join(parts[: at + 1]) for at, part in enumerate(parts) if is_zarr(part)), None)


def _add_zarr(bucket: Bucket, key: str, found: FoundImages, series: int | str | None) -> None:
    """Add the images of an OME-Zarr, or why there are none."""
    try:
        paths = image_paths(bucket_zarr(bucket, key), found.notes.append, series)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            keys = [f"{key}/{path}".rstrip("/") for path in paths]
            found.images.extend(pool.map(lambda each: _zarr_image(bucket, each, found.notes), keys))
    except ImageError as error:
        found.unread[key] = str(error)


def _zarr_image(bucket: Bucket, key: str, notes: list[str]) -> BucketImage:
    """Return an image in OME-Zarr; its ETag is one of its metadata and of all objects of its full resolution."""
    group = read_group(bucket_zarr(bucket, key))
    metadata = group.metadata if group is not None else {}
    levels = [level["path"] for scales in metadata.get("multiscales", []) for level in scales["datasets"]]
    digest, size = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()), 0
    try:
        for item in bucket.objects(f"{key}/{levels[0]}/") if levels else ():
            digest.update(f"{item.key} {item.etag}\n".encode())
            size += item.size
    except AccessDeniedError:
        notes.append(f"{bucket.uri / key} cannot be listed: if its pixels change, it is not predicted again by itself")
    return BucketImage(key, digest.hexdigest()[: 2 * _DIGITS], size)


def _check_endings(stems: set[str]) -> None:
    """Raise `UsageError` if the results of an object may be named as those of a plane of another one."""
    for stem in sorted(stems):
        whole = _PLANE.sub("", stem)
        if whole != stem and whole in stems:
            raise UsageError(
                f"Expected keys that differ in more than the ending of a plane; found those of {whole!r} and {stem!r}, "
                "whose results may have the same keys. Copy one of the objects to another key."
            )


def _problem(settings: PredictionSettings, image: BucketImage) -> str | None:
    """Return why the key of an image, or those of its outputs, cannot be used."""
    problem = key_problem(image.key)
    if problem is not None:
        return problem
    out = parse_uri(settings.out)
    keys = (settings.table(image, whole=False), f"{image.stem}{OVERLAY_ENDING}")
    longest = max(len((out / key).key.encode()) for key in keys)
    if longest > LONGEST_KEY:
        return f"Expected a key whose outputs have keys of at most {LONGEST_KEY:,} bytes; found one of {longest:,}"
    return None


@contextmanager
def claim_output(
    settings: PredictionSettings, *, overwrite: bool, single_writer: bool = False
) -> Iterator[PrefixClaim]:
    """Hold the claim on the output while the block runs, and store the settings there.

    Args:
        settings: The settings of this prediction.
        overwrite: Whether results with other settings may be replaced.
        single_writer: Whether nobody else writes at the same time, so that a server may lack conditional writes.

    Raises:
        UsageError: There are results with other settings, and `overwrite` is false.
        OutputError: Another prediction with the same output is running.
    """
    out = Bucket(parse_uri(settings.out), single_writer=single_writer)
    with claimed_prefix(out, _CLAIM_FILE) as claim:
        there = _settings_at(out)
        if there not in {None, settings} and not overwrite:
            raise UsageError(
                f"Expected results of {settings.model} for {settings.images} with the same options at {out.uri}; found "
                f"those of {there.model} for {there.images}. Name another --out, or add --overwrite."
            )
        if there != settings:
            out.put(_SETTINGS_FILE, settings.model_dump_json(indent=1).encode())
        yield claim


def _settings_at(out: Bucket) -> PredictionSettings | None:
    """Return the settings of the results at the output; None if there are no results."""
    try:
        data = out.get(_SETTINGS_FILE)
    except ObjectNotFoundError:
        return None
    return read_document(
        PredictionSettings,
        data,
        what="the settings of a prediction",
        where=str(out.uri / _SETTINGS_FILE),
        newest=_FORMAT,
        error=DataError,
    )


def not_done(settings: PredictionSettings, images: Iterable[BucketImage]) -> list[BucketImage]:
    """Return the images that have no results with these settings yet."""
    done = {item.key for item in Bucket(parse_uri(settings.out)).objects(f"{settings.tables}/")}
    return [image for image in images if settings.table(image) not in done]


def join_tables(settings: PredictionSettings, images: Sequence[BucketImage]) -> dict[str, Wells]:
    """Write `nuclei.parquet`, `images.parquet` and pictures of plates, of images that are done, at least in part.

    Returns:
        Mean number of nuclei per image of each well, by row and column, of each plate, by its name.
    """
    out = Bucket(parse_uri(settings.out))
    there = {item.key for item in out.objects(f"{settings.tables}/")}
    keys = []
    for image in sorted(images, key=lambda image: image.key):
        possible = [settings.table(image), settings.table(image, whole=False)]
        keys += [key for key in possible if key in there][:1]
    if not keys:
        return {}
    with temporary_folder("tables") as temporary:
        tables = [temporary / name for name in (_NUCLEI_TABLE, _IMAGES_TABLE)]
        write_tables(out, keys, *tables)
        for table in [*tables, *_other_tables(tables, settings.formats)]:
            out.put(table.name, table)
        rows = pq.read_table(tables[1], columns=["image", "nuclei"]).to_pylist()
    plates = plates_of((row["image"], row["nuclei"]) for row in rows)
    for plate, wells in plates.items():
        out.put(f"{plate}{PLATE_ENDING}", encode_png(draw_plate(PurePosixPath(plate).name, wells)))
    return plates


def _other_tables(tables: Sequence[Path], formats: Sequence[FormatName]) -> list[Path]:
    """Make the tables of nuclei and of images in other formats than Parquet, beside them."""
    nuclei, images = (table.with_suffix(".csv") for table in tables)
    if {"csv", "h5ad"} & set(formats):
        for table, path in zip(tables, (nuclei, images), strict=True):
            csv_of_parquet(table, path)
    if "h5ad" in formats:
        write_anndata(nuclei, images, nuclei.with_suffix(".h5ad"))
    return [nuclei, images] * ("csv" in formats) + [nuclei.with_suffix(".h5ad")] * ("h5ad" in formats)
