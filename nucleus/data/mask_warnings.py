"""Warnings of an import about masks that can be right, but seldom are."""

from collections.abc import Sequence
from dataclasses import dataclass

from nucleus.data.masks import MaskLabels
from nucleus.text import plural

__all__ = ["MaskFacts", "mask_warnings"]

_COVERED = 0.9
_IMAGES = "image"


@dataclass(frozen=True)
class MaskFacts:
    """Facts about the labels of an image by which errors in the masks show.

    Attributes:
        nuclei: Number of nuclei.
        coverage: Fraction of the pixels that nuclei cover.
        specks: Number of nuclei under 4 px.
        divided: Number of nuclei in separate parts of similar size.
        components: Whether a binary mask was found where labels were expected, and has several components.
    """

    nuclei: int
    coverage: float
    specks: int
    divided: int
    components: bool

    @classmethod
    def of(cls, masks: MaskLabels, *, labels_expected: bool) -> "MaskFacts":
        """Return the facts about labels; `labels_expected` says whether the file was in a folder of label images."""
        nuclei = masks.count
        components = labels_expected and masks.components and nuclei > 1
        return cls(nuclei, masks.coverage, masks.specks, masks.divided, components)


def mask_warnings(masks: Sequence[MaskFacts], splits_without_nuclei: Sequence[str]) -> list[str]:
    """Return a warning for each thing that is unlikely in the masks of a dataset.

    Args:
        masks: Facts about each image's labels.
        splits_without_nuclei: Splits of which no image has a nucleus.
    """
    if not any(facts.nuclei for facts in masks):
        return [
            f"NO NUCLEI: not one of the {plural(len(masks), _IMAGES)} has a nucleus. A model cannot be trained or "
            "scored on this dataset. Check that the masks are those of the images, and not empty."
        ]
    found = [
        f"No nuclei in the split {split}: {_CONSEQUENCES[split]} Import more images, or choose another --seed."
        for split in splits_without_nuclei
    ]
    return found + _unlikely(masks)


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


def _of(number: int, masks: Sequence[MaskFacts]) -> str:
    return f"{number} of {plural(len(masks), _IMAGES)}"
