"""Prediction of a bucket's images part by part: download, predict, upload; a worker does one part after the other."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath

from nucleus.data.zarr_plates import in_zarr, plate_field
from nucleus.data.zarr_store import ZarrFolder, bucket_zarr
from nucleus.errors import AccessDeniedError, ImageError, ObjectNotFoundError
from nucleus.predict.blocks import LabelledBlock
from nucleus.predict.bucket_images import BucketImage, PredictionSettings
from nucleus.predict.formats import ALL_ENDINGS, LONGEST_ENDING, output_endings, result_path
from nucleus.predict.image_parts import ImagePart, PartName
from nucleus.predict.model import IMAGES_AT_ONCE, Model
from nucleus.predict.part_tables import ImageRows, ObjectRows, read_part, write_part
from nucleus.predict.planes import FileImage, ImageOpener, PlannedImages, plan_images
from nucleus.predict.results import write_results
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.source import stacks_of
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import temporary_folder
from nucleus.storage.small_objects import SmallObjects
from nucleus.storage.uri import LONGEST_KEY, parse_uri

__all__ = ["ImageOutcome", "PartOutcome", "PartPredictor"]

_SMALL_BYTES = 1 << 20
"""Larger objects are transferred by boto3, which goes on where a transfer broke off."""


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


@dataclass(frozen=True)
class PartOutcome:
    """The outcome of a part.

    Attributes:
        images: The outcomes of the images that were predicted now.
        objects: Number of objects of the part.
        done_before: Number of them that were predicted earlier.
        table: Name of the part's table; None if none of its images could be read.
    """

    images: list[ImageOutcome]
    objects: int
    done_before: int
    table: PartName | None


@dataclass(frozen=True)
class _ImageFiles:
    """Local files of an object, in a separate folder, and the images that it holds.

    Attributes:
        image: The object.
        folder: The folder.
        opener: Opens the images.
        zarr: The object as a group of OME-Zarr, which is read where it is; None for files.
        planned: What the object holds; empty before it was downloaded.
        rows: Rows of the images that were predicted.
        results: Content of small results, which are not on disk, by their path.
    """

    image: BucketImage
    folder: Path
    opener: ImageOpener
    zarr: ZarrFolder | None = None
    planned: PlannedImages = field(default_factory=PlannedImages)
    rows: dict[FileImage, ObjectRows] = field(default_factory=dict)
    results: dict[Path, bytes] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether object and results are small: they are read and written as a whole."""
        return self.image.size <= _SMALL_BYTES

    @property
    def file(self) -> Path | ZarrFolder:
        return self.zarr or self.folder / f"image{PurePosixPath(self.image.key).suffix}"

    @property
    def whole(self) -> bool:
        """Whether all images of the object were predicted."""
        return len(self.rows) == len(self.planned.images) and not self.planned.failures

    def stem(self, image: FileImage) -> Path:
        """Return the path of an image's results, without their endings."""
        return self.folder / f"image{image.chosen.ending}"

    def save(self, path: Path, data: bytes) -> None:
        """Keep a result: in memory if it is small and the only one of its kind, else on disk."""
        if len(data) <= _SMALL_BYTES and len(self.planned.images) == 1:
            self.results[path] = data
        else:
            path.write_bytes(data)


