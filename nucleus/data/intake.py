"""What an import reads from a source: which images it has, and each of them with its labels, checked, as a record."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from nucleus.config.names import Kind
from nucleus.data.annotations import read_geojson, read_rois
from nucleus.data.bucket_sources import open_bucket_source
from nucleus.data.coco import coco_shapes
from nucleus.data.dataset import LeftOut
from nucleus.data.fingerprints import Fingerprint, fingerprint
from nucleus.data.images import RgbImage, decode_pixels, kind_of, open_pixels, pixel_sum, stored_pixels
from nucleus.data.layouts import Annotated, find_images
from nucleus.data.masks import (
    MaskFacts,
    MaskForm,
    MaskLabels,
    labels_from_mask,
    labels_from_masks,
    labels_from_stored,
    turned,
)
from nucleus.data.shapes import labels_from_shapes
from nucleus.data.shards import RecordPlace, encode_record
from nucleus.data.sources import Source, open_source
from nucleus.data.zarr_labels import LabelledPlane, ZarrChoice, labelled_planes
from nucleus.data.zarr_plates import image_paths, in_zarr, zarr_name
from nucleus.data.zarr_store import ZarrFolder, bucket_zarr, local_zarr, why_no_zarr
from nucleus.errors import DataError, ImageError, UsageError
from nucleus.progress import Advance
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri

__all__ = [
    "ReadItems",
    "SourceImage",
    "SourceImages",
    "SourceItem",
    "SourceListing",
    "SourceOptions",
    "SourceReader",
    "ZarrItem",
    "read_items",
    "read_source",
]

_ZARR = "ome-zarr"
"""Name of the layout of OME-Zarr with labels."""
_ZARRS_AT_ONCE = 16
_UPRIGHT = 1
"""Orientation tag of an image that is stored as it is to be seen."""


@dataclass(frozen=True)
class SourceOptions:
    """Options of how a source is read.

    Attributes:
        anonymous: Whether requests to the bucket of a source are not signed, as public buckets allow.
        zarr: What to take of OME-Zarr; by default, the only labels, channel and plane.
    """

    anonymous: bool = False
    zarr: ZarrChoice = field(default_factory=ZarrChoice)


@dataclass(frozen=True)
class ZarrItem:
    """A plane of OME-Zarr that is to be read.

    Attributes:
        title: Name of the plane in the source.
        folder: The group of its image.
        name: Name of the image in the source.
        number: Number of the plane among those of the image that are imported.
    """

    title: str
    folder: ZarrFolder
    name: str
    number: int


SourceItem: TypeAlias = Annotated | ZarrItem | LeftOut
"""What is read at a time; or why something of the source cannot be, which is known from its listing."""


@dataclass(frozen=True)
class SourceImage:
    """An image that was read, checked and written as a record; only its fingerprint stays in memory.

    Attributes:
        title: Name of the image in the source.
        given_split: `train` or `test`, if the source has such folders.
        kind: Kind of image.
        shape: Height and width, pixels.
        masks: Facts about its labels.
        image_sha256: SHA-256 of the RGB pixels.
        labels_sha256: SHA-256 of the label pixels.
        fingerprint: Features for comparing it with others.
        record: Where its record is.
    """

    title: str
    given_split: str | None
    kind: Kind
    shape: tuple[int, int]
    masks: MaskFacts
    image_sha256: str
    labels_sha256: str
    fingerprint: Fingerprint
    record: RecordPlace


@dataclass(frozen=True)
class SourceImages:
    """The images of a source.

    Attributes:
        source: Name of the folder or zip.
        layout: Name of the layout that was recognised.
        images: Images that differ from each other.
        duplicates: Images with the same pixels as another one.
        left_out: Images that could not be used, and what else could not be read.
    """

    source: str
    layout: str
    images: list[SourceImage]
    duplicates: list[LeftOut]
    left_out: list[LeftOut]


class SourceReader:
    """Reads images of a source, in the process that listed it or in others.

    Args:
        place: Folder, prefix or zip; an absolute path.
        title: Its name in messages.
        options: Options of how it is read.
    """

    def __init__(self, place: Path | S3Uri, title: str, options: SourceOptions) -> None:
        self._arguments = place, title, options
        self._planes: dict[str, tuple[list[LabelledPlane], ImageError | None]] = {}
        self._identities: dict[str, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return SourceReader, self._arguments

    @cached_property
    def source(self) -> Source:
        """The source of image files. Raises `DataError` if there is none, `StorageError`."""
        place, title, options = self._arguments
        if isinstance(place, Path):
            return open_source(place, title)
        return open_bucket_source(place, anonymous=options.anonymous)

    def planes(self, folder: ZarrFolder, name: str) -> tuple[list[LabelledPlane], ImageError | None]:
        """Return the planes of an image of OME-Zarr that are imported; and why others are not, if they are not."""
        if folder.name not in self._planes:
            found: list[LabelledPlane] = []
            problem = None
            try:
                found.extend(labelled_planes(folder, name, self._arguments[2].zarr))
            except ImageError as error:
                problem = error
            self._planes[folder.name] = found, problem
        return self._planes[folder.name]

    def _plane(self, item: ZarrItem) -> LabelledPlane:
        planes, _ = self.planes(item.folder, item.name)
        if item.number >= len(planes) or planes[item.number].title != item.title:
            raise DataError(
                f"Expected {item.folder} to stay as it is while it is imported; its metadata were changed. Import "
                "again, when nobody writes there."
            )
        return planes[item.number]

    def identities(self, items: Iterable[SourceItem]) -> dict[str, str]:
        """Return, by its name, a text for each file of items that changes with its content. Raises `DataError`."""
        files = (file for item in items if isinstance(item, Annotated) for file in (item.image, *item.masks))
        return {file: self.source.identity(file) for file in dict.fromkeys(files)}

    def expect(self, items: Sequence[SourceItem], identities: Mapping[str, str]) -> None:
        """Check, in another process, that what items consist of is there as it was in the one that listed them.

        Raises:
            DataError: A file or folder is missing, or another one.
        """
        place = self._arguments[0]
        if identities:
            if isinstance(place, Path) and not place.exists():
                raise _not_shared(place, missing=True)
            unlike = self.source.unlike(identities)
            if unlike is not None:
                raise _not_shared(f"{self.source.title}/{unlike}", missing=not self.source.identity(unlike))
        for item in items:
            if isinstance(item, ZarrItem) and not self._identity(item.folder):
                raise _not_shared(item.folder, missing=True)

    def content(self, items: Sequence[SourceItem], identities: Mapping[str, str]) -> str:
        """Return 64 hexadecimal digits that differ between items of other content, or that are read otherwise."""
        digest = hashlib.sha256(f"{self._arguments[2]} {sorted(identities.items())}".encode())
        for item in items:
            if isinstance(item, ZarrItem):
                digest.update(f"{item.title} {item.name} {item.number} {self._identity(item.folder)}".encode())
            else:
                digest.update(repr(item).encode())
        return digest.hexdigest()

    def _identity(self, folder: ZarrFolder) -> str:
        """Return the identity of OME-Zarr, which is listed once a process, when it is first needed."""
        if folder.name not in self._identities:
            self._identities[folder.name] = folder.identity()
        return self._identities[folder.name]

    def read(self, item: SourceItem, path: Path) -> SourceImage | LeftOut:
        """Read and check an image and write its record to a file, if it can be used.

        Raises:
            DataError: The source must not be read, or changed since it was listed.
            StorageError: The bucket cannot be read.
        """
        if isinstance(item, LeftOut):
            return item
        try:
            if isinstance(item, ZarrItem):
                return _prepare_plane(self._plane(item), path)
            return _prepare(self.source, item, path)
        except ImageError as error:
            return LeftOut(title=item.title, reason=str(error))


def _not_shared(what: object, *, missing: bool) -> DataError:
    """Return the error of a worker that sees nothing, or something else, where the process that dealt it saw a file."""
    found = "does not" if missing else "found another one there: it was changed meanwhile, or its disk is another one"
    return DataError(
        f"Expected each worker to see {what}, as on a disk that all machines share; the one on {socket.gethostname()} "
        f"{found}. Mount the disk at the same path on each machine, or put the images into the bucket and import "
        "s3://bucket/prefix; or leave out --workers."
    )


@dataclass(frozen=True)
class SourceListing:
    """What a source has, before any image is read.

    Attributes:
        reader: Reads its images.
        layout: Name of the layout that was recognised.
        items: Its images.
        left_out: What else could not be read.
    """

    reader: SourceReader
    layout: str
    items: list[SourceItem]
    left_out: list[LeftOut]


ReadItems = Callable[[SourceListing, Advance], list[SourceImage | LeftOut]]
"""Reads all images of a listing, in their order, and tells how many were read and their total."""


def read_source(
    src: Path | S3Uri, read: ReadItems, advance: Advance, options: SourceOptions | None = None
) -> SourceImages:
    """Read and check the images of a folder, zip or OME-Zarr, here or in a bucket.

    Args:
        src: Folder, prefix or zip in one of the layouts of `nucleus.data.layouts`; or OME-Zarr with labels, or a folder
            or prefix with such.
        read: Reads the images and keeps their records; see `nucleus.data.spooling`.
        advance: Called with the number of images read and their total.
        options: Options of how the source is read.

    Raises:
        DataError: The source contains no usable images, or changed while it was read.
        UsageError: There is a choice, and the source is not OME-Zarr.
        StorageError: The bucket cannot be read.
    """
    listing = _listed(src, options or SourceOptions())
    found = read(listing, advance)
    prepared = [item for item in found if isinstance(item, SourceImage)]
    reasons = [*listing.left_out, *(item for item in found if isinstance(item, LeftOut))]
    unique, duplicates = _without_duplicates(prepared)
    if not unique:
        texts = "; ".join(f"{item.title}: {item.reason}" for item in reasons[:3])
        raise DataError(f"Expected usable images in {src}; found none ({texts}).")
    return SourceImages(Path(str(src)).name, listing.layout, unique, duplicates, reasons)


def read_items(
    folder: Path, listing: SourceListing, advance: Advance, *, threads: int | None = None
) -> list[SourceImage | LeftOut]:
    """Read images in threads of this process and write their records to a folder; `ReadItems` with a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with ThreadPoolExecutor(threads) as pool:
        paths = (folder / f"{number}.record" for number in range(len(listing.items)))
        for done, result in enumerate(pool.map(listing.reader.read, listing.items, paths), 1):
            found.append(result)
            advance(done, len(listing.items))
    return found


