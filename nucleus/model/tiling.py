"""From an image of any size to the network's values at its pixels, tile by tile.

The tiles of an image are all of one shape and lie on a grid that its size alone decides, so a part of the image gets
the same values whether it is asked for alone or with the rest. Tiles start at multiples of the encoder's stride, so
that a pixel lies in each as it lies in the untiled image, and are blended over their overlap.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import STRIDE
from nucleus.data.images import RgbImage
from nucleus.data.normalization import normalize
from nucleus.lazy import tf
from nucleus.model.architecture import ModelConfig
from nucleus.model.heads import activations

__all__ = ["Axis", "Picture", "Region", "TiledNetwork", "axis_tiles", "reflect_indices"]

_BATCH_PIXELS = 1 << 19
"""Pixels of one call of the network: enough to keep the cores busy, little memory (about 0.5 GiB)."""
_KEPT_BYTES = 512 << 20
_IMAGES_AT_ONCE = 8

ReadPixels = Callable[[slice, slice], RgbImage]
"""Reads rows and columns of an image, h x w x 3, uint8, already normalised."""


@dataclass(frozen=True)
class Axis:
    """The tiles along an axis.

    Attributes:
        length: Of the image, px.
        tile: Of a tile, a multiple of 32, px.
        starts: Where tiles start.
    """

    length: int
    tile: int
    starts: tuple[int, ...]

    def touching(self, part: slice) -> list[int]:
        """Starts of the tiles that share pixels with a part of the axis."""
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


@dataclass(frozen=True)
class Picture:
    """An image that can be read by parts.

    Attributes:
        read: Reads normalised pixels.
        shape: Height and width, px.
    """

    read: ReadPixels
    shape: tuple[int, int]

    @property
    def whole(self) -> Region:
        """All of it."""
        return Region(slice(0, self.shape[0]), slice(0, self.shape[1]))


class TiledNetwork:
    """A network applied to images tile by tile.

    Args:
        model: A network of `build_unet`.
        config: Its configuration.
        turns: Whether to average over the eight flips and quarter turns of each tile (test-time augmentation); eight
            times the work.
    """

    def __init__(self, model: Any, config: ModelConfig, *, turns: bool = False) -> None:
        self._config = config
        self._orientations = tuple(product(range(4), (False, True))) if turns else ((0, False),)

        # One graph for all shapes: tracing another one for each takes seconds.
        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8)])
        def values(tiles: tf.Tensor) -> tf.Tensor:
            return activations(model(tf.cast(tiles, tf.float32), training=False), config.heads)

        self._values = values

    def __call__(self, image: RgbImage) -> NDArray[np.float32]:
        """Values, H x W x channels, at the pixels of an image, H x W x 3, as it is stored."""
        return next(self.images([image]))

    def images(self, images: Iterable[RgbImage]) -> Iterator[NDArray[np.float32]]:
        """The same for many, one after the other; small ones of like size are computed together."""
        remaining = iter(images)
        while chunk := list(islice(remaining, _IMAGES_AT_ONCE)):
            yield from self.pictures([self._picture(image) for image in chunk])

    def _picture(self, image: RgbImage) -> Picture:
        normalized = normalize(image, self._config.normalization)
        return Picture(lambda rows, columns: normalized[rows, columns], image.shape[:2])

    def pictures(self, pictures: Sequence[Picture]) -> list[NDArray[np.float32]]:
        """Values, H x W x channels, of whole images; those of one tile whose tiles are of one shape are batched."""
        found: dict[int, NDArray[np.float32]] = {}
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, picture in enumerate(pictures):
            rows, columns = self._axes(picture.shape)
            if len(rows.starts) == len(columns.starts) == 1:
                alike[rows.tile, columns.tile].append(number)
            else:
                found[number] = next(self.regions(picture, [picture.whole]))
        for shape, numbers in alike.items():
            at_once = _tiles_at_once(*shape)
            for batch in (numbers[i : i + at_once] for i in range(0, len(numbers), at_once)):
                tiles = np.stack([_read_tile(pictures[i].read, *self._axes(pictures[i].shape), 0, 0) for i in batch])
                for number, values in zip(batch, self._tiles(tiles), strict=True):
                    height, width = pictures[number].shape
                    found[number] = values[:height, :width]
        return [found[number] for number in range(len(pictures))]

    def _axes(self, shape: tuple[int, int]) -> tuple[Axis, Axis]:
        down, across = (axis_tiles(length, self._config.tile, self._config.overlap) for length in shape)
        return down, across

    def regions(self, picture: Picture, regions: Iterable[Region]) -> Iterator[NDArray[np.float32]]:
        """Values, h x w x channels, at regions of an image, one after the other.

        Tiles that the next regions share are kept, up to 512 MiB.

        Args:
            picture: The image.
            regions: Which parts of it.
        """
        rows, columns = self._axes(picture.shape)
        window = _blend_window(rows.tile, columns.tile, self._config.overlap)
        kept: OrderedDict[tuple[int, int], NDArray[np.float32]] = OrderedDict()
        for region in regions:
            summed = np.zeros((*region.shape, len(self._config.channels)), np.float32)
            weight = np.zeros((*region.shape, 1), np.float32)
            for (y, x), values in self._tiles_of(region, picture.read, rows, columns, kept):
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
        """The tiles that share pixels with a region, row by row, in batches of which only new ones are computed."""
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
        """Values of tiles, mean over the orientations."""
        found = [
            _turned_back(self._values(_turned(tiles, quarter, flip)).numpy(), quarter, flip)
            for quarter, flip in self._orientations
        ]
        return np.asarray(found[0] if len(found) == 1 else np.mean(found, axis=0), np.float32)


def _tiles_at_once(height: int, width: int) -> int:
    return max(1, _BATCH_PIXELS // (height * width))


def axis_tiles(length: int, largest: int, overlap: int) -> Axis:
    """Tiles of one size, at most `largest` px, that cover `length` evenly and share at least `overlap` pixels.

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
    """Indices that continue an axis of `length` to `padded` by mirroring, as often as needed.

    >>> reflect_indices(3, 8).tolist()
    [0, 1, 2, 1, 0, 1, 2, 1]
    """
    period = max(1, 2 * (length - 1))
    phase = np.arange(padded) % period
    return np.minimum(phase, period - phase) if length > 1 else np.zeros(padded, np.int64)


