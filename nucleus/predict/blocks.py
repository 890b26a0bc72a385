"""Blocks of large images, and the labels of a whole image assembled from them.

Each nucleus belongs to the block that contains its centroid. A block is labelled with a margin around it, so that its
nuclei are complete. Overlapping blocks have the same network values in the pixels that they share, so they find the
same nuclei there.
"""

import io
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from nucleus.data.pixel_files import temporary_pages
from nucleus.model.instances import kept_labels
from nucleus.model.tiling import Region
from nucleus.storage.files import atomic_path, write_atomic
from nucleus.surroundings import free_pages

__all__ = [
    "AssembledLabels",
    "Block",
    "LabelledBlock",
    "assembled_labels",
    "cuts_nuclei",
    "nuclei_of_block",
    "plan_blocks",
]

_IN_MEMORY_BYTES = 256 << 20
_TILE = 512


@dataclass(frozen=True)
class Block:
    """A part of an image.

    Attributes:
        core: The pixels whose nuclei belong to this block.
        seen: The core with its margin.
        margin: Width of the margin, px; smaller at the edges of the image.
    """

    core: Region
    seen: Region
    margin: int

    def of_core(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the values of the core, from those of the pixels that are seen, h x w."""
        rows, columns = (
            slice(core.start - seen.start, core.stop - seen.start)
            for core, seen in ((self.core.rows, self.seen.rows), (self.core.columns, self.seen.columns))
        )
        return values[rows, columns]

    def widened(self, shape: tuple[int, int]) -> "Block":
        """Return the block with twice the margin, in an image of `shape` (height, width)."""
        margin = 2 * self.margin
        return Block(self.core, self.core.widened(margin, shape), margin)


@dataclass(frozen=True)
class LabelledBlock:
    """The nuclei of one block of an image.

    Attributes:
        region: Part of the image that `labels` and `channels` cover.
        labels: h x w, int32: 0 for background and nuclei of other blocks, 1..k for the nuclei of the block.
        channels: h x w x C, all channels, in the depth of the file.
        mask: h x w, float32, 0 to 1: probability that a pixel is in a nucleus.
        likely: Number of pixels of the block, without its margin, that the network takes for nuclei.
    """

    region: Region
    labels: NDArray[np.int32]
    channels: NDArray[Any]
    mask: NDArray[np.float32]
    likely: int


def plan_blocks(shape: tuple[int, int], side: int, margin: int) -> list[Block]:
    """Return blocks of `side` px with margins of `margin` px that cover an image (height, width), row by row."""
    rows, columns = (_parts(length, side) for length in shape)
    cores = [Region(row, column) for row in rows for column in columns]
    return [Block(core, core.widened(margin, shape), margin) for core in cores]


def nuclei_of_block(labels: NDArray[np.int32], block: Block) -> NDArray[np.int32]:
    """Return the labels (h x w, of `block.seen`) whose centroid is in `block.core`, numbered 1..k."""
    if block.core == block.seen or not labels.any():
        return labels
    flat = labels.ravel()
    height, width = labels.shape
    areas = np.maximum(np.bincount(flat), 1)
    y = np.bincount(flat, np.repeat(np.arange(height), width)) / areas + block.seen.rows.start
    x = np.bincount(flat, np.tile(np.arange(width), height)) / areas + block.seen.columns.start
    ours = _within(y, block.core.rows) & _within(x, block.core.columns)
    return kept_labels(labels, ours)


def cuts_nuclei(labels: NDArray[np.int32], block: Block, shape: tuple[int, int]) -> bool:
    """Return whether a nucleus of the block (`labels` of `nuclei_of_block`) may extend beyond `block.seen`."""
    rows, columns = block.seen.rows, block.seen.columns
    return bool(
        (rows.start > 0 and labels[0].any())
        or (rows.stop < shape[0] and labels[-1].any())
        or (columns.start > 0 and labels[:, 0].any())
        or (columns.stop < shape[1] and labels[:, -1].any())
    )


def _parts(length: int, side: int) -> list[slice]:
    """Divide an axis evenly into parts of at most `side` px."""
    ends = np.linspace(0, length, max(1, -(-length // side)) + 1).round().astype(int).tolist()
    return [slice(first, last) for first, last in pairwise(ends)]


def _within(values: NDArray[np.float64], part: slice) -> NDArray[np.bool_]:
    """Return which centroids lie in a part of an axis: pixel i reaches from i - 0.5 to i + 0.5."""
    return np.asarray((values >= part.start - 0.5) & (values < part.stop - 0.5))


class AssembledLabels:
    """The labels of a whole image, assembled block by block.

    Attributes:
        labels: H x W, int32: 0 background, 1..K nuclei.
        count: Number of nuclei, K.
        pixels: Number of pixels in nuclei.
        likely: Number of pixels that the network takes for nuclei, also of those that are too small or too uncertain.
    """

    def __init__(self, labels: NDArray[np.int32], backing: mmap.mmap | None = None) -> None:
        self.labels = labels
        self.count = 0
        self.pixels = 0
        self.likely = 0
        self._backing = backing

    def add(self, labels: NDArray[np.int32], region: Region) -> tuple[NDArray[np.int32], int]:
        """Add the labels of a region, numbered from `count` + 1; pixels that already have a label keep it.

        Returns:
            The added labels, h x w, numbered 1..k, and the offset between them and the labels of the image.
        """
        before = self.count
        here = self.labels[region.rows, region.columns]
        free = np.where(here == 0, labels, 0)
        added = kept_labels(free, np.bincount(free.ravel(), minlength=1) > 0)
        np.add(here, added + before, out=here, where=added > 0)
        self.count += int(added.max(initial=0))
        self.pixels += int(np.count_nonzero(added))
        self.release()
        return added, before

    @property
    def left_out(self) -> float:
        """Part of what the network takes for nuclei that is in no nucleus, 0 to 1."""
        return max(0.0, 1 - self.pixels / self.likely) if self.likely else 0.0

    def release(self) -> None:
        """Free the memory of labels in a temporary file; no effect on labels in memory."""
        if self._backing is not None:
            free_pages(self._backing)

    @property
    def kind(self) -> type[np.unsignedinteger]:
        """Type of the labels in files: 16 bits, or 32 bits if there are more than 65,535 nuclei."""
        return np.uint16 if self.count <= np.iinfo(np.uint16).max else np.uint32

    def encoded(self) -> bytes | None:
        """Return a TIFF; None if the labels are in a temporary file, for which only `write` has the memory."""
        if self._backing is not None:
            return None
        file = io.BytesIO()
        tifffile.imwrite(file, self.labels.astype(self.kind), compression="zlib")
        return file.getvalue()

    def write(self, path: Path) -> None:
        """Write a TIFF; tiled if the image is large."""
        kind, whole = self.kind, self.encoded()
        if whole is not None:
            write_atomic(path, whole)
            return
        with atomic_path(path) as beside:
            tifffile.imwrite(
                beside,
                self._tiles(kind),
                shape=self.labels.shape,
                dtype=kind,
                tile=(_TILE, _TILE),
                compression="zlib",
                bigtiff=self.labels.nbytes >= 1 << 31,
            )

    def _tiles(self, kind: type[np.unsignedinteger]) -> Iterator[NDArray[np.unsignedinteger]]:
        height, width = self.labels.shape
        for top in range(0, height, _TILE):
            for left in range(0, width, _TILE):
                tile = np.zeros((_TILE, _TILE), kind)
                part = self.labels[top : top + _TILE, left : left + _TILE]
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile
            self.release()


@contextmanager
def assembled_labels(shape: tuple[int, int], folder: Path) -> Iterator[AssembledLabels]:
    """Provide empty labels: in memory, or in a temporary file in `folder` if they are large."""
    size = 4 * shape[0] * shape[1]
    if size <= _IN_MEMORY_BYTES:
        yield AssembledLabels(np.zeros(shape, np.int32))
        return
    backing = temporary_pages(size, ".nucleus-labels-", folder)
    yield AssembledLabels(np.frombuffer(backing, np.int32).reshape(shape), backing)
