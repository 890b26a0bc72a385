"""Corrections of nuclei, saved in a bucket or a folder so that `nucleus data import` takes them as they are.

A set is `<place>/<set>/` with, for each image, `images/<stem>.<suffix>`, `labels/<stem>.tif` and
`about/<stem>.json`. The stem ends in a part of the image's SHA-256, so that two images never meet. A revision appears
by one write, that of its labels, which carry who made it, when, and with which model; the JSON repeats that. This write
is a compare-and-swap: who has not seen the latest revision cannot replace it. Earlier revisions stay in the hidden
folder `.revisions/`.
"""

import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nucleus.config.names import check_name
from nucleus.errors import IntegrityError, ObjectExistsError, ObjectNotFoundError, UsageError
from nucleus.storage.bucket import Bucket
from nucleus.storage.claims import file_lock
from nucleus.storage.files import output_error, write_atomic
from nucleus.storage.uri import uri_or_path
from nucleus.text import moment_text

__all__ = [
    "BucketPlace",
    "CorrectedFile",
    "CorrectionSet",
    "FolderPlace",
    "Place",
    "Revision",
    "Saved",
    "checked_who",
    "correction_stem",
    "place_of",
    "sets_of",
]

_FORMAT = 1
_FOLDER = "corrections"
_HASH_DIGITS = 10
_LONGEST_STEM = 80
_NO_LETTERS = re.compile(r"[^A-Za-z0-9_.+-]+")
_LOCK = ".lock"
_OTHER_PLACE = "--corrections DIR"


class Revision(BaseModel):
    """A revision of the nuclei of an image.

    Attributes:
        format: Format of this record.
        revision: Its number, from 1.
        who: Who made it, as they call themselves.
        when: Time, UTC, ISO 8601.
        model: The model that proposed the nuclei.
        image: Name of the image.
        image_sha256: SHA-256 of the file that the nuclei were found in.
        options: Options of the prediction.
        based_on: Number of the revision that was corrected; None for nuclei that the model found.
        nuclei: Number of nuclei.
        removed: Number of nuclei that were removed since `based_on`.
        drawn: Number of nuclei that are new or have another shape since then.
        labels_sha256: SHA-256 of the label pixels.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: int = _FORMAT
    revision: Annotated[int, Field(ge=1)]
    who: Annotated[str, Field(min_length=1, max_length=100)]
    when: str
    model: str
    image: str
    image_sha256: str
    options: dict[str, Any] = Field(default_factory=dict)
    based_on: int | None = None
    nuclei: int
    removed: int
    drawn: int
    labels_sha256: str


@dataclass(frozen=True)
class Saved:
    """Nuclei that are saved.

    Attributes:
        revision: Who made them, when, and from what.
        tag: What a compare-and-swap needs to replace them.
        data: The TIFF.
    """

    revision: Revision
    tag: str
    data: bytes

    @property
    def labels(self) -> NDArray[np.int32]:
        """H x W, 0 background."""
        return np.asarray(tifffile.imread(io.BytesIO(self.data)), np.int32)


@dataclass(frozen=True)
class CorrectedFile:
    """The file of a corrected image.

    Attributes:
        suffix: Its suffix, with the dot.
        read: Function that returns its bytes, which are always the same.
    """

    suffix: str
    read: Callable[[], bytes]


class Place(ABC):
    """Where corrections are saved: keys with bytes, which are replaced by compare-and-swap.

    Attributes:
        title: Its address for people and for `nucleus data import`.
    """

    title: str

    @abstractmethod
    def read(self, key: str) -> tuple[bytes, str] | None:
        """Return the bytes at a key and their tag; None if there are none."""

    @abstractmethod
    def write(self, key: str, data: bytes, *, tag: str | None) -> str:
        """Write bytes completely or not at all; return their tag.

        Args:
            key: The key.
            data: The bytes.
            tag: Tag of the bytes that are replaced; None if there are none.

        Raises:
            ObjectExistsError: Other bytes are there.
        """

    @abstractmethod
    def replace(self, key: str, data: bytes) -> None:
        """Write bytes whatever is there."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder."""


