"""The nuclei of an image as the page keeps them: labels, rows and outlines in a folder; and what people change.

A layer is never altered. The nuclei that a model found are one, each saved correction that is opened is another; what
people change is a list of `Changes` to a layer until it is saved.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from nucleus.data.shapes import Polygons, labels_from_shapes
from nucleus.errors import UsageError
from nucleus.lazy import ndimage
from nucleus.model.tiling import Region
from nucleus.predict.blocks import AssembledLabels, assembled_labels, plan_blocks
from nucleus.predict.measurement import Frame, MeasuredPart
from nucleus.predict.outlines import Outline, outlines_of
from nucleus.storage.files import atomic_folder

__all__ = [
    "FOUND",
    "Asked",
    "Changes",
    "EditedLayer",
    "Layer",
    "LayerWriter",
    "MissedPlace",
    "NucleusShape",
    "changed_labels",
    "filled_shape",
    "new_layer",
    "packed_outlines",
    "parts_of",
    "simplified",
]

FOUND = "found"
"""Name of the layer that the model found."""
_LABELS, _ROWS, _OUTLINES = "labels.npy", "rows.json", "outlines.bin"
_BLOCK_SIDE = 2048
_HALF_PIXELS = 2
"""Outlines are sent in half pixels, in which their corners are integers."""
_MOST_POINTS = 200_000
_MOST_CHANGES = 200_000
_LARGEST_BOX = 1 << 24
"""Pixels of the box around a nucleus that was drawn."""
_LARGEST_LABEL = (1 << 31) - 1
_LARGEST_HIDDEN = 5_000_000

Label = Annotated[int, Field(ge=1, le=_LARGEST_LABEL)]


class NucleusShape(BaseModel):
    """A nucleus that was drawn or changed.

    Attributes:
        label: Its number, from 1.
        rings: x and y of its corners in turn, px; a pixel is in the nucleus if its centre is in an odd number of rings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: Label
    rings: tuple[tuple[float, ...], ...] = Field(min_length=1, max_length=1000)

    @property
    def polygons(self) -> Polygons:
        """The rings as a shape. Raises `UsageError` if one is not a list of at least three points."""
        for ring in self.rings:
            if len(ring) % 2 or not 6 <= len(ring) <= 2 * _MOST_POINTS:
                raise UsageError(
                    f"Expected x and y of at least three corners in each ring of nucleus {self.label}; found "
                    f"{len(ring)} numbers. Draw the nucleus again."
                )
        rings = tuple(np.asarray(ring, np.float64).reshape(-1, 2) for ring in self.rings)
        return Polygons(f"nucleus {self.label}", (rings,))


class Changes(BaseModel):
    """What was changed in a layer.

    Attributes:
        removed: Labels of nuclei that are gone.
        shapes: Nuclei that are new, or have another shape; no pixel belongs to two.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    removed: tuple[Label, ...] = Field(default=(), max_length=_MOST_CHANGES)
    shapes: tuple[NucleusShape, ...] = Field(default=(), max_length=_MOST_CHANGES)

    @property
    def labels(self) -> list[int]:
        """Every label that is removed, new or of another shape."""
        return sorted({*self.removed, *(shape.label for shape in self.shapes)})


class Asked(BaseModel):
    """What the page asks; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class EditedLayer(Asked):
    """A layer with changes.

    Attributes:
        layer: Name of the layer.
        changes: What was changed in it.
        hidden: Nuclei that are left out besides.
    """

    layer: str = FOUND
    changes: Changes = Changes()
    hidden: tuple[Label, ...] = Field(default=(), max_length=_LARGEST_HIDDEN)


