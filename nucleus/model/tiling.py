"""A network applied to images of any size, tile by tile.

All tiles of an image have one shape and lie on a grid that depends on the image's size alone, so a part of the image
gets the same values whether it is computed alone or with the rest. Tiles start at multiples of the encoder's stride, so
that a pixel has the same position relative to the stride as in the untiled image, and are blended over their overlap.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import STRIDE
from nucleus.data.images import RgbImage
from nucleus.model.architecture import ModelConfig
from nucleus.model.engines import Engine

__all__ = ["Axis", "NetworkImage", "Region", "TiledNetwork", "axis_tiles", "reflect_indices"]

_BATCH_PIXELS = 1 << 19
"""Pixels per call of the network: enough to keep the cores busy, in about 0.5 GiB of memory."""
_KEPT_BYTES = 512 << 20

ReadPixels = Callable[[slice, slice], RgbImage]


@dataclass(frozen=True)
class Axis:
    """The tiles along an axis.

    Attributes:
        length: Length of the image, px.
        tile: Length of a tile, px, a multiple of 32.
        starts: First pixel of each tile.
    """

    length: int
    tile: int
    starts: tuple[int, ...]

    def touching(self, part: slice) -> list[int]:
        """Return the starts of the tiles that share pixels with a part of the axis."""
        return [start for start in self.starts if start < part.stop and start + self.tile > part.start]


@dataclass(frozen=True)
class Region:
    """Rows and columns of an image."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width, px."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def widened(self, margin: int, shape: Sequence[int]) -> Region:
        """Return the region with a margin, px, which ends at the edges of an image of this height and width."""
        rows, columns = (
            slice(max(0, part.start - margin), min(length, part.stop + margin))
            for part, length in zip((self.rows, self.columns), shape, strict=True)
        )
        return Region(rows, columns)


class NetworkImage(Protocol):
    """An image in the network's pixels that is read in parts (`nucleus.predict.source.ScaledImage`)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width, px."""

    def read(self, rows: slice, columns: slice) -> RgbImage:
        """Return normalised pixels, h x w x 3, uint8."""


