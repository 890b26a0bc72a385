"""From an image of any size to the probabilities of its pixels, over tiles of one size.

One size means one compiled graph (whole images of many sizes would be compiled again for each).
"""

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from nucleus.data.images import RgbImage

__all__ = ["TiledNetwork", "reflect_indices", "tile_starts"]

_BATCH = 8


class TiledNetwork:
    """A network applied to images tile by tile, neighbouring tiles blended over their overlap."""

    def __init__(self, model: Any, tile: int, overlap: int) -> None:
        self._tile = tile
        self._overlap = overlap
        self._window = _blend_window(tile, overlap)

        @tf.function(input_signature=[tf.TensorSpec((None, tile, tile, 3), tf.uint8)])
        def probabilities(tiles: tf.Tensor) -> tf.Tensor:
            return tf.nn.softmax(model(tf.cast(tiles, tf.float32), training=False))

        self._probabilities = probabilities

    def __call__(self, image: RgbImage) -> NDArray[np.float32]:
        """Class probabilities, H x W x classes, of an image H x W x 3; images below the tile's size are mirrored."""
        height, width = image.shape[:2]
        tile = self._tile
        padded = image[reflect_indices(height, max(height, tile))][:, reflect_indices(width, max(width, tile))]
        places = [
            (y, x)
            for y in tile_starts(padded.shape[0], tile, self._overlap)
            for x in tile_starts(padded.shape[1], tile, self._overlap)
        ]
        summed: NDArray[np.float32] | None = None
        weight = np.zeros((*padded.shape[:2], 1), np.float32)
        for start in range(0, len(places), _BATCH):
            batch = places[start : start + _BATCH]
            tiles = np.stack([padded[y : y + tile, x : x + tile] for y, x in batch])
            found = self._probabilities(tiles).numpy()
            if summed is None:
                summed = np.zeros((*padded.shape[:2], found.shape[-1]), np.float32)
            for (y, x), values in zip(batch, found, strict=True):
                summed[y : y + tile, x : x + tile] += values * self._window
                weight[y : y + tile, x : x + tile] += self._window
        assert summed is not None  # there is at least one tile
        return np.asarray((summed / weight)[:height, :width], np.float32)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles start so that they cover `length` evenly and share at least `overlap` pixels.

    >>> tile_starts(600, 256, 32)
    [0, 172, 344]
    """
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def reflect_indices(length: int, padded: int) -> NDArray[np.int64]:
    """Indices that continue an axis of `length` to `padded` by mirroring, as often as needed.

    >>> reflect_indices(3, 8).tolist()
    [0, 1, 2, 1, 0, 1, 2, 1]
    """
    period = max(1, 2 * (length - 1))
    phase = np.arange(padded) % period
    return np.minimum(phase, period - phase) if length > 1 else np.zeros(padded, np.int64)


def _blend_window(tile: int, overlap: int) -> NDArray[np.float32]:
    """Weights of a tile's pixels, tile x tile x 1: rising over the overlap, never zero."""
    ramp = np.minimum(np.arange(tile) + 1, np.arange(tile)[::-1] + 1)
    line = np.minimum(ramp / (overlap + 1), 1.0).astype(np.float32)
    return (line[:, np.newaxis] * line)[..., np.newaxis]
