"""Prediction of images in a bucket: the settings, the claim on the output, and the images as a sorted stream.

The output prefix contains, for each image, `<image>.labels.tif` (or other formats) and `<image>.overlay.png`; below
`parts/<settings>/` a table for each part of the images (`nucleus.predict.image_parts`), which says that they are done;
at the end also the tables of all images (`nucleus.predict.part_tables`). The name of a part's table contains the ETags
of its images, and its folder a hash of the settings, so an image is predicted again if it, the model or an option
changed. While a prediction runs it holds a claim on the prefix, so that no other one replaces its results.

An object that holds several images (planes, series) has labels and an overlay for each, such as
`<image>.z3.labels.tif`. If some of them cannot be read, the object is not done.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from nucleus.config.names import DEFAULT_FORMATS, FormatName, Reference
from nucleus.data.images import IMAGE_SUFFIXES
from nucleus.data.slides import SLIDE_SUFFIXES, WITH_OTHER_FILES
from nucleus.data.stacks import PlaneOptions
from nucleus.data.zarr_images import read_group
from nucleus.data.zarr_plates import image_paths, in_zarr
from nucleus.data.zarr_store import ZARR_SUFFIX, bucket_zarr, objects_and_zarrs
from nucleus.errors import AccessDeniedError, DataError, ImageError, ObjectNotFoundError, UsageError
from nucleus.predict.cells import Expansion, parse_expansion
from nucleus.predict.formats import LONGEST_ENDING
from nucleus.predict.image_files import check_stems, is_input, stem_of, why_not_read
from nucleus.predict.model import PredictionOptions
from nucleus.storage.bucket import Bucket, StoredObject
from nucleus.storage.claims import PrefixClaim, claimed_prefix
from nucleus.storage.files import read_document
from nucleus.storage.uri import LONGEST_KEY, S3Uri, key_problem, parse_uri

__all__ = [
    "MOST_MESSAGES",
    "BucketImage",
    "ImageListing",
    "Messages",
    "PredictionSettings",
    "claim_output",
    "stored_options",
]

MOST_MESSAGES = 1000
"""Messages about images that are kept; of more, only the number."""
_SETTINGS_FILE, _CLAIM_FILE = "prediction.json", "prediction.claim.json"
_FORMAT = 1
_DIGITS = 12
_AT_ONCE = 16
_PLANE = re.compile(r"(\.s\d+)?(\.z\d+)?(\.t\d+)?$")
"""The ending of a `ChosenPlane`."""


_OPTIONS = ("diameter", "pixel_size", "turns", "as_is", "denoise")
"""The fields of `PredictionOptions` on which results depend, and that `PredictionSettings` has."""


def stored_options(options: PredictionOptions) -> dict[str, Any]:
    """Return the fields of `PredictionSettings` for options of a model; `engine` is not among them."""
    return {name: getattr(options, name) for name in _OPTIONS}


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
        return PredictionOptions(**{name: getattr(self, name) for name in _OPTIONS})

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


@dataclass
class Messages:
    """Messages about images: the first thousand by name, and the number of all.

    Attributes:
        kept: Messages by the name of their image.
        count: Number of images with a message.
    """

    kept: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def add(self, name: str, text: str) -> None:
        """Add the message of an image."""
        self.count += 1
        if self.count <= MOST_MESSAGES:
            self.kept[name] = text


class ImageListing:
    """The images below a prefix, at any depth, except hidden ones and the outputs of earlier predictions: a stream.

    The images come in the order of their keys, as the bucket lists them; none is kept. Iterating asks the bucket anew.

    Args:
        settings: Settings, with the URI of the images: a prefix, or one OME-Zarr or a part of one.
        anonymous: Whether requests for the images are not signed, as public buckets allow.

    Attributes:
        unread: Error message for each key so far that cannot be predicted.
        notes: What plates list, but do not have, and what else the user should know, so far: one sentence for each.
    """

    def __init__(self, settings: PredictionSettings, *, anonymous: bool = False) -> None:
        self.unread = Messages()
        self.notes: list[str] = []
        self._settings = settings
        self._bucket = Bucket(settings.folder, anonymous=anonymous)

    def __iter__(self) -> Iterator[BucketImage]:
        """Yield the images.

        Raises:
            UsageError: There are no images, or two images have the same output; the second is then not yielded.
        """
        uri, names, listed = parse_uri(self._settings.images), _Names(), 0
        below = uri.key.removeprefix(self._bucket.uri.key).strip("/")
        for image in self._zarr(below) if in_zarr(uri.key) else self._listed():
            problem = self._problem(image)
            if problem is not None:
                where = f"{self._bucket.uri}/{image.key}"
                self.unread.add(image.key, f"{problem}, in {where!r}. Copy the object to another key.")
                continue
            names.add(image)
            listed += 1
            yield image
        if not listed and not self.unread.count:
            raise UsageError(
                f"Expected images below {uri}/; found none ({', '.join(sorted(IMAGE_SUFFIXES | SLIDE_SUFFIXES))}, "
                f"{ZARR_SUFFIX})."
            )

    def _listed(self) -> Iterator[BucketImage]:
        """Yield the images of a listing; the objects of a Zarr, of which there may be millions, are passed over."""
        for item in objects_and_zarrs(self._bucket):
            if isinstance(item, str):
                yield from self._zarr(item) if is_input(item) else ()
            elif is_input(item.key) and not _is_folder_of_console(item):
                yield from self._object(item)
            elif (reason := why_not_read(item.key)) is not None:
                self.unread.add(item.key, f"{self._bucket.uri / item.key}: {reason}")

    def _object(self, item: StoredObject) -> Iterator[BucketImage]:
        """Yield an image, or tell why it is none: a worker gets one object, and some slides are several."""
        if item.key.lower().endswith(tuple(WITH_OTHER_FILES)):
            self.unread.add(
                item.key,
                f"Expected an image in one object; {self._bucket.uri / item.key} is a slide of several files (MIRAX or "
                "DICOM). Download its folder, and predict it there.",
            )
        else:
            yield BucketImage(item.key, "".join(filter(str.isalnum, item.etag)), item.size)

    def _zarr(self, key: str) -> Iterator[BucketImage]:
        """Yield the images of an OME-Zarr, sorted, or tell why there are none."""
        try:
            paths = image_paths(bucket_zarr(self._bucket, key), self.notes.append, self._settings.series)
        except ImageError as error:
            self.unread.add(key, str(error))
            return
        keys = iter(sorted(f"{key}/{path}".rstrip("/") for path in paths))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            while some := list(islice(keys, _AT_ONCE)):
                try:
                    yield from list(pool.map(self._zarr_image, some))
                except ImageError as error:
                    self.unread.add(key, str(error))
                    return

    def _zarr_image(self, key: str) -> BucketImage:
        """Return an image in OME-Zarr; its ETag is one of its metadata and of all objects of its full resolution."""
        group = read_group(bucket_zarr(self._bucket, key))
        metadata = group.metadata if group is not None else {}
        levels = [level["path"] for scales in metadata.get("multiscales", []) for level in scales["datasets"]]
        digest, size = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()), 0
        try:
            for item in self._bucket.objects(f"{key}/{levels[0]}/") if levels else ():
                digest.update(f"{item.key} {item.etag}\n".encode())
                size += item.size
        except AccessDeniedError:
            self.notes.append(
                f"{self._bucket.uri / key} cannot be listed: if its pixels change, it is not predicted again by itself"
            )
        return BucketImage(key, digest.hexdigest()[: 2 * _DIGITS], size)

    def _problem(self, image: BucketImage) -> str | None:
        """Return why the key of an image, or that of its output, cannot be used."""
        problem = key_problem(image.key)
        if problem is not None:
            return problem
        longest = len((parse_uri(self._settings.out) / f"{image.stem}{LONGEST_ENDING}").key.encode())
        if longest > LONGEST_KEY:
            return f"Expected a key whose outputs have keys of at most {LONGEST_KEY:,} bytes; found one of {longest:,}"
        return None


def _is_folder_of_console(item: StoredObject) -> bool:
    """Return whether an object only makes the console of a store show a folder."""
    return item.key.endswith("/") and item.size == 0


class _Names:
    """Tells images of a sorted stream apart by the names of their results; keeps those that a later one may still have.

    Two keys with the same result begin alike, and all keys that begin alike follow each other.
    """

    def __init__(self) -> None:
        self._open: dict[str, dict[str, str]] = {}
        """Key of the image that writes results of a name, by what all keys with such results begin with, and name."""
        self._planes: dict[str, dict[str, str]] = {}
        """The same of images whose name ends as that of a plane, by the name without that ending."""

    def add(self, image: BucketImage) -> None:
        """Raise `UsageError` if an image before this one has the same results, or may have."""
        key, stem = image.key, image.stem
        whole = _PLANE.sub("", stem)
        for names in (self._open, self._planes):
            for start in [start for start in names if not key.startswith(start)]:
                del names[start]
        start = key[: next((at for at, letter in enumerate(whole) if key[at] != letter), len(whole))]
        other = _found(self._open, stem)
        if other is not None:
            check_stems([(stem, other), (stem, key)])
        plane = stem if whole != stem and _found(self._open, whole) is not None else _found(self._planes, stem)
        if plane is not None:
            raise UsageError(
                f"Expected keys that differ in more than the ending of a plane; found those of {whole!r} and "
                f"{plane!r}, whose results may have the same keys. Copy one of the objects to another key."
            )
        self._open.setdefault(start, {})[stem] = key
        if whole != stem:
            self._planes.setdefault(start, {})[whole] = stem


def _found(names: dict[str, dict[str, str]], name: str) -> str | None:
    return next((found[name] for found in names.values() if name in found), None)


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
