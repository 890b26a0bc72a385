"""What an import reads from a folder or zip: images with their labels, checked, as records in temporary files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nucleus.data.annotations import read_geojson, read_rois
from nucleus.data.bucket_sources import open_bucket_source
from nucleus.data.coco import coco_shapes
from nucleus.data.dataset import LeftOut
from nucleus.data.fingerprints import Fingerprint, fingerprint
from nucleus.data.images import Kind, RgbImage, decode_pixels, kind_of, open_pixels, pixel_sum, stored_pixels
from nucleus.data.layouts import Annotated, MaskForm, find_images
from nucleus.data.masks import MaskFacts, MaskLabels, labels_from_mask, labels_from_masks, labels_from_stored
from nucleus.data.shapes import labels_from_shapes
from nucleus.data.shards import encode_record
from nucleus.data.sources import Source, open_source
from nucleus.data.zarr_labels import LabelledPlane, ZarrChoice, labelled_planes
from nucleus.data.zarr_plates import image_paths, in_zarr, zarr_name
from nucleus.data.zarr_store import ZarrFolder, bucket_zarr, local_zarr
from nucleus.errors import DataError, ImageError, UsageError
from nucleus.progress import Advance
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri

__all__ = ["SourceImage", "SourceImages", "SourceOptions", "read_source"]

_ZARR = "ome-zarr"
"""Name of the layout of OME-Zarr with labels."""


@dataclass(frozen=True)
class SourceOptions:
    """Options of how a source is read.

    Attributes:
        anonymous: Whether requests to the bucket of a source are not signed, as public buckets allow.
        zarr: What to take of OME-Zarr; None takes the only labels, channel and plane. For other sources, None.
    """

    anonymous: bool = False
    zarr: ZarrChoice | None = None


@dataclass(frozen=True)
class SourceImage:
    """An image that was read, checked and written to a temporary file; only its fingerprint stays in memory.

    Attributes:
        title: Name of the image in the source.
        given_split: `train` or `test`, if the source has such folders.
        kind: Kind of image.
        shape: Height and width, pixels.
        masks: Facts about its labels.
        image_sha256: SHA-256 of the RGB pixels.
        labels_sha256: SHA-256 of the label pixels.
        fingerprint: Features for comparing it with others.
        spooled: File of its record, which has no name yet.
    """

    title: str
    given_split: str | None
    kind: Kind
    shape: tuple[int, int]
    masks: MaskFacts
    image_sha256: str
    labels_sha256: str
    fingerprint: Fingerprint
    spooled: Path


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


def read_source(src: Path | S3Uri, spool: Path, advance: Advance, options: SourceOptions | None = None) -> SourceImages:
    """Read and check the images of a folder, zip or OME-Zarr, here or in a bucket.

    Args:
        src: Folder, prefix or zip in one of the layouts of `nucleus.data.layouts`; or OME-Zarr with labels, or a folder
            or prefix with such.
        spool: Folder for the temporary files.
        advance: Called with the number of images read and their total.
        options: Options of how the source is read.

    Raises:
        DataError: The source contains no usable images, or changed while it was read.
        UsageError: There is a choice, and the source is not OME-Zarr.
        StorageError: The bucket cannot be read.
    """
    options = options or SourceOptions()
    choice = options.zarr
    zarrs, source = _zarrs_and_source(src, anonymous=options.anonymous)
    if source is not None and choice is not None:
        raise UsageError(
            f"Expected OME-Zarr for --labels, --channel, --z and --t; found image files in {src}. Leave them out."
        )
    if source is None:
        layout, found = _ZARR, _prepare_all(_zarr_jobs(zarrs, choice or ZarrChoice(), spool), advance)
        left_out: dict[str, str] = {}
    else:
        images = find_images(source)
        layout, found = images.name, _prepare_all(_file_jobs(source, images.images, spool), advance)
        left_out = images.left_out
    prepared, unusable = found
    reasons = [*(LeftOut(title=path, reason=reason) for path, reason in left_out.items()), *unusable]
    unique, duplicates = _without_duplicates(prepared)
    if not unique:
        texts = "; ".join(f"{item.title}: {item.reason}" for item in reasons[:3])
        raise DataError(f"Expected usable images in {src}; found none ({texts}).")
    return SourceImages(Path(str(src)).name, layout, unique, duplicates, reasons)


def _zarrs_and_source(src: Path | S3Uri, *, anonymous: bool) -> tuple[dict[str, ZarrFolder], Source | None]:
    """Return the OME-Zarr of a source by their names, or the source of image files."""
    if in_zarr(str(src)):
        folder = local_zarr(src) if isinstance(src, Path) else bucket_zarr(Bucket(src, anonymous=anonymous))
        return {zarr_name(str(src)): folder}, None
    source = open_source(src) if isinstance(src, Path) else open_bucket_source(src, anonymous=anonymous)
    zarrs = source.zarrs()
    return (zarrs, None) if zarrs and not source.entries() else ({}, source)


_Job = tuple[str, Callable[[], SourceImage]]
"""Title of an image, and the function that reads and checks it."""


def _file_jobs(source: Source, images: Sequence[Annotated], spool: Path) -> list[_Job]:
    return [
        (image.title, partial(_prepare, source, image, spool / f"{index}.record")) for index, image in enumerate(images)
    ]


def _zarr_jobs(zarrs: Mapping[str, ZarrFolder], choice: ZarrChoice, spool: Path) -> list[_Job]:
    jobs: list[_Job] = []
    for name, folder in zarrs.items():
        try:
            for path in image_paths(folder):
                place, title = folder.below(path) if path else folder, f"{name}/{path}".rstrip("/")
                for plane in labelled_planes(place, title, choice):
                    jobs.append((plane.title, partial(_prepare_plane, plane, spool / f"{len(jobs)}.record")))
        except ImageError as error:
            jobs.append((name, partial(_refuse, error)))
    return jobs


def _refuse(error: ImageError) -> SourceImage:
    raise error


def _prepare_all(jobs: Sequence[_Job], advance: Advance) -> tuple[list[SourceImage], list[LeftOut]]:
    def prepare(job: _Job) -> SourceImage | LeftOut:
        title, work = job
        try:
            return work()
        except ImageError as error:
            return LeftOut(title=title, reason=str(error))

    prepared: list[SourceImage] = []
    left_out: list[LeftOut] = []
    with ThreadPoolExecutor() as pool:
        for done, result in enumerate(pool.map(prepare, jobs), 1):
            if isinstance(result, LeftOut):
                left_out.append(result)
            else:
                prepared.append(result)
            advance(done, len(jobs))
    return prepared, left_out


def _prepare(source: Source, annotated: Annotated, spooled: Path) -> SourceImage:
    if annotated.problem:
        raise ImageError(annotated.problem)
    if not annotated.masks:
        raise ImageError(f"Expected a mask for {annotated.image}; found none.")
    file = open_pixels(source.read(annotated.image), annotated.image)
    image = decode_pixels(file)
    height, width = image.shape[:2]
    masks = _labels(source, annotated, (height, width), file.facts.orientation)
    return _written(annotated.title, image, masks, spooled, annotated.given_split, annotated.form)


def _prepare_plane(plane: LabelledPlane, spooled: Path) -> SourceImage:
    file, labels = plane.open()
    image = decode_pixels(file)
    masks = labels_from_stored(stored_pixels(labels), labels.name, (image.shape[0], image.shape[1]))
    return _written(plane.title, image, masks, spooled, None, MaskForm.LABELS)


def _written(
    title: str, image: RgbImage, masks: MaskLabels, spooled: Path, split: str | None, form: MaskForm
) -> SourceImage:
    # The name is unknown until all titles have been read, so it is filled in later.
    spooled.write_bytes(encode_record("", image, masks.labels))
    return SourceImage(
        title=title,
        given_split=split,
        kind=kind_of(image),
        shape=(image.shape[0], image.shape[1]),
        masks=MaskFacts.of(masks, labels_expected=form is MaskForm.LABELS),
        image_sha256=pixel_sum(image),
        labels_sha256=pixel_sum(masks.labels),
        fingerprint=fingerprint(image),
        spooled=spooled,
    )


def _labels(source: Source, annotated: Annotated, shape: tuple[int, int], orientation: int) -> MaskLabels:
    if annotated.form in _OUTLINES:
        return _labels_of_outlines(source, annotated, shape)
    masks = [(entry, source.read(entry)) for entry in annotated.masks]
    if annotated.form is MaskForm.PER_NUCLEUS:
        return labels_from_masks(masks, shape, orientation)
    (mask,) = masks
    return labels_from_mask(mask, shape, orientation)


_OUTLINES = {MaskForm.GEOJSON, MaskForm.ROIS, MaskForm.COCO}


def _labels_of_outlines(source: Source, annotated: Annotated, shape: tuple[int, int]) -> MaskLabels:
    (file,) = annotated.masks
    if annotated.record is not None:
        shapes, remarks = coco_shapes(annotated.record, shape)
    else:
        read = read_geojson if annotated.form is MaskForm.GEOJSON else read_rois
        shapes, remarks = read(source.read(file), file)
    masks = labels_from_shapes(shapes, shape, f"{file} ({annotated.image})")
    return replace(masks, remarks=(*remarks, *masks.remarks))


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
