"""Prediction of a bucket's images in batches: download, predict, upload; a worker does one batch after the other."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath

from nucleus.data.zarr_plates import in_zarr, plate_field
from nucleus.data.zarr_store import ZarrFolder, bucket_zarr
from nucleus.errors import AccessDeniedError, ImageError, ObjectNotFoundError
from nucleus.predict.blocks import LabelledBlock
from nucleus.predict.bucket_images import BucketImage, PredictionSettings
from nucleus.predict.formats import OVERLAY_ENDING, output_endings, result_path
from nucleus.predict.measurement import image_table, join_images
from nucleus.predict.model import IMAGES_AT_ONCE, Model
from nucleus.predict.planes import FileImage, ImageOpener, PlannedImages, plan_images
from nucleus.predict.results import write_image
from nucleus.predict.scaled_image import ScaledImage
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import temporary_folder
from nucleus.storage.uri import LONGEST_KEY, parse_uri

__all__ = ["BatchPredictor", "ImageOutcome", "batches_of"]

_BYTES_AT_ONCE = 32 << 20


@dataclass(frozen=True)
class ImageOutcome:
    """The outcome of one image: an object, or a plane of one.

    Attributes:
        key: Key of the object.
        title: The key, and what tells the images of one object apart, such as `a.tif z=3`.
        nuclei: Number of nuclei; None if the image failed.
        failure: Error message if the image failed.
        warning: Why the result may be wrong, or None.
    """

    key: str
    title: str
    nuclei: int | None = None
    failure: str | None = None
    warning: str | None = None


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


@dataclass(frozen=True)
class _ImageFiles:
    """Local files of an object, in a separate folder, and the images that it holds.

    Attributes:
        image: The object.
        folder: The folder.
        zarr: The object as a group of OME-Zarr, which is read where it is; None for files.
        planned: What the object holds; empty before it was downloaded.
        tables: Table of each image that was predicted, in order.
    """

    image: BucketImage
    folder: Path
    zarr: ZarrFolder | None = None
    planned: PlannedImages = field(default_factory=PlannedImages)
    tables: dict[FileImage, Path] = field(default_factory=dict)

    @property
    def file(self) -> Path | ZarrFolder:
        return self.zarr or self.folder / f"image{PurePosixPath(self.image.key).suffix}"

    @property
    def table(self) -> Path:
        return self.folder / "nuclei.parquet"

    def stem(self, image: FileImage) -> Path:
        """Return the path of an image's results, without their endings."""
        return self.folder / f"image{image.chosen.ending}"