def _read_tile(read: ReadPixels, rows: Axis, columns: Axis, y: int, x: int) -> RgbImage:
    """A tile, mirrored where the image is smaller."""
    pixels = read(slice(y, min(y + rows.tile, rows.length)), slice(x, min(x + columns.tile, columns.length)))
    if pixels.shape[:2] == (rows.tile, columns.tile):
        return pixels
    return pixels[reflect_indices(pixels.shape[0], rows.tile)][:, reflect_indices(pixels.shape[1], columns.tile)]


def _common(start: int, tile: int, part: slice) -> tuple[slice, slice]:
    """Where a tile and a part of an axis meet: in the part's pixels, and in the tile's."""
    first, last = max(start, part.start), min(start + tile, part.stop)
    return slice(first - part.start, last - part.start), slice(first - start, last - start)


def _turned(tiles: NDArray[Any], quarter: int, flip: bool) -> NDArray[Any]:
    turned = np.rot90(tiles, quarter, axes=(1, 2))
    return np.ascontiguousarray(turned[:, :, ::-1] if flip else turned)


def _turned_back(values: NDArray[Any], quarter: int, flip: bool) -> NDArray[Any]:
    return np.rot90(values[:, :, ::-1] if flip else values, -quarter, axes=(1, 2))


def _blend_window(height: int, width: int, overlap: int) -> NDArray[np.float32]:
    """Weights of a tile's pixels, height x width x 1: rising over the overlap, never zero.

    They rise with the third power: at a tile's edge, where the network sees no further, they hardly count.
    """
    down, across = (
        np.minimum(np.minimum(np.arange(side) + 1, np.arange(side)[::-1] + 1) / (overlap + 1), 1.0) ** 3
        for side in (height, width)
    )
    return np.asarray((down[:, np.newaxis] * across)[..., np.newaxis], np.float32)
