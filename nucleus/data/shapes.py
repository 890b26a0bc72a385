"""Labels from the shapes of annotation files: polygons, ellipses and runs of pixels, filled by one rule.

Coordinates are in pixels, x to the right and y down; the first pixel reaches from 0 to 1 in both. A pixel is in a shape
if its centre is. A centre that lies exactly on an edge is inside on the right and on the upper edge of a shape, as in
ImageJ.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import LabelImage
from nucleus.data.masks import MaskLabels, check_labels, is_divided
from nucleus.errors import ImageError
from nucleus.text import plural

__all__ = ["Ellipse", "Polygons", "Ring", "Runs", "Shape", "labels_from_shapes"]

Ring = NDArray[np.float64]
"""K x 2 vertices, (x, y); the last one is joined to the first."""

_BEYOND = 1.0
"""Outlines that reach further than this out of their image, px, are of another image or scale."""
_TO_THE_RIGHT = 1e-8
"""Edges are shifted by this, px, so that rounding does not decide about centres that lie on them."""
_CROSSINGS = 1 << 22
"""Crossings of edges with rows of pixels that are computed at once."""
_WORK, _LEAST_WORK = 32, 1 << 24
"""Pixels that all boxes of shapes and their crossings may have together: so many times those of the image, or this."""
_MUCH_LOST = 0.25
"""Fraction of its area that a nucleus may lose to smaller ones without a remark."""
_CONTAINED = 0.9
_MANY = 2
"""A shape that has at least `_MANY` others inside, each to `_CONTAINED` of its area, is a region."""
_FEW = 10
_UPPER_LEFT = 0.5
"""`_FEW` or more nuclei, all of them in this fraction of the width and of the height, may be of a smaller image."""


@dataclass(frozen=True)
class _Patch:
    """Pixels of a shape within its image: `mask` is h x w, bool, at `top` and `left`."""

    top: int
    left: int
    mask: NDArray[np.bool_]


@dataclass
class _Work:
    """What is left of the work that an image is worth; a hostile file asks for more."""

    left: int
    name: str

    def spend(self, pixels: int) -> None:
        self.left -= pixels
        if self.left < 0:
            raise ImageError(
                f"Expected outlines of nuclei in {self.name}; the boxes around them, and their edges, have more than "
                f"{_WORK} times the pixels of the image. Remove the shapes that are no nuclei."
            )


@dataclass(frozen=True)
class Shape(ABC):
    """A shape of an annotation file.

    Attributes:
        name: The shape in messages, with the name of its file.
    """

    name: str

    @abstractmethod
    def box(self) -> tuple[float, float, float, float]:
        """Return the smallest and largest x and y: left, top, right, bottom."""

    @abstractmethod
    def fill(self, left: int, top: int, mask: NDArray[np.bool_], work: "_Work") -> None:
        """Set the pixels of the shape in a mask, whose first pixel is at `left` and `top`."""


@dataclass(frozen=True)
class Polygons(Shape):
    """One or more polygons with holes; the shape is all of them together.

    Attributes:
        parts: Rings of each polygon. A pixel is in a polygon if its centre is in an odd number of its rings.
    """

    parts: tuple[tuple[Ring, ...], ...]

    def box(self) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom. Raises `ImageError` if there are no points, or one is not finite."""
        rings = [ring for part in self.parts for ring in part]
        points = np.concatenate(rings) if rings else np.zeros((0, 2))
        if not len(points) or not np.isfinite(points).all():
            raise ImageError(
                f"Expected finite coordinates in {self.name}; found {'NaN or infinity' if len(points) else 'none'}. "
                "Export the outlines again."
            )
        left, top = points.min(axis=0).tolist()
        right, bottom = points.max(axis=0).tolist()
        return left, top, right, bottom

    def fill(self, left: int, top: int, mask: NDArray[np.bool_], work: _Work) -> None:
        """Fill each polygon by the crossings of its edges with the centres of the rows."""
        for rings in self.parts:
            toggles = np.zeros((mask.shape[0], mask.shape[1] + 1), np.uint8)
            for ring in rings:
                _toggle(toggles, ring - (left, top), work)
            mask |= np.bitwise_xor.accumulate(toggles, axis=1)[:, :-1].astype(np.bool_)