class MissedPlace(Asked):
    """A click where a nucleus was missed.

    Attributes:
        x: Column, px.
        y: Row, px.
        taken: Nuclei around it.
        diameter: Typical diameter of the nuclei, px.
    """

    x: float
    y: float
    taken: tuple[NucleusShape, ...] = Field(default=(), max_length=5000)
    diameter: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class Layer:
    """The nuclei of an image, in a folder.

    Attributes:
        folder: The folder.
    """

    folder: Path

    @property
    def labels(self) -> NDArray[np.int32]:
        """H x W, 0 background; mapped from its file, read only."""
        return np.asarray(np.load(self.folder / _LABELS, mmap_mode="r"))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Row of each nucleus, as in `nuclei.csv`."""
        return list(json.loads((self.folder / _ROWS).read_bytes()))

    @property
    def outlines(self) -> bytes:
        """Outlines of all nuclei, from `packed_outlines`."""
        return (self.folder / _OUTLINES).read_bytes()


class LayerWriter:
    """Takes the parts of an image, and writes them as a layer."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._outlines: list[bytes] = []

    def add(self, part: MeasuredPart) -> None:
        """Add the nuclei of a part."""
        outlines = outlines_of(part.labels, top=part.frame.top, left=part.frame.left)
        named = (replace(outline, label=row["label"]) for outline, row in zip(outlines, part.rows, strict=True))
        self._outlines.append(packed_outlines(named))
        self.rows += part.rows

    def write(self, folder: Path, labels: NDArray[np.int32]) -> Layer:
        """Write the layer, completely or not at all. Raises `OutputError`."""
        with atomic_folder(folder) as beside:
            np.save(beside / _LABELS, labels)
            (beside / _ROWS).write_text(json.dumps(self.rows), encoding="utf-8")
            (beside / _OUTLINES).write_bytes(b"".join(self._outlines))
        return Layer(folder)


def packed_outlines(outlines: Iterable[Outline]) -> bytes:
    """Return outlines as little-endian int32: for each its label, the number of its rings, and each ring.

    A ring is the number of its points, and x and y of each in half pixels.
    """
    parts: list[NDArray[np.int32]] = []
    for outline in outlines:
        parts.append(np.array([outline.label, len(outline.rings)], np.int32))
        for ring in outline.rings:
            parts.append(np.array([len(ring)], np.int32))
            parts.append(np.rint(ring.ravel() * _HALF_PIXELS).astype(np.int32))
    return b"".join(part.astype("<i4").tobytes() for part in parts)


def parts_of(frame: Frame, labels: NDArray[np.int32]) -> Iterator[tuple[Region, NDArray[np.int32], list[int]]]:
    """Yield the nuclei of an image in parts; each is complete in one part.

    Args:
        frame: Frame of the whole image.
        labels: H x W, 0 background, any labels.

    Yields:
        The region of a part, its labels, numbered 1..k, and the labels that these have in the image, in order.
    """
    boxes = {number: box for number, box in enumerate(ndimage.find_objects(labels), 1) if box is not None}
    for block in plan_blocks(frame.shape, _BLOCK_SIDE, 0):
        inside = [number for number, box in boxes.items() if _starts_in(box, block.core)]
        if not inside:
            continue
        region = _around([boxes[number] for number in inside])
        numbers = np.zeros(int(labels[region.rows, region.columns].max()) + 1, np.int32)
        numbers[inside] = np.arange(1, len(inside) + 1)
        yield region, numbers[labels[region.rows, region.columns]], inside


def _starts_in(box: tuple[slice, slice], core: Region) -> bool:
    row, column = box[0].start, box[1].start
    return bool(core.rows.start <= row < core.rows.stop and core.columns.start <= column < core.columns.stop)


def _around(boxes: Sequence[tuple[slice, slice]]) -> Region:
    rows, columns = ([box[axis] for box in boxes] for axis in (0, 1))
    return Region(*(slice(min(p.start for p in parts), max(p.stop for p in parts)) for parts in (rows, columns)))


def filled_shape(shape: NucleusShape, size: tuple[int, int]) -> tuple[Region, NDArray[np.bool_]]:
    """Return the region that a nucleus covers, and its pixels there, h x w.

    Args:
        shape: The nucleus.
        size: Height and width of the image, px.

    Raises:
        ImageError: A corner is outside the image, or no number.
        UsageError: The nucleus has no pixel, or a ring is no list of points.
    """
    polygons = shape.polygons
    left, top, right, bottom = polygons.box()
    if not (left >= -1 and top >= -1 and right <= size[1] + 1 and bottom <= size[0] + 1):
        raise UsageError(f"Expected nucleus {shape.label} within {size[1]} x {size[0]} px. Draw it again.")
    region = Region(
        slice(max(0, int(top)), min(size[0], int(bottom) + 1)), slice(max(0, int(left)), min(size[1], int(right) + 1))
    )
    if region.shape[0] * region.shape[1] > _LARGEST_BOX:
        raise UsageError(f"Expected nucleus {shape.label} to be smaller than {_LARGEST_BOX:,} px. Draw it smaller.")
    moved = Polygons(polygons.name, (tuple(r - (region.columns.start, region.rows.start) for r in polygons.parts[0]),))
    pixels = labels_from_shapes([moved], region.shape, polygons.name).labels > 0
    if not pixels.any():
        raise UsageError(f"Expected pixels in nucleus {shape.label}; found none. Draw it again.")
    return region, pixels