class PartPredictor:
    """Predicts parts of the images in a bucket.

    Args:
        settings: Settings, with the URIs of the images and of the results.
        model: Model with the options of the settings.
        anonymous: Whether requests for the images are not signed, as public buckets allow.
        overwrite: Whether to predict images again that have results.
    """

    def __init__(
        self, settings: PredictionSettings, model: Model, *, anonymous: bool = False, overwrite: bool = False
    ) -> None:
        self._settings = settings
        self._model = model
        self._overwrite = overwrite
        self._images = Bucket(settings.folder, anonymous=anonymous)
        self._out = Bucket(parse_uri(settings.out))
        self._small_images, self._small_results = SmallObjects(self._images), SmallObjects(self._out)
        self._pool = ThreadPoolExecutor()

    def predict(self, part: ImagePart) -> PartOutcome:
        """Predict the images of a part that have no results, and write its table, which marks it as done.

        An image that cannot be read gets an error message and does not stop the others.

        Raises:
            OutputError: The folder for temporary files has no room.
            StorageError: The bucket cannot be read or written.
        """
        done = {} if self._overwrite else self._done(part)
        wanted = [image for image in part.images if image.key not in done]
        with temporary_folder("part") as temporary:
            channel = self._settings.channel
            files = [
                _ImageFiles(image, temporary / str(number), ImageOpener(channel)) for number, image in enumerate(wanted)
            ]
            files = list(self._pool.map(self._fetch, files))
            outcomes = [
                ImageOutcome(each.image.key, title, failure=failure)
                for each in files
                for title, failure in each.planned.failures.items()
            ]
            remaining = ((each, image) for each in files for image in each.planned.images)
            uploads = list[Future[None]]()
            while chunk := list(islice(remaining, IMAGES_AT_ONCE)):
                outcomes += self._predict(chunk)
                ended = [each for each, image in chunk if image is each.planned.images[-1] and each.rows]
                uploads += [self._pool.submit(self._upload, each) for each in ended]
            changed = [each for each in files if self._overwrite or not each.whole]
            uploads += [self._pool.submit(self._remove_earlier, each) for each in changed]
            for upload in uploads:
                upload.result()
            table = self._finish(part, [*done.values(), *(_rows_of(each) for each in files if each.rows)], temporary)
        places = {image.key: place for place, image in enumerate(part.images)}
        outcomes.sort(key=lambda outcome: places[outcome.key])
        return PartOutcome(outcomes, len(part.images), len(done), table)

    def _done(self, part: ImagePart) -> dict[str, ObjectRows]:
        """Return what earlier tables have of the objects of a part as they are now, by key."""
        etags = {image.key: image.etag for image in part.images}
        found: dict[str, ObjectRows] = {}
        for name in part.earlier:
            with suppress(ObjectNotFoundError):
                for each in read_part(self._out.get(f"{self._settings.tables}/{name}")):
                    if each.whole and etags.get(each.image.key) == each.image.etag:
                        found[each.image.key] = each
        return found

    def _finish(self, part: ImagePart, objects: list[ObjectRows], temporary: Path) -> PartName | None:
        """Write the table of a part, and remove those that it replaces."""
        name = None
        if objects:
            objects.sort(key=lambda each: each.image.key)
            whole = len(objects) == len(part.images) and all(each.whole for each in objects)
            channels, plate = max(each.channels for each in objects), any(each.plate for each in objects)
            name = PartName(part.place, part.content, channels, plate, whole)
            path = temporary / "part.parquet"
            write_part(path, objects, cells=self._settings.expand is not None)
            self._put(f"{self._settings.tables}/{name}", path)
        for earlier in part.earlier:
            if earlier != name:
                with suppress(AccessDeniedError):  # it is only in the way
                    self._out.delete(f"{self._settings.tables}/{earlier}")
        return name

    def _fetch(self, files: _ImageFiles) -> _ImageFiles:
        """Download a file, and see what it or OME-Zarr holds; it may no longer exist, or must not be read."""
        key = files.image.key
        files.folder.mkdir()
        if in_zarr(key):
            files = replace(files, zarr=bucket_zarr(self._images, key))
        try:
            if isinstance(files.file, Path) and files.small:
                files.file.write_bytes(self._small_images.get(key))
            elif isinstance(files.file, Path):
                self._images.download(key, files.file)
        except (ObjectNotFoundError, AccessDeniedError) as error:  # of this object: archived, or locked by its key
            return replace(files, planned=PlannedImages(failures={key: str(error)}))
        header = files.opener.header if files.small else stacks_of  # headers of small files have their bytes
        planned = plan_images({key: files.file}, self._settings.planes, header)
        failures = {name: self._message(reason, files) for name, reason in planned.failures.items()}
        return replace(files, planned=replace(planned, failures=failures))

    def _predict(self, chunk: Sequence[tuple[_ImageFiles, FileImage]]) -> list[ImageOutcome]:
        """Predict some images together, and write their results."""
        opened = [self._open(*each) for each in chunk]
        segmented = self._model.segment_blocks([image for image in opened if isinstance(image, ScaledImage)])
        return [
            ImageOutcome(files.image.key, image.title, failure=found)
            if isinstance(found, str)
            else self._write(files, image, found, next(segmented))
            for (files, image), found in zip(chunk, opened, strict=True)
        ]

    def _open(self, files: _ImageFiles, image: FileImage) -> ScaledImage | str:
        """Open an image; return an error message if it cannot be read."""
        try:
            self._check_length(f"{files.image.stem}{image.chosen.ending}{LONGEST_ENDING}")
            return self._model.scaled_image(files.opener.open(image))
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
        stem, expansion = files.stem(image), self._settings.expansion
        channels, plate = files.planned.channels, plate_field(image.name) is not None
        table = ImageRows(result_path(stem, ".parquet"), channels, plate=plate, cells=expansion is not None)
        try:
            formats = self._settings.formats
            row = write_results(self._model, scaled, blocks, stem, table, formats, expansion, save=files.save)
        except ImageError as error:  # a part of a large image may be damaged
            return ImageOutcome(files.image.key, image.title, failure=self._message(str(error), files))
        files.rows[image] = ObjectRows(files.image, True, channels, plate, [row], [table])
        return ImageOutcome(files.image.key, image.title, row["nuclei"], warning=row["warning"])

    def _upload(self, files: _ImageFiles) -> None:
        """Upload the results of an object."""
        for image in files.rows:
            stem = files.stem(image)
            for ending in output_endings(self._settings.formats, cells=self._settings.expand is not None):
                found = result_path(stem, ending)
                if found in files.results:
                    below = found.name.removeprefix("image")
                    self._small_results.put(f"{files.image.stem}{below}", files.results.pop(found))
                    continue
                for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
                    if file.is_file():
                        below = file.relative_to(files.folder).as_posix().removeprefix("image")
                        self._put(f"{files.image.stem}{below}", file)

    def _remove_earlier(self, files: _ImageFiles) -> None:
        """Remove earlier results of an object that are not written now, because they are of other nuclei."""
        stems = {files.image.stem, *(f"{files.image.stem}{image.chosen.ending}" for image in files.planned.images)}
        now = output_endings(self._settings.formats, cells=self._settings.expand is not None)
        written = {f"{files.image.stem}{image.chosen.ending}{ending}" for image in files.rows for ending in now}
        earlier = {f"{stem}{ending}" for stem in stems for ending in ALL_ENDINGS} - written
        for found in self._out.objects(f"{files.image.stem}."):
            if found.key in earlier or any(found.key.startswith(f"{name}/") for name in earlier):
                self._out.delete(found.key)

    def _put(self, key: str, file: Path) -> None:
        """Upload a file."""
        if file.stat().st_size <= _SMALL_BYTES:
            self._small_results.put(key, file.read_bytes())
        else:
            self._out.put(key, file)

    def _message(self, text: str, files: _ImageFiles) -> str:
        """Return an error message with the URI of the image in place of the local file."""
        return text.replace(str(files.file), str(self._images.uri / files.image.key))


def _rows_of(files: _ImageFiles) -> ObjectRows:
    """Return the rows of all images of an object that were predicted."""
    found = [files.rows[image] for image in files.planned.images if image in files.rows]
    return ObjectRows(
        files.image,
        files.whole,
        files.planned.channels,
        any(each.plate for each in found),
        [row for each in found for row in each.images],
        [rows for each in found for rows in each.nuclei],
    )