def _listed(src: Path | S3Uri, options: SourceOptions) -> SourceListing:
    reader = SourceReader(src.absolute() if isinstance(src, Path) else src, str(src), options)
    zarrs = _zarrs_of(src, reader, options)
    if zarrs is not None:
        return SourceListing(reader, _ZARR, list(_zarr_items(zarrs, reader)), [])
    if options.zarr != ZarrChoice():
        raise UsageError(
            f"Expected OME-Zarr for --labels, --channel, --z and --t; found image files in {src}. Leave them out."
        )
    found = find_images(reader.source)
    left_out = [LeftOut(title=path, reason=reason) for path, reason in found.left_out.items()]
    return SourceListing(reader, found.name, list(found.images), left_out)


def _zarrs_of(src: Path | S3Uri, reader: SourceReader, options: SourceOptions) -> dict[str, ZarrFolder] | None:
    """Return the OME-Zarr of a source by their names; None if it is a source of image files. Raises `DataError`."""
    if in_zarr(str(src)):
        folder = local_zarr(src) if isinstance(src, Path) else bucket_zarr(Bucket(src, anonymous=options.anonymous))
        return {zarr_name(str(src)): folder}
    if isinstance(src, Path) and (nameless := why_no_zarr(src)) is not None:
        raise DataError(nameless)
    zarrs = reader.source.zarrs()
    return zarrs if zarrs and not reader.source.entries() else None


