"""What an import reads from a folder or zip: images with their labels, checked, as records in temporary files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from nucleus.data.annotations import read_geojson, read_rois
from nucleus.data.coco import coco_shapes
from nucleus.data.dataset import LeftOut
from nucleus.data.images import Kind, decode_pixels, kind_of, open_pixels, pixel_sum
from nucleus.data.layouts import Annotated, MaskForm, find_images
from nucleus.data.masks import MaskFacts, MaskLabels, labels_from_mask, labels_from_masks
from nucleus.data.shapes import labels_from_shapes
from nucleus.data.shards import encode_record
from nucleus.data.sources import Source, open_source
from nucleus.data.splits import Fingerprint, fingerprint
from nucleus.errors import DataError, ImageError
from nucleus.progress import Advance

__all__ = ["SourceImage", "SourceImages", "read_source"]


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


def read_source(src: Path, spool: Path, advance: Advance) -> SourceImages:
    """Read and check the images of a folder or zip.

    Args:
        src: Folder or zip in one of the layouts of `nucleus.data.layouts`.
        spool: Folder for the temporary files.
        advance: Called with the number of images read and their total.

    Raises:
        DataError: The source contains no usable images.
    """
    source = open_source(src)
    layout = find_images(source)
    prepared, unusable = _prepare_all(source, layout.images, spool, advance)
    left_out = [*(LeftOut(title=path, reason=reason) for path, reason in layout.left_out.items()), *unusable]
    unique, duplicates = _without_duplicates(prepared)
    if not unique:
        reasons = "; ".join(f"{item.title}: {item.reason}" for item in left_out[:3])
        raise DataError(f"Expected usable images in {source.title}; found none ({reasons}).")
    return SourceImages(Path(source.title).name, layout.name, unique, duplicates, left_out)


def _prepare_all(
    source: Source, images: Sequence[Annotated], spool: Path, advance: Advance
) -> tuple[list[SourceImage], list[LeftOut]]:
    def prepare(numbered: tuple[int, Annotated]) -> SourceImage | LeftOut:
        index, image = numbered
        try:
            return _prepare(source, image, spool / f"{index}.record")
        except ImageError as error:
            return LeftOut(title=image.title, reason=str(error))

    prepared: list[SourceImage] = []
    left_out: list[LeftOut] = []
    with ThreadPoolExecutor() as pool:
        for done, result in enumerate(pool.map(prepare, enumerate(images)), 1):
            if isinstance(result, LeftOut):
                left_out.append(result)
            else:
                prepared.append(result)
            advance(done, len(images))
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
    # The name is unknown until all titles have been read, so it is filled in later.
    spooled.write_bytes(encode_record("", image, masks.labels))
    return SourceImage(
        title=annotated.title,
        given_split=annotated.given_split,
        kind=kind_of(image),
        shape=(height, width),
        masks=MaskFacts.of(masks, labels_expected=annotated.form is MaskForm.LABELS),
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