@dataclass(frozen=True)
class Ellipse(Shape):
    """An upright ellipse.

    Attributes:
        left: Left edge of its box.
        top: Upper edge.
        width: Width, px.
        height: Height, px.
    """

    left: float
    top: float
    width: float
    height: float

    def box(self) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom. Raises `ImageError` if they are not finite."""
        found = (self.left, self.top, self.left + self.width, self.top + self.height)
        if not np.isfinite(found).all():
            raise ImageError(f"Expected finite coordinates in {self.name}; found {found}. Save the outlines again.")
        return found

    def fill(self, left: int, top: int, mask: NDArray[np.bool_], work: _Work) -> None:  # noqa: ARG002
        """Set the pixels whose centres are in the ellipse or on it."""
        if self.width <= 0 or self.height <= 0:
            return
        y, x = np.ogrid[top : top + mask.shape[0], left : left + mask.shape[1]]
        across = (x + 0.5 - self.left - self.width / 2) / (self.width / 2)
        along = (y + 0.5 - self.top - self.height / 2) / (self.height / 2)
        mask |= across**2 + along**2 <= 1


@dataclass(frozen=True)
class Runs(Shape):
    """Runs of pixels, column by column from the top left (the RLE of COCO).

    Attributes:
        starts: First pixel of each run, counted down the columns.
        ends: Pixel after the last one of each run; no run is empty.
        height: Height of the image, px.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    height: int

    def box(self) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom; four zeros without runs."""
        if not len(self.starts):
            return 0.0, 0.0, 0.0, 0.0
        columns, rows = self.starts // self.height, self.starts % self.height
        last_columns, last_rows = (self.ends - 1) // self.height, (self.ends - 1) % self.height
        over = bool((columns != last_columns).any())
        top, bottom = (0, self.height) if over else (int(rows.min()), int(last_rows.max()) + 1)
        return float(columns.min()), float(top), float(last_columns.max() + 1), float(bottom)

    def fill(self, left: int, top: int, mask: NDArray[np.bool_], work: _Work) -> None:
        """Set the pixels of all runs."""
        work.spend(int((self.ends - self.starts).sum()))
        rows, columns = self.pixels()
        mask[rows - top, columns - left] = True

    def pixels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows and the columns of all pixels."""
        lengths = self.ends - self.starts
        pixels = np.arange(lengths.sum()) + np.repeat(self.starts - (np.cumsum(lengths) - lengths), lengths)
        return pixels % self.height, pixels // self.height


def _toggle(toggles: NDArray[np.uint8], ring: Ring, work: _Work) -> None:
    """Flip the first pixel to the right of each crossing of a ring with the centre line of a row."""
    rows, width = toggles.shape
    ends = np.roll(ring, -1, axis=0)
    down = ring[:, 1] <= ends[:, 1]
    (x0, y0), (x1, y1) = np.where(down[:, None], ring, ends).T, np.where(down[:, None], ends, ring).T
    first, last = (np.clip(np.ceil(y - 0.5), 0, rows).astype(np.int64) for y in (y0, y1))
    crossing = np.flatnonzero(last > first)
    counts = (last - first)[crossing]
    work.spend(int(counts.sum()))
    slope = (x1 - x0)[crossing] / (y1 - y0)[crossing]
    for part in _portions(counts):
        number = counts[part]
        row = np.arange(number.sum()) + np.repeat(first[crossing[part]] - (np.cumsum(number) - number), number)
        edge = np.repeat(crossing[part], number)
        x = x0[edge] + (row + 0.5 - y0[edge]) * np.repeat(slope[part], number)
        column = np.clip(np.floor(x + 0.5 + _TO_THE_RIGHT), 0, width - 1).astype(np.int64)
        np.bitwise_xor.at(toggles, (row, column), 1)


def _portions(counts: NDArray[np.int64]) -> list[slice]:
    """Divide edges into portions with at most about `_CROSSINGS` crossings each."""
    if not len(counts):
        return []
    portion = np.cumsum(counts) // _CROSSINGS
    bounds = [0, *(np.flatnonzero(np.diff(portion)) + 1).tolist(), len(counts)]
    return [slice(begin, end) for begin, end in pairwise(bounds)]


@dataclass
class _Drawn:
    """Shapes of an image as packed masks, in the order of the file."""

    shapes: list[Shape] = field(default_factory=list)
    places: list[tuple[slice, slice]] = field(default_factory=list)
    packed: list[NDArray[np.uint8]] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)
    divided: int = 0

    def add(self, shape: Shape, patch: _Patch, area: int) -> None:
        height, width = patch.mask.shape
        self.shapes.append(shape)
        self.places.append((slice(patch.top, patch.top + height), slice(patch.left, patch.left + width)))
        self.packed.append(np.packbits(patch.mask))
        self.areas.append(area)
        self.divided += is_divided(patch.mask)

    def mask(self, number: int) -> NDArray[np.bool_]:
        rows, columns = self.places[number]
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return np.unpackbits(self.packed[number], count=shape[0] * shape[1]).reshape(shape).astype(np.bool_)


def labels_from_shapes(shapes: Sequence[Shape], shape: tuple[int, int], name: str) -> MaskLabels:
    """Fill the shapes of an image as labels 1..K, in their order.

    A pixel of several shapes belongs to the one with the smallest area; of equal ones, to the first. Shapes without any
    pixel, or whose pixels are all those of smaller ones, are no nuclei: a remark names them.

    Args:
        shapes: The shapes.
        shape: Height and width of the image, px.
        name: Name of the annotation file in messages.

    Raises:
        ImageError: A shape reaches out of the image, has coordinates that are not finite, or is a region with several
            others inside; no shape has a pixel; or there are more nuclei than labels.
    """
    remarks: dict[str, list[str]] = defaultdict(list)
    drawn = _drawn(shapes, shape, name, remarks)
    painted = np.zeros(shape, np.int32)
    for number in sorted(range(len(drawn.areas)), key=lambda number: (-drawn.areas[number], -number)):
        inside, mask = painted[drawn.places[number]], drawn.mask(number)
        inside[mask] = number + 1
    kept = np.bincount(painted.ravel(), minlength=len(drawn.areas) + 1)[1:]
    _check_regions(drawn, painted, kept)
    _remark_losses(drawn, kept, remarks)
    labels = _renumbered(painted, kept)
    check_labels(labels, name)
    if _may_be_smaller(labels):
        remarks[_SMALLER].append(name)
    found = tuple((text, tuple(of)) for text, of in remarks.items())
    return MaskLabels(labels.astype(np.uint16), divided=drawn.divided, remarks=found)