def _zarr_items(zarrs: Mapping[str, ZarrFolder], reader: SourceReader) -> Iterator[SourceItem]:
    """Yield the planes of OME-Zarr, whose metadata are read for it."""
    for name, folder in zarrs.items():
        try:
            paths = image_paths(folder)
        except ImageError as error:
            yield LeftOut(title=name, reason=str(error))
            continue
        with ThreadPoolExecutor(_ZARRS_AT_ONCE) as pool:
            for items in pool.map(partial(_planes_of, reader, name, folder), paths):
                yield from items


def _planes_of(reader: SourceReader, zarr: str, top: ZarrFolder, path: str) -> list[SourceItem]:
    name = f"{zarr}/{path}".rstrip("/")
    try:
        folder = top.below(path) if path else top
    except ImageError as error:
        return [LeftOut(title=name, reason=str(error))]
    planes, problem = reader.planes(folder, name)
    items: list[SourceItem] = [ZarrItem(plane.title, folder, name, number) for number, plane in enumerate(planes)]
    return [*items, LeftOut(title=name, reason=str(problem))] if problem else items


def _prepare(source: Source, annotated: Annotated, path: Path) -> SourceImage:
    if annotated.problem:
        raise ImageError(annotated.problem)
    if not annotated.masks:
        raise ImageError(f"Expected a mask for {annotated.image}; found none.")
    file = open_pixels(source.read(annotated.image), annotated.image)
    image = decode_pixels(file)
    height, width = image.shape[:2]
    masks = _labels(source, annotated, (height, width), file.facts.orientation)
    return _written(annotated.title, image, masks, path, annotated.given_split, annotated.form)