def changed_labels(
    labels: NDArray[np.int32], changes: Changes, folder: Path
) -> tuple[AssembledLabels, list[NucleusShape]]:
    """Return the labels of a layer with changes, and the nuclei of `changes.shapes` with the pixels that they got.

    Pixels of other nuclei stay theirs, and of two that were drawn over each other the first has the pixels of both.

    Args:
        labels: H x W, 0 background.
        changes: The changes.
        folder: Folder for a temporary file, if the image is large.

    Raises:
        UsageError: A nucleus that is removed does not exist, or one that was drawn has no pixel of its own, or a number
            far above all others.
    """
    size = (labels.shape[0], labels.shape[1])
    _check_numbers(labels, changes)
    with assembled_labels(size, folder) as result:
        result.labels[:] = labels
    _clear(result.labels, changes)
    painted = [_painted(result.labels, shape, size) for shape in changes.shapes]
    result.count = int(result.labels.max(initial=0))
    result.pixels = int(np.count_nonzero(result.labels))
    return result, painted


def _check_numbers(labels: NDArray[np.int32], changes: Changes) -> None:
    """Raise `UsageError` if a new number is far above all others: what looks for nuclei needs memory for each below."""
    most = int(labels.max(initial=0)) + _MOST_CHANGES
    largest = max((shape.label for shape in changes.shapes), default=0)
    if largest > most:
        raise UsageError(f"Expected numbers of nuclei up to {most:,}; found {largest:,}. Draw the nucleus again.")


def _clear(labels: NDArray[np.int32], changes: Changes) -> None:
    """Remove the nuclei that are gone or have another shape. Raises `UsageError` for one that does not exist."""
    boxes = dict(enumerate(ndimage.find_objects(labels), 1))
    for label in changes.labels:
        box = boxes.get(label)
        if box is not None:
            part = labels[box]
            part[part == label] = 0
        elif label in changes.removed:
            raise UsageError(f"Expected nucleus {label} in the image; it has none. Open the image again.")


def _painted(labels: NDArray[np.int32], shape: NucleusShape, size: tuple[int, int]) -> NucleusShape:
    """Give a nucleus its free pixels; return it, with another outline if some were not free."""
    region, pixels = filled_shape(shape, size)
    here = labels[region.rows, region.columns]
    own = pixels & (here == 0)
    if not own.any():
        raise UsageError(f"Expected pixels of its own in nucleus {shape.label}; others cover it. Remove it.")
    here[own] = shape.label
    if (own == pixels).all():
        return shape
    (outline,) = outlines_of(own.astype(np.int32), top=region.rows.start, left=region.columns.start)
    return NucleusShape(label=shape.label, rings=tuple(tuple(ring.ravel().tolist()) for ring in outline.rings))


def simplified(shape: NucleusShape, size: tuple[int, int]) -> list[list[float]]:
    """Return the rings of a nucleus with fewer corners, around the same pixels; `size` is that of the image."""
    region, pixels = filled_shape(shape, size)
    (outline,) = outlines_of(pixels.astype(np.int32), top=region.rows.start, left=region.columns.start)
    return [ring.ravel().tolist() for ring in outline.rings]


def new_layer(folder: Path, frame: Frame, labels: NDArray[np.int32], parts: Iterable[MeasuredPart]) -> Layer:
    """Write the nuclei of an image as a layer. Raises `OutputError`."""
    writer = LayerWriter()
    for part in parts:
        writer.add(part)
    if labels.shape != frame.shape:
        raise UsageError(f"Expected labels of {frame.shape} px for {frame.image}; found {labels.shape}.")
    return writer.write(folder, labels)
