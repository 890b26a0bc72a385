"""Large images in blocks: each nucleus is labelled in the one block that its centroid lies in.

A block is labelled together with a margin around it, so that the nuclei whose centroid is in the block are seen whole.
Neighbouring blocks see the same values in the pixels that they share, so they agree on the nuclei there.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nucleus.model.instances import kept_labels
from nucleus.model.tiling import Region

__all__ = ["Block", "cuts_nuclei", "nuclei_of_block", "plan_blocks"]


@dataclass(frozen=True)
class Block:
    """A part of an image.

    Attributes:
        core: The pixels whose nuclei are this block's.
        seen: The core with its margin.
        margin: Of the core, px; less at the edges of the image.
    """

    core: Region
    seen: Region
    margin: int

    def widened(self, shape: tuple[int, int]) -> "Block":
        """The same with twice the margin, in an image (height, width)."""
        return _block(self.core, 2 * self.margin, shape)


def plan_blocks(shape: tuple[int, int], side: int, margin: int) -> list[Block]:
    """Blocks of `side` px with margins of `margin` px that cover an image (height, width), row by row."""
    rows, columns = (_parts(length, side) for length in shape)
    return [_block(Region(row, column), margin, shape) for row in rows for column in columns]


def nuclei_of_block(labels: NDArray[np.int32], block: Block) -> NDArray[np.int32]:
    """The labels of `block.seen` (h x w) whose centroid is in `block.core`, numbered 1..K."""
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
    """Whether a nucleus of the block (`labels` of `nuclei_of_block`) may go on beyond what is seen of the image."""
    rows, columns = block.seen.rows, block.seen.columns
    return bool(
        (rows.start > 0 and labels[0].any())
        or (rows.stop < shape[0] and labels[-1].any())
        or (columns.start > 0 and labels[:, 0].any())
        or (columns.stop < shape[1] and labels[:, -1].any())
    )


def _block(core: Region, margin: int, shape: tuple[int, int]) -> Block:
    """A block with as much of its margin as the image has."""
    rows, columns = (
        slice(max(0, part.start - margin), min(length, part.stop + margin))
        for part, length in zip((core.rows, core.columns), shape, strict=True)
    )
    return Block(core, Region(rows, columns), margin)


def _parts(length: int, side: int) -> list[slice]:
    """Even parts of an axis of at most `side` px."""
    ends = np.linspace(0, length, max(1, -(-length // side)) + 1).round().astype(int).tolist()
    return [slice(first, last) for first, last in pairwise(ends)]


def _within(values: NDArray[np.float64], part: slice) -> NDArray[np.bool_]:
    """Which centroids lie in a part of an axis: pixel i reaches from i - 0.5 to i + 0.5."""
    return np.asarray((values >= part.start - 0.5) & (values < part.stop - 0.5))