_SMALLER = (
    "All nuclei lie in the upper left quarter of their image: check that the outlines are in pixels of this image, at "
    "full resolution"
)
_NO_PIXEL = "Outlines without the centre of any pixel, which are no nuclei"
_HIDDEN = "Outlines whose pixels all belong to others, which are no nuclei"
_LOSERS = f"Nuclei that lose more than {_MUCH_LOST:.0%} of their area to smaller ones, where they overlap"


def _drawn(shapes: Sequence[Shape], size: tuple[int, int], name: str, remarks: dict[str, list[str]]) -> _Drawn:
    work = _Work(max(_LEAST_WORK, _WORK * size[0] * size[1]), name)
    drawn = _Drawn()
    for shape in shapes:
        patch = _patch(shape, size, work)
        area = int(np.count_nonzero(patch.mask))
        if area:
            drawn.add(shape, patch, area)
        else:
            remarks[_NO_PIXEL].append(shape.name)
    if shapes and not drawn.areas:
        raise ImageError(
            f"Expected outlines in pixels in {name}; none of its {plural(len(shapes), 'outline')} contains the centre "
            "of a pixel. Export them in pixels of the image, not as fractions or micrometres."
        )
    return drawn


def _patch(shape: Shape, size: tuple[int, int], work: _Work) -> _Patch:
    height, width = size
    left, top, right, bottom = shape.box()
    if min(left, top) < -_BEYOND or right > width + _BEYOND or bottom > height + _BEYOND:
        raise ImageError(
            f"Expected outlines within their image, {width} x {height} px (width x height); {shape.name} reaches from "
            f"{left:.6g}, {top:.6g} to {right:.6g}, {bottom:.6g} (x, y). If it is of another image or of another "
            "resolution, export it from this image in pixels; if it was drawn over the edge, cut it there."
        )
    rows = slice(min(max(0, int(np.floor(top))), height), min(height, int(np.ceil(bottom))))
    columns = slice(min(max(0, int(np.floor(left))), width), min(width, int(np.ceil(right))))
    mask = np.zeros((max(0, rows.stop - rows.start), max(0, columns.stop - columns.start)), np.bool_)
    work.spend(mask.size)
    if mask.size:
        shape.fill(columns.start, rows.start, mask, work)
    return _Patch(rows.start, columns.start, mask)


def _check_regions(drawn: _Drawn, painted: NDArray[np.int32], kept: NDArray[np.intp]) -> None:
    """Raise `ImageError` if a shape that loses pixels has several others inside, as a region of tissue does."""
    for number, shape in enumerate(drawn.shapes):
        if kept[number] == drawn.areas[number]:
            continue
        numbers, pixels = np.unique(painted[drawn.places[number]][drawn.mask(number)], return_counts=True)
        inside = zip((numbers - 1).tolist(), pixels.tolist(), strict=True)
        held = [other for other, area in inside if other != number and area >= _CONTAINED * drawn.areas[other]]
        if len(held) >= _MANY:
            raise ImageError(
                f"Expected outlines of nuclei; {shape.name} has {len(held)} others inside, as a region of tissue has. "
                "Remove it from the file, or export only the nuclei."
            )


def _remark_losses(drawn: _Drawn, kept: NDArray[np.intp], remarks: dict[str, list[str]]) -> None:
    for shape, area, left in zip(drawn.shapes, drawn.areas, kept.tolist(), strict=True):
        if not left:
            remarks[_HIDDEN].append(shape.name)
        elif area - left > _MUCH_LOST * area:
            remarks[_LOSERS].append(shape.name)


def _renumbered(painted: NDArray[np.int32], kept: NDArray[np.intp]) -> NDArray[np.int32]:
    """Return labels 1..K without gaps, in the same order."""
    numbers = np.zeros(len(kept) + 1, np.int32)
    numbers[1:] = np.where(kept > 0, np.cumsum(kept > 0), 0)
    return numbers[painted]


def _may_be_smaller(labels: NDArray[np.int32] | LabelImage) -> bool:
    if labels.max(initial=0) < _FEW:
        return False
    bottom, right = (int(np.flatnonzero((labels > 0).any(axis=axis))[-1]) + 1 for axis in (1, 0))
    height, width = labels.shape
    return bool(bottom <= _UPPER_LEFT * height and right <= _UPPER_LEFT * width)
