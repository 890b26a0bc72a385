"""Predict images that lie in a bucket: which there are, which are done, and what each leaves there.

Below the output's prefix lie `<image>.labels.tif` and `<image>.overlay.png` for each image, its measurements at
`parts/<settings>/<image>.<etag>.parquet`, and at the end `nuclei.parquet` and `images.parquet`, joined from them. An
image is done when its part exists, which is written last; the part's key names the settings and the image's bytes, so
that a changed image or another model is not taken for done.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from nucleus.config.names import Reference
from nucleus.data.images import IMAGE_SUFFIXES
from nucleus.errors import DataError, ImageError, ObjectNotFoundError, UsageError
from nucleus.predict.image_files import (
    FILES_AT_ONCE,
    LABELS_ENDING,
    OUTPUT_ENDINGS,
    OVERLAY_ENDING,
    check_stems,
    write_image,
)
from nucleus.predict.model import LabelledBlock, PredictionOptions, Predictor
from nucleus.predict.nuclei_tables import new_part, write_tables
from nucleus.predict.source import NetworkView, channel_count, open_source
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import read_document
from nucleus.storage.uri import S3Uri, parse_uri

__all__ = [
    "BatchPredictor",
    "ImageOutcome",
    "PredictionSettings",
    "StoredImage",
    "batches_of",
    "claim_output",
    "find_images",
    "join_tables",
    "not_done",
]


NUCLEI_TABLE, IMAGES_TABLE = "nuclei.parquet", "images.parquet"
_SETTINGS_FILE = "prediction.json"
_FORMAT = 1
_BYTES_AT_ONCE = 32 << 20
_DIGITS = 12


class PredictionSettings(BaseModel):
    """What the results depend on, kept beside them.

    Attributes:
        format: Of this document.
        images: URI of the images.
        out: URI of the results.
        model: NAME@VERSION.
        registry: URI of the bucket that holds the model.
        diameter: As `PredictionOptions` has it.
        pixel_size: As `PredictionOptions` has it.
        turns: As `PredictionOptions` has it.
        channel: The channel taken; None takes grey and RGB images whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int = _FORMAT
    images: str
    out: str
    model: str
    registry: str
    diameter: float | None = None
    pixel_size: float | None = None
    turns: bool = False
    channel: int | None = None

    @property
    def reference(self) -> Reference:
        """The model's version."""
        return Reference(*self.model.split("@"))

    @property
    def options(self) -> PredictionOptions:
        """For the predictor."""
        return PredictionOptions(diameter=self.diameter, pixel_size=self.pixel_size, turns=self.turns)

    @property
    def parts(self) -> str:
        """Where the parts of results with these settings lie, below the output."""
        return f"parts/{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:_DIGITS]}"

    def part(self, image: "StoredImage") -> str:
        """Key of an image's part."""
        return f"{self.parts}/{image.key}.{image.etag}.parquet"


@dataclass(frozen=True)
class StoredImage:
    """An image in a bucket.

    Attributes:
        key: Below the URI of the images.
        etag: Letters and digits that change with its bytes.
        size: Bytes.
    """

    key: str
    etag: str
    size: int

    @property
    def stem(self) -> str:
        """The key without the suffix."""
        return str(PurePosixPath(self.key).with_suffix(""))


@dataclass(frozen=True)
class ImageOutcome:
    """What became of an image.

    Attributes:
        key: Its key.
        nuclei: How many were found; None if it failed.
        failure: Why it failed.
    """

    key: str
    nuclei: int | None = None
    failure: str | None = None


