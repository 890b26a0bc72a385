"""Cells around nuclei: labels that grow by a distance into the background, for images of any size.

A nucleus keeps its pixels, and its cell has its number. A pixel of the background belongs to the nearest nucleus, so
cells never overlap; they are a stand-in where the cytoplasm is not stained, and not a segmentation of cells.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nucleus.errors import ImageError, UsageError
from nucleus.lazy import skimage
from nucleus.model.tiling import Region
from nucleus.predict.blocks import AssembledLabels, LabelledBlock
from nucleus.predict.measurement import CellPart, Frame, MeasuredPart, measure_blocks

__all__ = ["Expansion", "expand_labels", "expanded_parts", "parse_expansion"]

_LARGEST = 500
"""Pixels; a tile is read with a margin of this width."""
_TILE = 1024
_DISTANCE = re.compile(r"(\d+\.?\d*|\.\d+) ?(px|um|µm|μm)?")


@dataclass(frozen=True)
class Expansion:
    """How far cells reach beyond their nuclei.

    Attributes:
        distance: Distance, above 0.
        unit: Its unit: pixels of the image, or micrometres.
    """

    distance: float
    unit: Literal["px", "um"] = "px"

    def __str__(self) -> str:
        return f"{self.distance:g}{self.unit}"

    def pixels(self, image: Frame) -> float:
        """Return the distance in pixels of an image.

        Raises:
            ImageError: It is in micrometres, and the image does not know the size of its pixels; or it is too large.
        """
        if self.unit == "um" and image.pixel_size is None:
            raise ImageError(
                f"Expected a known pixel size in {image.image} for --expand {self}; found none. Add --pixel-size UM, "
                "or give the distance in pixels, such as --expand 10px."
            )
        found = self.distance if self.unit == "px" else self.distance / (image.pixel_size or 1.0)
        if found > _LARGEST:
            raise ImageError(
                f"Expected --expand to be at most {_LARGEST} px in {image.image}; {self} are {found:.0f} px. Give a "
                "smaller distance, or correct the pixel size by --pixel-size."
            )
        return found


def parse_expansion(text: str) -> Expansion:
    """Return the distance that a text says: `5um`, `8px`, or `8`, which are pixels.

    Raises:
        UsageError: It says something else, or 0.

    Examples:
        >>> parse_expansion("2.5um"), parse_expansion("8")
        (Expansion(distance=2.5, unit='um'), Expansion(distance=8.0, unit='px'))
    """
    found = _DISTANCE.fullmatch(text.strip())
    distance = float(found[1]) if found else 0.0
    if found is None or not 0 < distance <= 1e6:
        raise UsageError(f"Expected a distance above 0 for --expand, such as 5um or 8px; found {text!r}.")
    return Expansion(distance, "px" if found[2] in {None, "px"} else "um")


def expand_labels(labels: NDArray[np.int32], distance: float) -> NDArray[np.int32]:
    """Return labels that have grown into the background, as those of `skimage.segmentation.expand_labels`.

    Args:
        labels: H x W, 0 background.
        distance: Largest distance from a pixel to the next of its label, px, by the centres of the pixels.

    Returns:
        H x W, int32.
    """
    grown = np.zeros(labels.shape, np.int32)
    for part, pixels in _grown(labels, distance):
        grown[part.rows, part.columns] = pixels
    return grown


def _grown(labels: NDArray[np.int32], distance: float) -> Iterator[tuple[Region, NDArray[np.int32]]]:
    """Yield the grown labels tile by tile, but for tiles without any; each is what the whole image would give."""
    height, width = labels.shape
    margin = ceil(distance)
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            tile = Region(slice(top, min(top + _TILE, height)), slice(left, min(left + _TILE, width)))
            seen = tile.widened(margin, labels.shape)
            found = labels[seen.rows, seen.columns]
            if found.any():
                down, across = top - seen.rows.start, left - seen.columns.start
                whole = skimage.segmentation.expand_labels(found, distance)
                yield tile, whole[down : down + tile.shape[0], across : across + tile.shape[1]]


def expanded_parts(
    image: Frame,
    blocks: Iterable[LabelledBlock],
    labels: AssembledLabels,
    cells: AssembledLabels,
    distance: float,
    folder: Path,
) -> Iterator[MeasuredPart]:
    """Add the blocks of an image to its labels, then fill its cells; then yield the nuclei of each block with cells.

    The rows of the nuclei, which have to wait until the cells are known, lie in a temporary file until then.

    Args:
        image: Frame of the whole image.
        blocks: Nuclei of the image.
        labels: Empty labels of the image, which are filled.
        cells: Empty labels, which are filled with the cells.
        distance: Distance that cells grow beyond their nuclei, px.
        folder: Folder for the temporary file.

    Yields:
        The nuclei of each block that has some: as `measure_blocks` does, and `cell_area`, px, and `cell_area_um2`,
        square micrometres (None if the pixel size is unknown), which include the nucleus.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder) as spooled:
        for part in measure_blocks(image, blocks, labels):
            if part.rows:
                spooled.write(json.dumps([part.frame.top, part.frame.left, *part.labels.shape, part.rows]) + "\n")
        areas = _fill(cells, labels, distance)
        spooled.seek(0)
        yield from (_part(image, line, labels, cells, areas, ceil(distance)) for line in spooled)


def _fill(cells: AssembledLabels, labels: AssembledLabels, distance: float) -> NDArray[np.int64]:
    """Fill the cells of an image; return the area of each label."""
    areas = np.zeros(labels.count + 1, np.int64)
    cells.count = labels.count
    for part, pixels in _grown(labels.labels, distance):
        cells.labels[part.rows, part.columns] = pixels
        inside = pixels[pixels > 0]
        first = int(inside.min(initial=0))
        found = np.bincount(inside - first)
        areas[first : first + len(found)] += found
        cells.pixels += len(inside)
        for each in (labels, cells):
            each.release()
    return areas


def _part(
    image: Frame, line: str, labels: AssembledLabels, cells: AssembledLabels, areas: NDArray[np.int64], margin: int
) -> MeasuredPart:
    """Return the nuclei of a block from the line that was kept of it."""
    top, left, height, width, rows = json.loads(line)
    region = Region(slice(top, top + height), slice(left, left + width))
    reached = region.widened(margin, image.shape)
    for row in rows:
        area = int(areas[row["label"]])
        row["cell_area"] = area
        row["cell_area_um2"] = None if image.pixel_size is None else round(area * image.pixel_size**2, 4)
    own = CellPart(_framed(image, reached), _own(cells, reached, rows))
    part = MeasuredPart(_framed(image, region), _own(labels, region, rows), rows, own)
    for each in (labels, cells):
        each.release()
    return part


def _framed(image: Frame, region: Region) -> Frame:
    return replace(image, top=region.rows.start, left=region.columns.start)


def _own(labels: AssembledLabels, region: Region, rows: list[dict[str, Any]]) -> NDArray[np.int32]:
    """Return the labels of some rows in a region, numbered from 1; the others are background."""
    first = rows[0]["label"] - 1
    found = labels.labels[region.rows, region.columns] - first
    return np.where((found > 0) & (found <= len(rows)), found, 0)
