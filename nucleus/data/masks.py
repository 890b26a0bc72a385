"""Labels from the mask files of an image (labels, a binary mask, or one per nucleus), and warnings of unlikely ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import LabelImage, StoredImage, read_stored
from nucleus.data.mask_content import SIMILAR_AREA, SPECK_AREA, MaskContent, border_of, content_of
from nucleus.errors import ImageError
from nucleus.text import plural

__all__ = [
    "MaskFacts",
    "MaskFile",
    "MaskForm",
    "MaskLabels",
    "Remarks",
    "check_labels",
    "is_divided",
    "labels_from_mask",
    "labels_from_masks",
    "labels_from_stored",
    "mask_warnings",
    "turned",
]

_MAX_LABELS = np.iinfo(np.uint16).max
_MOST = 0.5
"""Something that covers more than this fraction of an image and of its border is the background."""
_FEW_SPECKS = 10
_UPRIGHT = 1
_COVERED = 0.9
_MOST_NAMED = 3
_IMAGES = "image"

_TURNED = (
    "Annotations without the orientation tag of their image, which is not applied: check that they are the way round "
    "in which the image is stored"
)

MaskFile = tuple[str, bytes]
"""Name and content of a mask file."""
Remarks = tuple[tuple[str, tuple[str, ...]], ...]
"""What was decided about parts of an annotation: each decision with the names of the parts."""


class MaskForm(StrEnum):
    """Content of the mask files of an image."""

    PER_NUCLEUS = "per_nucleus"
    """One binary mask per nucleus."""
    BINARY = "binary"
    """One binary mask for all nuclei."""
    LABELS = "labels"
    """One integer label image."""
    GEOJSON = "geojson"
    """One GeoJSON file of QuPath."""
    ROIS = "rois"
    """One RoiSet.zip or .roi of ImageJ."""
    COCO = "coco"
    """One COCO file for all images that it names."""


@dataclass(frozen=True)
class MaskLabels:
    """Labels of an image, and how they were made.

    Attributes:
        labels: H x W, uint16, 0 background, 1..K nuclei.
        components: Whether the nuclei are the connected components of a binary mask.
        divided: Number of nuclei in separate parts of similar size, of one label or one file.
        remarks: What was decided about parts of the annotation.
    """

    labels: LabelImage
    components: bool = False
    divided: int = 0
    remarks: Remarks = ()

    @property
    def count(self) -> int:
        """Number of nuclei."""
        return int(self.labels.max())

    @property
    def coverage(self) -> float:
        """Fraction of the pixels that nuclei cover."""
        return float(np.count_nonzero(self.labels)) / self.labels.size

    @property
    def specks(self) -> int:
        """Number of nuclei under 4 px."""
        return int(np.count_nonzero(np.bincount(self.labels.ravel())[1:] < SPECK_AREA))


def labels_from_mask(mask: MaskFile, shape: tuple[int, int], orientation: int = _UPRIGHT) -> MaskLabels:
    """Read the only mask file of an image: labels, or a binary mask, whose connected components become nuclei.

    Labels are renumbered 1..K in the order of their values. Components are 8-connected.

    Args:
        mask: Name and content of the file.
        shape: Height and width of the image, as stored.
        orientation: Orientation tag of the image, for the message if the sizes differ.

    Raises:
        ImageError: The file cannot be read, has another size than the image, or can be no mask; see `content_of`. Or
            the nuclei would be noise, or the background would be a nucleus.
    """
    name, data = mask
    return labels_from_stored(read_stored(data, name), name, shape, orientation)


def labels_from_stored(
    stored: StoredImage, name: str, shape: tuple[int, int], orientation: int = _UPRIGHT
) -> MaskLabels:
    """Return the labels in the pixels of a mask; see `labels_from_mask`, whose errors it raises.

    Args:
        stored: The pixels, as they are stored.
        name: Name of the mask in messages.
        shape: Height and width of the image, as stored.
        orientation: Orientation tag of the image, for the message if the sizes differ.
    """
    _check_size(stored, shape, name, orientation)
    content = content_of(stored, name)
    labels = _components(content, name) if content.binary else content.numbers
    check_labels(labels, name)
    remarks = turned([name]) if stored.orientation != orientation else ()
    return MaskLabels(labels.astype(np.uint16), content.binary, content.divided, remarks)


def labels_from_masks(masks: Sequence[MaskFile], shape: tuple[int, int], orientation: int = _UPRIGHT) -> MaskLabels:
    """Merge one binary mask per nucleus to labels 1..K; where masks overlap, the first one keeps the pixel.

    A single file that holds several labels is read as a label image. Arguments as for `labels_from_mask`, the masks in
    the order of the labels.

    Raises:
        ImageError: A mask cannot be read, has another size than the image, or holds no single nucleus.
    """
    labels = np.zeros(shape, np.int32)
    count = divided = 0
    unlike = []
    for name, data in masks:
        stored = read_stored(data, name)
        _check_size(stored, shape, name, orientation)
        content = content_of(stored, name)
        unlike += [name] if stored.orientation != orientation else []
        if not content.binary:
            if len(masks) == 1:
                return labels_from_stored(stored, name, shape, orientation)
            raise ImageError(
                f"Expected one nucleus in the mask {name}, because its image has {len(masks)} mask files; found "
                f"{content.numbers.max()} labels. Keep one label image, or one binary mask per nucleus."
            )
        _check_ground(content.numbers, name)
        mask = (content.numbers > 0) & (labels == 0)
        if mask.any():
            count += 1
            _check_count(count, name)
            divided += is_divided(content.numbers)
            labels[mask] = count
    return MaskLabels(labels.astype(np.uint16), divided=divided, remarks=turned(unlike))


def turned(names: Sequence[str]) -> Remarks:
    """Return the remark on annotations that lack the orientation tag of their image, or have another one."""
    return ((_TURNED, tuple(names)),) if names else ()


def check_labels(labels: NDArray[np.int32], name: str) -> None:
    """Raise `ImageError` if there are more nuclei than a label image can hold, or if one of them is the background."""
    _check_count(int(labels.max()), name)
    _check_ground(labels, name)


def _components(content: MaskContent, name: str) -> NDArray[np.int32]:
    count, labels = cv2.connectedComponents((content.numbers > 0).astype(np.uint8), connectivity=8)
    areas = np.bincount(labels.ravel())[1:]
    if count - 1 > _FEW_SPECKS and np.median(areas) < SPECK_AREA:
        raise ImageError(
            f"Expected nuclei in the mask {name}; found {count - 1} separate areas, most of them under {SPECK_AREA} "
            "px, as in noise. Remove the specks, or save labels."
        )
    return np.asarray(labels, np.int32)


def is_divided(numbers: NDArray[np.int32] | NDArray[np.bool_]) -> bool:
    """Return whether a mask that is not empty has two or more components of similar size."""
    mask = (numbers > 0).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(mask)
    crop = np.ascontiguousarray(mask[top : top + height, left : left + width])
    _, labels = cv2.connectedComponents(crop, connectivity=8)
    areas = np.bincount(labels.ravel())[1:]
    return bool(np.count_nonzero(areas >= SIMILAR_AREA * areas.max()) > 1)


def _check_ground(numbers: NDArray[np.int32], name: str) -> None:
    """Raise `ImageError` if a nucleus covers most of the image and of its border, as the background does."""
    if np.count_nonzero(numbers) <= _MOST * numbers.size:
        return
    border = border_of(numbers)
    shares = np.bincount(numbers.ravel()) / numbers.size
    on_border = np.bincount(border, minlength=len(shares)) / border.size
    largest = 1 + int(np.argmax(shares[1:]))
    if shares[largest] > _MOST and on_border[largest] > _MOST:
        raise ImageError(
            f"Expected nuclei on a background of 0 in the mask {name}; one nucleus would cover {shares[largest]:.0%} "
            f"of the image and {on_border[largest]:.0%} of its border, as the background does. If the mask is "
            "inverted, invert it; else set the background to 0."
        )


def _check_size(mask: StoredImage, shape: tuple[int, int], name: str, orientation: int) -> None:
    height, width = mask.pixels.shape[:2]
    if (height, width) == shape:
        return
    turned = ""
    if {mask.orientation, orientation} != {_UPRIGHT}:
        turned = (
            f" Orientation tags (image {orientation}, mask {mask.orientation}) are not applied: save both files "
            "upright and without the tag."
        )
    raise ImageError(
        f"Expected the mask {name} to be as large as its image, {shape[1]} x {shape[0]} px (width x height, as "
        f"stored); found {width} x {height}.{turned}"
    )


def _check_count(count: int, name: str) -> None:
    if count > _MAX_LABELS:
        raise ImageError(f"Expected at most {_MAX_LABELS} nuclei in one image ({name}). Cut it into tiles first.")


@dataclass(frozen=True)
class MaskFacts:
    """Facts about the labels of an image by which errors in the masks show.

    Attributes:
        nuclei: Number of nuclei.
        coverage: Fraction of the pixels that nuclei cover.
        specks: Number of nuclei under 4 px.
        divided: Number of nuclei in separate parts of similar size.
        components: Whether a binary mask was found where labels were expected, and has several components.
        remarks: What was decided about parts of the annotation.
    """

    nuclei: int
    coverage: float
    specks: int
    divided: int
    components: bool
    remarks: Remarks = ()

    @classmethod
    def of(cls, masks: MaskLabels, *, labels_expected: bool) -> "MaskFacts":
        """Return the facts about labels; `labels_expected` says whether the file was in a folder of label images."""
        nuclei = masks.count
        components = labels_expected and masks.components and nuclei > 1
        return cls(nuclei, masks.coverage, masks.specks, masks.divided, components, masks.remarks)


def mask_warnings(masks: Sequence[MaskFacts], splits_without_nuclei: Sequence[str]) -> list[str]:
    """Return a warning for each thing that is unlikely in the masks of a dataset.

    Args:
        masks: Facts about each imported image's labels.
        splits_without_nuclei: Splits of which no image has a nucleus.
    """
    if not any(facts.nuclei for facts in masks) and len(splits_without_nuclei) == len(_CONSEQUENCES):
        return [
            f"NO NUCLEI: not one of the {plural(len(masks), _IMAGES)} has a nucleus. A model cannot be trained or "
            "scored on this dataset. Check that the masks are those of the images, and not empty.",
            *_remarked(masks),
        ]
    found = [
        f"No nuclei in the split {split}: {_CONSEQUENCES[split]} Import more images, or choose another --seed."
        for split in splits_without_nuclei
    ]
    return [*found, *_unlikely(masks), *_remarked(masks)]


_CONSEQUENCES = {
    "train": "training will refuse this dataset.",
    "val": "training will refuse this dataset.",
    "test": "scores on it are undefined, and no model can pass the gate.",
}


def _unlikely(masks: Sequence[MaskFacts]) -> list[str]:
    found = []
    few = sum(facts.nuclei <= 1 for facts in masks)
    if 2 * few > len(masks):
        found.append(
            f"{_of(few, masks)} have 0 or 1 nuclei. If they have more, the masks do not tell them apart: give each "
            "nucleus a value of its own, or separate the nuclei in binary masks."
        )
    covered = sum(facts.coverage > _COVERED for facts in masks)
    if covered:
        found.append(f"{_of(covered, masks)} are covered by nuclei to more than 90 %. Check that 0 is the background.")
    binary = sum(facts.components for facts in masks)
    if binary:
        found.append(
            f"{_of(binary, masks)} have a binary mask where labels were expected: its connected components became "
            "nuclei, and nuclei that touch became one."
        )
    divided = [facts.divided for facts in masks if facts.divided]
    if divided:
        found.append(
            f"{_of(len(divided), masks)} have nuclei in separate parts of similar size ({sum(divided)} in all). Each "
            "became one nucleus; check that no two nuclei share a label, or a file in the layout of a file per nucleus."
        )
    specks = [facts.specks for facts in masks if facts.specks]
    if specks:
        found.append(
            f"{_of(len(specks), masks)} have nuclei under 4 px ({sum(specks)} in all). Check that they are no specks."
        )
    return found


def _remarked(masks: Sequence[MaskFacts]) -> list[str]:
    """Return a sentence for each decision about parts of annotations, with the number of them and some names."""
    found: dict[str, list[str]] = {}
    for facts in masks:
        for decision, names in facts.remarks:
            found.setdefault(decision, []).extend(names)
    return [
        f"{decision}: {len(names)}, {', '.join(names[:_MOST_NAMED])}{', ...' if len(names) > _MOST_NAMED else ''}."
        for decision, names in found.items()
    ]


def _of(number: int, masks: Sequence[MaskFacts]) -> str:
    return f"{number} of {plural(len(masks), _IMAGES)}"
