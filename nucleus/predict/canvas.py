"""The labels of an image of any size while they are made, and as a TIFF file."""

import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from nucleus.model.instances import kept_labels
from nucleus.model.tiling import Region
from nucleus.storage.files import atomic_path

__all__ = ["LabelCanvas", "label_canvas"]

_IN_MEMORY_BYTES = 256 << 20
_TILE = 512


class LabelCanvas:
    """Labels of a whole image, filled block by block.

    Attributes:
        labels: H x W, int32: 0 background, 1..K nuclei.
        count: K.
    """

    def __init__(self, labels: NDArray[np.int32], backing: mmap.mmap | None = None) -> None:
        self.labels = labels
        self.count = 0
        self._backing = backing

    def paste(self, labels: NDArray[np.int32], region: Region) -> tuple[NDArray[np.int32], int]:
        """Add labels of a region, numbered on from those that are there; pixels that have a label keep it.

        Returns:
            What of them was added, h x w, numbered 1..k, and what was added to their numbers on the canvas.
        """
        before = self.count
        here = self.labels[region.rows, region.columns]
        free = np.where(here == 0, labels, 0)
        added = kept_labels(free, np.bincount(free.ravel(), minlength=1) > 0)
        np.add(here, added + before, out=here, where=added > 0)
        self.count += int(added.max(initial=0))
        self.release()
        return added, before

    def release(self) -> None:
        """Let go of the memory, not of the labels."""
        if self._backing is not None:
            self._backing.madvise(mmap.MADV_DONTNEED)

    def write(self, path: Path) -> None:
        """Write a TIFF of 16 bits, or of 32 where there are more than 65,535 nuclei; large images in tiles."""
        kind = np.uint16 if self.count <= np.iinfo(np.uint16).max else np.uint32
        with atomic_path(path) as beside:
            if self._backing is None:
                tifffile.imwrite(beside, self.labels.astype(kind), compression="zlib")
            else:
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
def label_canvas(shape: tuple[int, int], folder: Path) -> Iterator[LabelCanvas]:
    """An empty canvas: in memory, or in a temporary file in `folder` if it is large."""
    size = 4 * shape[0] * shape[1]
    if size <= _IN_MEMORY_BYTES:
        yield LabelCanvas(np.zeros(shape, np.int32))
        return
    with tempfile.TemporaryFile(dir=folder, prefix=".nucleus-labels-") as file:
        file.truncate(size)
        backing = mmap.mmap(file.fileno(), size)
        yield LabelCanvas(np.frombuffer(backing, np.int32).reshape(shape), backing)
