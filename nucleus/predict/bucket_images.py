"""Prediction of images in a bucket: find the images, skip those that are done, predict the others in batches.

The output prefix contains, for each image, `<image>.labels.tif`, `<image>.overlay.png` and the table
`parts/<settings>/<image>.<etag>.parquet`; at the end also `nuclei.parquet` and `images.parquet`, joined from these
tables. An image is done when its table exists, which is written last. The key of the table contains a hash of the
settings and the ETag of the image, so an image is predicted again if it, the model or an option changed. While a
prediction runs it holds a claim on the prefix, so that no other one replaces its results.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from nucleus.config.names import Reference
from nucleus.data.images import IMAGE_SUFFIXES
from nucleus.data.sources import is_hidden
from nucleus.data.zarr_images import read_group
from nucleus.data.zarr_plates import image_paths, in_zarr
from nucleus.data.zarr_store import ZARR_SUFFIX, bucket_zarr, is_zarr
from nucleus.errors import AccessDeniedError, DataError, ImageError, ObjectNotFoundError, UsageError
from nucleus.predict.blocks import LabelledBlock
from nucleus.predict.image_files import (
    LABELS_ENDING,
    OVERLAY_ENDING,
    check_stems,
    is_input,
    stem_of,
    write_image,
)
from nucleus.predict.measurement import image_table, write_tables
from nucleus.predict.model import IMAGES_AT_ONCE, Model, PredictionOptions
from nucleus.predict.source import ScaledImage, channel_count, open_source
from nucleus.storage.bucket import Bucket
from nucleus.storage.claims import PrefixClaim, claimed_prefix
from nucleus.storage.files import read_document, temporary_folder
from nucleus.storage.uri import LONGEST_KEY, S3Uri, key_problem, parse_uri

__all__ = [
    "BatchPredictor",
    "BucketImage",
    "FoundImages",
    "ImageOutcome",
    "PredictionSettings",
    "batches_of",
    "claim_output",
    "find_images",
    "join_tables",
    "not_done",
]

_NUCLEI_TABLE, _IMAGES_TABLE = "nuclei.parquet", "images.parquet"
_SETTINGS_FILE, _CLAIM_FILE = "prediction.json", "prediction.claim.json"
_FORMAT = 1
_BYTES_AT_ONCE = 32 << 20
_DIGITS = 12
_AT_ONCE = 16
_LAST = "\uffff"
"""What no part of a key begins with, but all are before."""


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
        channel: Channel to segment, from 0; None segments grey and RGB images as a whole.
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
    channel: int | None = None

    @property
    def reference(self) -> Reference:
        """Reference to the model version."""
        return Reference(*self.model.split("@"))

    @property
    def options(self) -> PredictionOptions:
        """Options of the model."""
        return PredictionOptions(diameter=self.diameter, pixel_size=self.pixel_size, turns=self.turns)

    @property
    def folder(self) -> S3Uri:
        """What the keys of the images are relative to: the URI of the images; of a Zarr, the prefix that it is in."""
        uri = parse_uri(self.images)
        while in_zarr(uri.key):
            uri = uri.parent
        return uri

    @property
    def tables(self) -> str:
        """Prefix of the tables of images with these settings, below the output."""
        return f"parts/{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:_DIGITS]}"

    def table(self, image: "BucketImage") -> str:
        """Return the key of the table of an image."""
        return f"{self.tables}/{image.key}.{image.etag}.parquet"


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
class ImageOutcome:
    """The outcome of one image.

    Attributes:
        key: Key of the image.
        nuclei: Number of nuclei; None if the image failed.
        failure: Error message if the image failed.
        warning: Why the result may be wrong, or None.
    """

    key: str
    nuclei: int | None = None
    failure: str | None = None
    warning: str | None = None


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
        _add_zarr(bucket, uri.key.removeprefix(bucket.uri.key).strip("/"), found)
    else:
        _add_listed(bucket, found)
    for image in list(found.images):
        problem = _problem(settings, image)
        if problem is not None:
            found.images.remove(image)
            found.unread[image.key] = f"{problem}, in {f'{bucket.uri}/{image.key}'!r}. Copy the object to another key."
    if not found.images and not found.unread:
        raise UsageError(
            f"Expected images below {uri}/; found none ({', '.join(sorted(IMAGE_SUFFIXES))}, {ZARR_SUFFIX})."
        )
    check_stems([(image.stem, image.key) for image in found.images])
    return replace(found, images=sorted(found.images, key=lambda image: image.key))


def _add_listed(bucket: Bucket, found: FoundImages) -> None:
    """Add the images of a listing; the objects of a Zarr, of which there may be millions, are passed over."""
    start: str | None = ""
    while start is not None:
        passed, start = start, None
        for item in bucket.objects("", f"{passed}/{_LAST}" if passed else ""):
            zarr = _zarr_of(item.key)
            if zarr is not None and zarr != passed:
                _add_zarr(bucket, zarr, found)
                start = zarr
                break
            if zarr is None and is_input(item.key) and not (item.key.endswith("/") and item.size == 0):  # of a console
                found.images.append(BucketImage(item.key, "".join(filter(str.isalnum, item.etag)), item.size))


def _zarr_of(key: str) -> str | None:
    """Return the key of the Zarr that an object is in, or None; hidden ones, and those among them, are no images."""
    parts = key.split("/")[:-1]
    return next(("/".join(parts[: at + 1]) for at, part in enumerate(parts) if is_zarr(part)), None)


def _add_zarr(bucket: Bucket, key: str, found: FoundImages) -> None:
    """Add the images of an OME-Zarr, or why there are none."""
    if is_hidden(key):
        return
    try:
        paths = image_paths(bucket_zarr(bucket, key), found.notes.append)
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


def _problem(settings: PredictionSettings, image: BucketImage) -> str | None:
    """Return why the key of an image, or those of its outputs, cannot be used."""
    problem = key_problem(image.key)
    if problem is not None:
        return problem
    out = parse_uri(settings.out)
    longest = max(len((out / key).key.encode()) for key in (settings.table(image), f"{image.stem}{OVERLAY_ENDING}"))
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


def batches_of(images: Iterable[BucketImage]) -> list[list[BucketImage]]:
    """Divide images into batches: a few small images of similar size, or one large image.

    The largest images come first, because they take longest.
    """
    batches: list[list[BucketImage]] = []
    size = 0
    for image in sorted(images, key=lambda image: (-image.size, image.key)):
        if not batches or len(batches[-1]) == IMAGES_AT_ONCE or size + image.size > _BYTES_AT_ONCE:
            batches.append([])
            size = 0
        batches[-1].append(image)
        size += image.size
    return batches


def join_tables(settings: PredictionSettings, images: Sequence[BucketImage]) -> None:
    """Write `nuclei.parquet` and `images.parquet` from the tables of images that are done."""
    out = Bucket(parse_uri(settings.out))
    with temporary_folder("tables") as temporary:
        tables = [temporary / name for name in (_NUCLEI_TABLE, _IMAGES_TABLE)]
        write_tables(out, [settings.table(image) for image in sorted(images, key=lambda image: image.key)], *tables)
        for table in tables:
            out.put(table.name, table)


@dataclass(frozen=True)
class _ImageFiles:
    """Local files of an image, in a separate folder."""

    image: BucketImage
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"image{PurePosixPath(self.image.key).suffix}"

    @property
    def table(self) -> Path:
        return self.folder / "nuclei.parquet"


class BatchPredictor:
    """Predicts batches of images in a bucket.

    Args:
        settings: Settings, with the URIs of the images and of the results.
        model: Model with the options of the settings.
    """

    def __init__(self, settings: PredictionSettings, model: Model) -> None:
        self._settings = settings
        self._model = model
        self._images = Bucket(parse_uri(settings.images))
        self._out = Bucket(parse_uri(settings.out))

    def predict(self, images: Sequence[BucketImage]) -> list[ImageOutcome]:
        """Predict a batch of images; one that cannot be read gets an error message and does not stop the others.

        Raises:
            OutputError: The folder for temporary files has no room.
            StorageError: The bucket cannot be read or written.
        """
        with temporary_folder("batch") as temporary, ThreadPoolExecutor() as pool:
            files = [_ImageFiles(image, temporary / str(number)) for number, image in enumerate(images)]
            failures = list(pool.map(self._fetch, files))
            opened = [
                self._open(each) if failure is None else failure for each, failure in zip(files, failures, strict=True)
            ]
            segmented = self._model.segment_blocks([image for image in opened if isinstance(image, ScaledImage)])
            uploads: list[Future[None]] = []
            outcomes = [
                ImageOutcome(each.image.key, failure=found)
                if isinstance(found, str)
                else self._write(each, found, next(segmented), pool, uploads)
                for each, found in zip(files, opened, strict=True)
            ]
            for upload in uploads:
                upload.result()
        return outcomes

    def _fetch(self, files: _ImageFiles) -> str | None:
        """Download an image; return an error message if it no longer exists or must not be read."""
        try:
            self._images.download(files.image.key, files.file)
        except (ObjectNotFoundError, AccessDeniedError) as error:  # of this object: archived, or locked by its key
            return str(error)
        return None

    def _open(self, files: _ImageFiles) -> ScaledImage | str:
        """Open an image; return an error message if it cannot be read."""
        try:
            source = replace(open_source(files.file, self._settings.channel), name=files.image.key)
            return self._model.scaled_image(source)
        except ImageError as error:
            return self._message(error, files)

    def _write(
        self,
        files: _ImageFiles,
        image: ScaledImage,
        blocks: Iterable[LabelledBlock],
        pool: Executor,
        uploads: list[Future[None]],
    ) -> ImageOutcome:
        """Write the outputs of an image and start to upload them."""
        try:
            with image_table(files.table, channel_count(files.file)) as table:
                row = write_image(self._model, image, blocks, files.folder / "image", table)
                table.set_image(row)
        except ImageError as error:  # a part of a large image may be damaged
            return ImageOutcome(files.image.key, failure=self._message(error, files))
        uploads.append(pool.submit(self._upload, files))
        return ImageOutcome(files.image.key, row["nuclei"], warning=row["warning"])

    def _upload(self, files: _ImageFiles) -> None:
        """Upload the outputs of an image; the table, which marks it as done, comes last."""
        for ending in (LABELS_ENDING, OVERLAY_ENDING):
            self._out.put(f"{files.image.stem}{ending}", files.folder / f"image{ending}")
        self._out.put(self._settings.table(files.image), files.table)

    def _message(self, error: ImageError, files: _ImageFiles) -> str:
        """Return an error message with the URI of the image in place of the local file."""
        return str(error).replace(str(files.file), str(self._images.uri / files.image.key))