class BatchPredictor:
    """Predicts batches of images in a bucket.

    Args:
        settings: Settings, with the URIs of the images and of the results.
        model: Model with the options of the settings.
        anonymous: Whether requests for the images are not signed, as public buckets allow.
    """

    def __init__(self, settings: PredictionSettings, model: Model, *, anonymous: bool = False) -> None:
        self._settings = settings
        self._model = model
        self._images = Bucket(settings.folder, anonymous=anonymous)
        self._out = Bucket(parse_uri(settings.out))

    def predict(self, images: Sequence[BucketImage]) -> list[ImageOutcome]:
        """Predict a batch of objects; an image that cannot be read gets an error message and does not stop the others.

        Raises:
            OutputError: The folder for temporary files has no room.
            StorageError: The bucket cannot be read or written.
        """
        with temporary_folder("batch") as temporary, ThreadPoolExecutor() as pool:
            empty = [_ImageFiles(image, temporary / str(number)) for number, image in enumerate(images)]
            files = list(pool.map(self._fetch, empty))
            outcomes = [
                ImageOutcome(each.image.key, title, failure=failure)
                for each in files
                for title, failure in each.planned.failures.items()
            ]
            remaining = ((each, image) for each in files for image in each.planned.images)
            opener, uploads = ImageOpener(self._settings.channel), list[Future[None]]()
            while chunk := list(islice(remaining, IMAGES_AT_ONCE)):
                outcomes += self._predict(chunk, opener)
                ended = [each for each, image in chunk if image is each.planned.images[-1] and each.tables]
                uploads += [pool.submit(self._upload, each) for each in ended]
            for upload in uploads:
                upload.result()
        places = {image.key: place for place, image in enumerate(images)}
        return sorted(outcomes, key=lambda outcome: places[outcome.key])

    def _fetch(self, files: _ImageFiles) -> _ImageFiles:
        """Download a file, and see what it or OME-Zarr holds; it may no longer exist, or must not be read."""
        key = files.image.key
        files.folder.mkdir()
        if in_zarr(key):
            files = replace(files, zarr=bucket_zarr(self._images, key))
        try:
            if isinstance(files.file, Path):
                self._images.download(key, files.file)
        except (ObjectNotFoundError, AccessDeniedError) as error:  # of this object: archived, or locked by its key
            return replace(files, planned=PlannedImages(failures={key: str(error)}))
        planned = plan_images({key: files.file}, self._settings.planes)
        failures = {name: self._message(reason, files) for name, reason in planned.failures.items()}
        return replace(files, planned=replace(planned, failures=failures))

    def _predict(self, chunk: Sequence[tuple[_ImageFiles, FileImage]], opener: ImageOpener) -> list[ImageOutcome]:
        """Predict some images together, and write their results."""
        opened = [self._open(*each, opener) for each in chunk]
        segmented = self._model.segment_blocks([image for image in opened if isinstance(image, ScaledImage)])
        return [
            ImageOutcome(files.image.key, image.title, failure=found)
            if isinstance(found, str)
            else self._write(files, image, found, next(segmented))
            for (files, image), found in zip(chunk, opened, strict=True)
        ]

    def _open(self, files: _ImageFiles, image: FileImage, opener: ImageOpener) -> ScaledImage | str:
        """Open an image; return an error message if it cannot be read."""
        try:
            self._check_length(f"{files.image.stem}{image.chosen.ending}{OVERLAY_ENDING}")
            return self._model.scaled_image(opener.open(image))
        except ImageError as error:
            return self._message(str(error), files)

    def _check_length(self, key: str) -> None:
        """Raise `ImageError` if the ending of a plane makes a key too long."""
        length = len((self._out.uri / key).key.encode())
        if length > LONGEST_KEY:
            raise ImageError(
                f"Expected keys of at most {LONGEST_KEY:,} bytes for results; found {length:,} in {key!r}. Copy the "
                "object to a shorter key."
            )

    def _write(
        self, files: _ImageFiles, image: FileImage, scaled: ScaledImage, blocks: Iterable[LabelledBlock]
    ) -> ImageOutcome:
        """Write the results of an image on disk."""
        stem = files.stem(image)
        path, expansion = result_path(stem, ".parquet"), self._settings.expansion
        plate, cells = plate_field(image.name) is not None, expansion is not None
        try:
            with image_table(path, files.planned.channels, plate=plate, cells=cells) as table:
                row = write_image(self._model, scaled, blocks, stem, table, self._settings.formats, expansion)
                table.set_image(row)
        except ImageError as error:  # a part of a large image may be damaged
            return ImageOutcome(files.image.key, image.title, failure=self._message(str(error), files))
        files.tables[image] = path
        return ImageOutcome(files.image.key, image.title, row["nuclei"], warning=row["warning"])

    def _upload(self, files: _ImageFiles) -> None:
        """Upload the results of an object; the table, which marks it as done, comes last."""
        join_images(list(files.tables.values()), files.table)
        for image in files.tables:
            stem = files.stem(image)
            for ending in output_endings(self._settings.formats, cells=self._settings.expand is not None):
                found = result_path(stem, ending)
                for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
                    if file.is_file():
                        below = file.relative_to(files.folder).as_posix().removeprefix("image")
                        self._out.put(f"{files.image.stem}{below}", file)
        whole = len(files.tables) == len(files.planned.images)
        self._out.put(self._settings.table(files.image, whole=whole), files.table)

    def _message(self, text: str, files: _ImageFiles) -> str:
        """Return an error message with the URI of the image in place of the local file."""
        return text.replace(str(files.file), str(self._images.uri / files.image.key))