def _prepare_plane(plane: LabelledPlane, path: Path) -> SourceImage:
    file, labels = plane.open()
    image = decode_pixels(file)
    masks = labels_from_stored(stored_pixels(labels), labels.name, (image.shape[0], image.shape[1]))
    return _written(plane.title, image, masks, path, None, MaskForm.LABELS)


def _written(
    title: str, image: RgbImage, masks: MaskLabels, path: Path, split: str | None, form: MaskForm
) -> SourceImage:
    # The name is unknown until all titles have been read, so it is filled in later.
    record = encode_record("", image, masks.labels)
    path.write_bytes(record)
    return SourceImage(
        title=title,
        given_split=split,
        kind=kind_of(image),
        shape=(image.shape[0], image.shape[1]),
        masks=MaskFacts.of(masks, labels_expected=form is MaskForm.LABELS),
        image_sha256=pixel_sum(image),
        labels_sha256=pixel_sum(masks.labels),
        fingerprint=fingerprint(image),
        record=RecordPlace(str(path), 0, len(record)),
    )


def _labels(source: Source, annotated: Annotated, shape: tuple[int, int], orientation: int) -> MaskLabels:
    if annotated.form in _OUTLINES:
        return _labels_of_outlines(source, annotated, shape, upright=orientation == _UPRIGHT)
    masks = [(entry, source.read(entry)) for entry in annotated.masks]
    if annotated.form is MaskForm.PER_NUCLEUS:
        return labels_from_masks(masks, shape, orientation)
    (mask,) = masks
    return labels_from_mask(mask, shape, orientation)


_OUTLINES = {MaskForm.GEOJSON, MaskForm.ROIS, MaskForm.COCO}


def _labels_of_outlines(source: Source, annotated: Annotated, shape: tuple[int, int], *, upright: bool) -> MaskLabels:
    (file,) = annotated.masks
    if annotated.record is not None:
        shapes, remarks = coco_shapes(annotated.record, shape)
    else:
        read = read_geojson if annotated.form is MaskForm.GEOJSON else read_rois
        shapes, remarks = read(source.read(file), file)
    name = f"{file} ({annotated.image})"
    masks = labels_from_shapes(shapes, shape, name)
    return replace(masks, remarks=(*remarks, *masks.remarks, *turned([] if upright else [name])))


def _without_duplicates(prepared: list[SourceImage]) -> tuple[list[SourceImage], list[LeftOut]]:
    """Keep the first of identical images, but prefer images in the source's test folder."""
    first: dict[str, SourceImage] = {}
    duplicates = []
    for image in sorted(prepared, key=lambda image: image.given_split != "test"):
        kept = first.setdefault(image.image_sha256, image)
        if kept is not image:
            same = "and labels" if kept.labels_sha256 == image.labels_sha256 else "but other labels"
            duplicates.append(LeftOut(title=image.title, reason=f"same pixels {same} as {kept.title}"))
    return list(first.values()), duplicates