def find_images(uri: S3Uri) -> list[StoredImage]:
    """The images below a prefix, however deep, by key.

    Raises:
        UsageError: There are none, or two would write the same output.
    """
    found = [
        StoredImage(item.key, "".join(filter(str.isalnum, item.etag)), item.size)
        for item in Bucket(uri).objects("")
        if PurePosixPath(item.key).suffix.lower() in IMAGE_SUFFIXES and not item.key.endswith(OUTPUT_ENDINGS)
    ]
    if not found:
        raise UsageError(f"Expected images below {uri}/; found none ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    check_stems([(image.stem, image.key) for image in found])
    return found


def claim_output(settings: PredictionSettings, *, overwrite: bool) -> None:
    """Note the settings at the output.

    Args:
        settings: Of this prediction.
        overwrite: Whether results with other settings may be replaced.

    Raises:
        UsageError: There are such results.
        ObjectExistsError: Another prediction has begun there at the same moment.
    """
    out = Bucket(parse_uri(settings.out))
    there = _settings_at(out)
    if there not in {None, settings} and not overwrite:
        raise UsageError(
            f"Expected results of {settings.model} for {settings.images} with the same options at {out.uri}; found "
            f"those of {there.model} for {there.images}. Name another --out, or add --overwrite."
        )
    if there != settings:
        out.put(_SETTINGS_FILE, settings.model_dump_json(indent=1).encode(), if_absent=there is None)


def _settings_at(out: Bucket) -> PredictionSettings | None:
    """The settings of the results that are there, if there are any."""
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


def not_done(settings: PredictionSettings, images: Iterable[StoredImage]) -> list[StoredImage]:
    """The images that have no results with these settings yet."""
    done = {item.key for item in Bucket(parse_uri(settings.out)).objects(f"{settings.parts}/")}
    return [image for image in images if settings.part(image) not in done]


def batches_of(images: Iterable[StoredImage]) -> list[list[StoredImage]]:
    """Images to be worked on together: a few of like size, large ones alone; the largest first, for they take long."""
    batches: list[list[StoredImage]] = []
    size = 0
    for image in sorted(images, key=lambda image: (-image.size, image.key)):
        if not batches or len(batches[-1]) == FILES_AT_ONCE or size + image.size > _BYTES_AT_ONCE:
            batches.append([])
            size = 0
        batches[-1].append(image)
        size += image.size
    return batches


def join_tables(settings: PredictionSettings, images: Sequence[StoredImage]) -> None:
    """Write `nuclei.parquet` and `images.parquet` from the parts of images that are done."""
    out = Bucket(parse_uri(settings.out))
    with tempfile.TemporaryDirectory(prefix="nucleus-tables-") as temporary:
        tables = [Path(temporary) / name for name in (NUCLEI_TABLE, IMAGES_TABLE)]
        write_tables(out, [settings.part(image) for image in sorted(images, key=lambda image: image.key)], *tables)
        for table in tables:
            out.put(table.name, table)


@dataclass(frozen=True)
class _Work:
    """An image with the folder that it is worked on in."""

    image: StoredImage
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"image{PurePosixPath(self.image.key).suffix}"

    @property
    def part(self) -> Path:
        return self.folder / "nuclei.parquet"


class BatchPredictor:
    """Predicts batches of images.

    Args:
        settings: Where the images are and where their results go.
        predictor: Of the settings' model and options.
    """

    def __init__(self, settings: PredictionSettings, predictor: Predictor) -> None:
        self._settings = settings
        self._predictor = predictor
        self._images = Bucket(parse_uri(settings.images))
        self._out = Bucket(parse_uri(settings.out))

    def predict(self, images: Sequence[StoredImage]) -> list[ImageOutcome]:
        """Predict a batch; images that cannot be read are told, and the others go on.

        Raises:
            StorageError: The bucket cannot be read or written.
        """
        with tempfile.TemporaryDirectory(prefix="nucleus-batch-") as temporary, ThreadPoolExecutor() as pool:
            works = [_Work(image, Path(temporary) / str(number)) for number, image in enumerate(images)]
            fetched = list(pool.map(self._fetch, works))
            opened = [
                self._view(work) if failure is None else failure for work, failure in zip(works, fetched, strict=True)
            ]
            segmented = self._predictor.segment([view for view in opened if isinstance(view, NetworkView)])
            uploads: list[Future[None]] = []
            outcomes = [
                ImageOutcome(work.image.key, failure=found)
                if isinstance(found, str)
                else self._write(work, found, next(segmented), pool, uploads)
                for work, found in zip(works, opened, strict=True)
            ]
            for upload in uploads:
                upload.result()
        return outcomes

    def _fetch(self, work: _Work) -> str | None:
        """Bring an image here; a message if it is gone."""
        try:
            self._images.download(work.image.key, work.file)
        except ObjectNotFoundError as error:
            return str(error)
        return None

    def _view(self, work: _Work) -> NetworkView | str:
        """An image as the network sees it, or a message."""
        try:
            source = replace(open_source(work.file, self._settings.channel), name=work.image.key)
            return self._predictor.view(source)
        except ImageError as error:
            return self._told(error, work)

    def _write(
        self,
        work: _Work,
        view: NetworkView,
        blocks: Iterable[LabelledBlock],
        pool: Executor,
        uploads: list[Future[None]],
    ) -> ImageOutcome:
        """Write an image's files and begin to upload them."""
        try:
            with new_part(work.part, channel_count(work.file)) as part:
                row = write_image(self._predictor, view, blocks, work.folder / "image", part)
                part.set_image(row)
        except ImageError as error:  # a part of a large image may be damaged
            return ImageOutcome(work.image.key, failure=self._told(error, work))
        uploads.append(pool.submit(self._upload, work))
        return ImageOutcome(work.image.key, row["nuclei"])

    def _upload(self, work: _Work) -> None:
        """Upload an image's files; last the part, with which it is done."""
        for ending in (LABELS_ENDING, OVERLAY_ENDING):
            self._out.put(f"{work.image.stem}{ending}", work.folder / f"image{ending}")
        self._out.put(self._settings.part(work.image), work.part)

    def _told(self, error: ImageError, work: _Work) -> str:
        return str(error).replace(str(work.file), str(self._images.uri / work.image.key))