class TiledNetwork:
    """A network applied to images tile by tile.

    Args:
        engine: The network.
        config: Its configuration.
        turns: Whether to average over the eight flips and quarter turns of each tile (test-time augmentation); eight
            times slower.
    """

    def __init__(self, engine: Engine, config: ModelConfig, *, turns: bool = False) -> None:
        self._engine = engine
        self._config = config
        self._orientations = tuple(product(range(4), (False, True))) if turns else ((0, False),)

    def whole_images(self, images: Sequence[NetworkImage]) -> list[NDArray[np.float32]]:
        """Return the values, H x W x channels, of whole images.

        Images of one tile are computed together where their tiles have the same shape. On some CPUs (without AVX-512)
        the last bits of the values depend on which images share a batch, so the same sequence gives the same values.
        """
        found: dict[int, NDArray[np.float32]] = {}
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, image in enumerate(images):
            rows, columns = self._axes(image.shape)
            if len(rows.starts) == len(columns.starts) == 1:
                alike[rows.tile, columns.tile].append(number)
            else:
                whole = Region(slice(0, image.shape[0]), slice(0, image.shape[1]))
                found[number] = next(self.regions(image, [whole]))
        for shape, numbers in alike.items():
            at_once = _tiles_at_once(*shape)
            for batch in (numbers[i : i + at_once] for i in range(0, len(numbers), at_once)):
                tiles = np.stack([_read_tile(images[i].read, *self._axes(images[i].shape), 0, 0) for i in batch])
                for number, values in zip(batch, self._tiles(tiles), strict=True):
                    height, width = images[number].shape
                    found[number] = values[:height, :width]
        return [found[number] for number in range(len(images))]

    def _axes(self, shape: tuple[int, int]) -> tuple[Axis, Axis]:
        down, across = (axis_tiles(length, self._config.tile, self._config.overlap) for length in shape)
        return down, across

    def regions(self, image: NetworkImage, regions: Iterable[Region]) -> Iterator[NDArray[np.float32]]:
        """Yield the values, h x w x channels, of regions of an image, one after the other.

        Tiles that later regions share are kept, up to 512 MiB.
        """
        rows, columns = self._axes(image.shape)
        window = _blend_window(rows.tile, columns.tile, self._config.overlap)
        kept: OrderedDict[tuple[int, int], NDArray[np.float32]] = OrderedDict()
        for region in regions:
            summed = np.zeros((*region.shape, len(self._config.channels)), np.float32)
            weight = np.zeros((*region.shape, 1), np.float32)
            for (y, x), values in self._tiles_of(region, image.read, rows, columns, kept):
                inside, part = _common(y, rows.tile, region.rows), _common(x, columns.tile, region.columns)
                summed[inside[0], part[0]] += (values * window)[inside[1], part[1]]
                weight[inside[0], part[0]] += window[inside[1], part[1]]
            yield summed / weight

    def _tiles_of(
        self,
        region: Region,
        read: ReadPixels,
        rows: Axis,
        columns: Axis,
        kept: OrderedDict[tuple[int, int], NDArray[np.float32]],
    ) -> Iterator[tuple[tuple[int, int], NDArray[np.float32]]]:
        """Yield the tiles that share pixels with a region, row by row; only new ones are computed, in batches."""
        places = product(rows.touching(region.rows), columns.touching(region.columns))
        at_once = _tiles_at_once(rows.tile, columns.tile)
        while batch := list(islice(places, at_once)):
            new = [place for place in batch if place not in kept]
            if new:
                tiles = np.stack([_read_tile(read, rows, columns, *place) for place in new])
                kept.update(zip(new, self._tiles(tiles), strict=True))
            yield from ((place, kept[place]) for place in batch)
            for place in batch:
                kept.move_to_end(place)
            while len(kept) * kept[batch[0]].nbytes > _KEPT_BYTES:
                kept.popitem(last=False)

    def _tiles(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the values of tiles, averaged over the orientations."""
        found = [
            _turned_back(self._engine(_turned(tiles, quarter, flip)), quarter, flip)
            for quarter, flip in self._orientations
        ]
        return np.asarray(found[0] if len(found) == 1 else np.mean(found, axis=0), np.float32)


def _tiles_at_once(height: int, width: int) -> int:
    return max(1, _BATCH_PIXELS // (height * width))


def axis_tiles(length: int, largest: int, overlap: int) -> Axis:
    """Return tiles of one size, at most `largest` px, that cover `length` evenly and overlap by at least `overlap` px.

    The last one may reach beyond the end, by less than 32 px.

    >>> axis_tiles(600, 256, 32)
    Axis(length=600, tile=224, starts=(0, 192, 384))
    """
    units, most, shared = (-(-pixels // STRIDE) for pixels in (length, largest, overlap))
    count = 1 if units <= most else -(-(units - shared) // (most - shared))
    tile = -(-(units + (count - 1) * shared) // count)
    starts = (round(i * (units - tile) / max(count - 1, 1)) * STRIDE for i in range(count))
    return Axis(length, tile * STRIDE, tuple(starts))


def reflect_indices(length: int, padded: int) -> NDArray[np.int64]:
    """Return indices that extend an axis of `length` to `padded` by mirroring, as often as needed.

    >>> reflect_indices(3, 8).tolist()
    [0, 1, 2, 1, 0, 1, 2, 1]
    """
    period = max(1, 2 * (length - 1))
    phase = np.arange(padded) % period
    return np.minimum(phase, period - phase) if length > 1 else np.zeros(padded, np.int64)


def _read_tile(read: ReadPixels, rows: Axis, columns: Axis, y: int, x: int) -> RgbImage:
    """Read a tile, mirrored where the image is smaller."""
    pixels = read(slice(y, min(y + rows.tile, rows.length)), slice(x, min(x + columns.tile, columns.length)))
    if pixels.shape[:2] == (rows.tile, columns.tile):
        return pixels
    return pixels[reflect_indices(pixels.shape[0], rows.tile)][:, reflect_indices(pixels.shape[1], columns.tile)]


def _common(start: int, tile: int, part: slice) -> tuple[slice, slice]:
    """Return the overlap of a tile and a part of an axis: in the part's pixels, and in the tile's."""
    first, last = max(start, part.start), min(start + tile, part.stop)
    return slice(first - part.start, last - part.start), slice(first - start, last - start)


def _turned(tiles: NDArray[Any], quarter: int, flip: bool) -> NDArray[Any]:
    turned = np.rot90(tiles, quarter, axes=(1, 2))
    return np.ascontiguousarray(turned[:, :, ::-1] if flip else turned)


def _turned_back(values: NDArray[Any], quarter: int, flip: bool) -> NDArray[Any]:
    return np.rot90(values[:, :, ::-1] if flip else values, -quarter, axes=(1, 2))


def _blend_window(height: int, width: int, overlap: int) -> NDArray[np.float32]:
    """Return the weights of a tile's pixels, height x width x 1: rising over the overlap, never zero.

    They rise with the third power: pixels at a tile's edge, where the network sees little context, hardly count.
    """
    down, across = (
        np.minimum(np.minimum(np.arange(side) + 1, np.arange(side)[::-1] + 1) / (overlap + 1), 1.0) ** 3
        for side in (height, width)
    )
    return np.asarray((down[:, np.newaxis] * across)[..., np.newaxis], np.float32)
