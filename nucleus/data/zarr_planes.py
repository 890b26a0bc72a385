"""Planes of Zarr arrays of up to five axes, read by blocks of whole chunks."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nucleus.data.pixel_files import naming_damage
from nucleus.errors import ImageError

if TYPE_CHECKING:
    import zarr

__all__ = ["Axes", "PlaneReader"]

_KINDS = {"space", "time", "channel"}
_BLOCK_SIDE = 1024
"""Pixels; chunks that are smaller are read together."""
_KEPT_BYTES = 512 << 20
"""Decoded blocks that are kept, because the next part needs some."""
_AT_ONCE_BYTES = 256 << 20
_AT_ONCE = 8


@dataclass(frozen=True)
class Axes:
    """The axes of an array, and which of them is which.

    Attributes:
        names: Names, in the order of the array.
        units: Units, in the same order; None for those without.
        y: Number of the axis of the rows.
        x: Number of the axis of the columns.
        z: Number of the axis of depths, or None.
        time: Number of the axis of times, or None.
        channel: Number of the axis of channels, or None.
    """

    names: tuple[str, ...]
    units: tuple[str | None, ...]
    y: int
    x: int
    z: int | None
    time: int | None
    channel: int | None

    @classmethod
    def of(cls, axes: Sequence[Mapping[str, Any]], name: str) -> "Axes":
        """Return the axes of OME-Zarr's metadata. Raises `ImageError` for axes that are not read."""
        names = [str(axis["name"]) for axis in axes]
        kinds = [axis.get("type") for axis in axes]
        other = next((each for each, kind in zip(names, kinds, strict=True) if kind not in _KINDS), None)
        if other is not None or "y" not in names or "x" not in names:
            raise ImageError(
                f"Expected the axes y and x in {name}, and at most t, c and z; found {', '.join(names)}. Save the "
                "image with these axes."
            )
        space = [at for at, kind in enumerate(kinds) if kind == "space" and names[at] not in {"y", "x"}]
        return cls(
            tuple(names),
            tuple(axis.get("unit") for axis in axes),
            names.index("y"),
            names.index("x"),
            space[0] if space else None,
            kinds.index("time") if "time" in kinds else None,
            kinds.index("channel") if "channel" in kinds else None,
        )

    @staticmethod
    def size(shape: Sequence[int], axis: int | None) -> int:
        """Return the length of an axis; 1 for one that is not there."""
        return 1 if axis is None else int(shape[axis])

    def selection(self, time: int, depth: int, rows: slice, columns: slice) -> tuple[int | slice, ...]:
        """Return the index of a part of a plane, with all its channels."""
        found: list[int | slice] = [slice(None)] * len(self.names)
        for axis, wanted in ((self.y, rows), (self.x, columns), (self.time, time), (self.z, depth)):
            if axis is not None:
                found[axis] = wanted
        return tuple(found)

    def channels_last(self, part: NDArray[Any]) -> NDArray[Any]:
        """Return a selected part as h x w x C."""
        left = [axis for axis in (self.y, self.x, self.channel) if axis is not None]
        order = [sorted(left).index(axis) for axis in left]
        moved = part.transpose(order)
        return moved if self.channel is not None else moved[..., np.newaxis]


class PlaneReader:
    """Reads parts of one plane by blocks of whole chunks, several at once; the newest blocks are kept.

    Args:
        array: The array.
        axes: Its axes.
        name: Name of the image in messages.
        time: Number of the time, from 0.
        depth: Number of the depth, from 0.
    """

    def __init__(self, array: "zarr.Array[Any]", axes: Axes, name: str, time: int, depth: int) -> None:
        self._array = array
        self._axes = axes
        self._name = name
        self._plane = time, depth
        height, width = (int(array.shape[axis]) for axis in (axes.y, axes.x))
        self.shape = height, width, axes.size(array.shape, axes.channel)
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        self._side = tuple(_block_side(array.chunks[axis]) for axis in (axes.y, axes.x))
        self._kept: dict[tuple[int, int], NDArray[Any]] = {}
        self._lock = threading.Lock()

    def fill(self, out: NDArray[Any]) -> None:
        """Read the whole plane into an array of its shape and type. Raises the errors of `read`."""
        self._read_into(out, slice(0, self.shape[0]), slice(0, self.shape[1]), keep=False)

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Return a part of the plane, h x w x C.

        Raises:
            ImageError: A chunk is damaged, or must not be read.
            StorageError: The bucket cannot be read.
        """
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start, self.shape[2]), self.dtype)
        self._read_into(out, rows, columns, keep=True)
        return out

    def _read_into(self, out: NDArray[Any], rows: slice, columns: slice, *, keep: bool) -> None:
        def paste(at: tuple[int, int]) -> None:
            block = self._block(at, keep=keep)
            top, left = at[0] * self._side[0], at[1] * self._side[1]
            inside = [
                slice(max(part.start - first, 0), min(part.stop - first, length))
                for part, first, length in zip((rows, columns), (top, left), block.shape, strict=False)
            ]
            to = [
                slice(part.start + first - wanted.start, part.stop + first - wanted.start)
                for part, first, wanted in zip(inside, (top, left), (rows, columns), strict=True)
            ]
            out[to[0], to[1]] = block[inside[0], inside[1]]

        wanted = [(row, column) for row in self._touched(rows, 0) for column in self._touched(columns, 1)]
        with ThreadPoolExecutor(self._at_once()) as pool:
            list(pool.map(paste, wanted))

    def _touched(self, part: slice, axis: int) -> range:
        return range(part.start // self._side[axis], -(-part.stop // self._side[axis]))

    def _at_once(self) -> int:
        """Return how many blocks may be in memory beside those that are kept."""
        chunks = prod(
            -(-min(length, self._side[(self._axes.y, self._axes.x).index(axis)]) // chunk)
            if axis in {self._axes.y, self._axes.x}
            else 1
            for axis, (length, chunk) in enumerate(zip(self._array.shape, self._array.chunks, strict=True))
        )
        size = chunks * prod(self._array.chunks) * self.dtype.itemsize * self.shape[2]
        return max(1, min(_AT_ONCE, _AT_ONCE_BYTES // max(1, size)))

    def _block(self, at: tuple[int, int], *, keep: bool) -> NDArray[Any]:
        with self._lock:
            found = self._kept.pop(at, None)
            if found is not None:
                self._kept[at] = found  # the last is the newest
                return found
        block = self._decoded(at)
        if keep:
            with self._lock:
                self._kept[at] = block
                while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > _KEPT_BYTES:
                    del self._kept[next(iter(self._kept))]
        return block

    def _decoded(self, at: tuple[int, int]) -> NDArray[Any]:
        rows, columns = (
            slice(number * side, min((number + 1) * side, length))
            for number, side, length in zip(at, self._side, self.shape, strict=False)
        )
        with naming_damage(self._name, "OME-Zarr"):
            part = self._array[self._axes.selection(*self._plane, rows, columns)]
            return np.ascontiguousarray(self._axes.channels_last(np.asarray(part)), self.dtype)


def _block_side(chunk: int) -> int:
    """Return the side of a block, a multiple of that of a chunk."""
    return int(chunk) * max(1, _BLOCK_SIDE // int(chunk))