class BucketPlace(Place):
    """Corrections in a bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self.title, self._bucket = str(bucket.uri), bucket

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Return the bytes at a key and their tag; None if there are none."""
        try:
            return self._bucket.get_tagged(key)
        except ObjectNotFoundError:
            return None

    def write(self, key: str, data: bytes, *, tag: str | None) -> str:
        """Write bytes by a conditional request; return their tag."""
        return self._bucket.put(key, data, if_absent=tag is None, if_match=tag)

    def replace(self, key: str, data: bytes) -> None:
        """Write bytes whatever is there."""
        self._bucket.put(key, data)

    def names(self, folder: str) -> list[str]:
        """Return the names of the prefixes below a prefix."""
        return self._bucket.folders(folder)


class FolderPlace(Place):
    """Corrections in a folder; a lock on a file orders the writers, and the tag is the SHA-256 of the bytes."""

    def __init__(self, folder: Path) -> None:
        self.title, self._folder = str(folder), folder

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Return the bytes at a key and their SHA-256; None if there are none."""
        path = self._folder / key
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise output_error(path, error, _OTHER_PLACE) from error
        return data, hashlib.sha256(data).hexdigest()

    def write(self, key: str, data: bytes, *, tag: str | None) -> str:
        """Write bytes under the lock if those that are there have the tag; return the new tag."""
        with file_lock(self._folder / _LOCK, _OTHER_PLACE):
            there = self.read(key)
            if (there and there[1]) != tag:
                raise ObjectExistsError(
                    f"Expected {'what was read' if tag else 'nothing'} at {key}; found other bytes."
                )
            write_atomic(self._folder / key, data, _OTHER_PLACE)
        return hashlib.sha256(data).hexdigest()

    def replace(self, key: str, data: bytes) -> None:
        """Write bytes whatever is there."""
        write_atomic(self._folder / key, data, _OTHER_PLACE)

    def names(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder."""
        place = self._folder / folder
        try:
            return sorted(each.name for each in place.iterdir() if each.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise output_error(place, error, _OTHER_PLACE) from error


def place_of(text: str | None, bucket: Bucket | None) -> Place:
    """Return the place of corrections.

    Args:
        text: `s3://bucket/prefix`, or a folder; None for `corrections/` in the project's bucket, or here without one.
        bucket: The project's bucket.

    Raises:
        UriError: `text` is a malformed URI.
        UsageError: `text` is a file.
    """
    if text is not None:
        place = uri_or_path(text)
        if not isinstance(place, Path):
            return BucketPlace(Bucket(place))
        if place.is_file():
            raise UsageError(f"Expected a folder for corrections at {text}; it is a file. Name another: {_OTHER_PLACE}")
        return FolderPlace(place)
    if bucket is None:
        return FolderPlace(Path(_FOLDER))
    return BucketPlace(Bucket(bucket.uri / _FOLDER, single_writer=bucket.single_writer))


def correction_stem(name: str, sha256: str, variant: str = "") -> str:
    """Return the name of an image's files in a set, such as `well-a1-3f9c01d2ab`.

    Args:
        name: Name of the image.
        sha256: SHA-256 of its file.
        variant: What of the file it is, if that is not all; it changes the end of the name.
    """
    words = _NO_LETTERS.sub("-", PurePosixPath(name).stem).strip(".-")[:_LONGEST_STEM] or "image"
    end = hashlib.sha256(f"{sha256}{variant}".encode()).hexdigest() if variant else sha256
    return f"{words}-{end[:_HASH_DIGITS]}"


class CorrectionSet:
    """A set of corrected images.

    Args:
        place: Where the sets are.
        name: Name of the set.

    Raises:
        UriError: The name is none.
    """

    def __init__(self, place: Place, name: str) -> None:
        self._place, self.name = place, check_name(name, "correction set")
        self.title = f"{place.title.rstrip('/')}/{name}"

    def find(self, stem: str) -> Saved | None:
        """Return what is saved of an image; None if nothing is.

        Raises:
            IntegrityError: The labels are damaged, or not from this page.
        """
        found = self._place.read(self._labels(stem))
        return None if found is None else self._saved(stem, *found)

    def _saved(self, stem: str, data: bytes, tag: str) -> Saved:
        try:
            with tifffile.TiffFile(io.BytesIO(data)) as file:
                revision = Revision.model_validate_json(file.pages.first.description)
        except (ValidationError, tifffile.TiffFileError, ValueError, IndexError) as error:
            raise IntegrityError(
                f"Expected labels that were saved by the page at {self.title}/labels/{stem}.tif; found other bytes. "
                "Move this file away, or save into another set."
            ) from error
        return Saved(revision, tag, data)

    def save(
        self, stem: str, file: CorrectedFile, labels: NDArray[np.integer], facts: Mapping[str, Any], base: str | None
    ) -> Saved:
        """Save the nuclei of an image as a new revision.

        Args:
            stem: Name of the image's files, from `correction_stem`.
            file: The image.
            labels: H x W, 0 background.
            facts: Who made it and from what: `who`, `model`, `image`, `image_sha256`, `options`, `removed`, `drawn`.
            base: Tag of the revision that was corrected; None if none was there.

        Returns:
            What was saved.

        Raises:
            ObjectExistsError: Another revision is there than `base`, and it stays.
            StorageError: The bucket cannot be written.
            OutputError: The folder cannot be written.
        """
        before = self.find(stem)
        if (before and before.tag) != base:
            raise _conflict(before)
        if before is not None:
            self._keep(stem, before)
        self._create(f"{self.name}/images/{stem}{file.suffix}", file.read())
        revision = Revision(
            revision=before.revision.revision + 1 if before else 1,
            based_on=before.revision.revision if before else None,
            when=datetime.now(UTC).replace(microsecond=0).isoformat(),
            nuclei=int(np.count_nonzero(np.bincount(labels.ravel())[1:])),
            labels_sha256=hashlib.sha256(np.ascontiguousarray(labels, "<i4").data).hexdigest(),
            **facts,
        )
        data = _label_file(labels, revision)
        try:
            tag = self._place.write(self._labels(stem), data, tag=base)
        except ObjectExistsError as error:
            raise _conflict(self.find(stem)) from error
        self._place.replace(f"{self.name}/about/{stem}.json", revision.model_dump_json(indent=1).encode())
        return Saved(revision, tag, data)

    def _keep(self, stem: str, saved: Saved) -> None:
        """Copy a revision to where it stays, before another one replaces it."""
        self._create(f"{self.name}/.revisions/{stem}/{saved.revision.revision:06d}.tif", saved.data)

    def _create(self, key: str, data: bytes) -> None:
        """Write bytes unless the same are there. Raises `IntegrityError` if others are."""
        try:
            self._place.write(key, data, tag=None)
        except ObjectExistsError as error:
            found = self._place.read(key)
            if found is None or found[0] != data:
                raise IntegrityError(
                    f"Expected {self._place.title}/{key} to be what was saved before; found other bytes. Move this "
                    "file away, or save into another set."
                ) from error

    def _labels(self, stem: str) -> str:
        return f"{self.name}/labels/{stem}.tif"


def _conflict(saved: Saved | None) -> ObjectExistsError:
    if saved is None:
        return ObjectExistsError("Expected the revision that was opened; it was removed. Open the image again.")
    made = saved.revision
    return ObjectExistsError(
        f"Expected to save over what was opened; {made.who} saved revision {made.revision} at {moment_text(made.when)} "
        "UTC. Look at it and take your changes over, or save into another set."
    )


def _label_file(labels: NDArray[np.integer], revision: Revision) -> bytes:
    """Return a TIFF of labels, of 16 bits where they suffice, with the revision as its description."""
    kind = np.uint16 if int(labels.max(initial=0)) <= np.iinfo(np.uint16).max else np.uint32
    file = io.BytesIO()
    description = json.dumps(revision.model_dump())  # a TIFF says it in ASCII, so names are escaped
    tifffile.imwrite(file, labels.astype(kind), compression="zlib", description=description, metadata=None)
    return file.getvalue()


def sets_of(place: Place) -> list[str]:
    """Return the names of the sets at a place."""
    return [name for name in place.names("") if not name.startswith(".")]


def checked_who(who: str) -> str:
    """Return who corrects, without control characters. Raises `UsageError` if it is empty or too long."""
    shown = "".join(letter for letter in who if letter.isprintable()).strip()
    if not 1 <= len(shown) <= 100:
        raise UsageError("Expected your name or initials, of 1 to 100 letters. Write them beside the button.")
    return shown
