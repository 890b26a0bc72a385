"""What the page shows of an image: tiles of a pyramid, in the chosen channels, colours and ranges; and thumbnails."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import RgbImage, encode_png
from nucleus.data.pixel_files import ReadPart, temporary_array
from nucleus.errors import UsageError
from nucleus.pictures import draw_outlines
from nucleus.predict.source import ImageSource

__all__ = ["TILE", "ChannelView", "Pyramid", "default_views", "parse_views", "pyramid_of", "thumbnail"]

TILE = 256
"""Side of a tile, px."""
_BAND_PIXELS = 1 << 24
_IN_MEMORY_BYTES = 64 << 20
_SAMPLE_SIDE = 1024
_LOW, _HIGH = 0.1, 99.8
_WIDEST_8_BIT = 255.0
_PARTS_OF_VIEW = 4
_MOST_VIEWS = 64
_RESIZED = {"uint8", "uint16", "int16", "float32", "float64"}
"""Types that OpenCV reduces; others become float32."""
_COLOURS = ("#4d7cff", "#3ddc6c", "#ff4d4d", "#ff5cf0", "#2fe0e0", "#ffd83d", "#ff9a3d", "#ffffff")
"""Colours of channels that are shown together, in their order: blue first, as nuclei usually are."""
_RGB = ("#ff0000", "#00ff00", "#0000ff")


@dataclass(frozen=True)
class ChannelView:
    """How a channel is shown: values from `low` to `high` as black to `colour`; channels are added.

    Attributes:
        channel: Number of the channel, from 0.
        low: Value that is shown black.
        high: Value that is shown in the full colour.
        colour: "#rrggbb".
    """

    channel: int
    low: float
    high: float
    colour: str

    @property
    def rgb(self) -> NDArray[np.float32]:
        """Red, green and blue, 0 to 255."""
        return np.array([int(self.colour[at : at + 2], 16) for at in (1, 3, 5)], np.float32)


class Pyramid:
    """An image at its own size, and reduced by 2, 4, 8, ..., until it fits in a tile.

    Args:
        read: Function that reads rows and columns at the image's own size, h x w x C.
        shape: Height and width, px.

    Attributes:
        shape: Height and width, px.
        levels: Functions that read each level; level k is reduced by 2**k.
    """

    def __init__(self, read: ReadPart, shape: tuple[int, int]) -> None:
        self.shape = shape
        first = read(slice(0, 1), slice(0, 1))
        self.channels, self.dtype = first.shape[2], first.dtype
        self.levels: list[ReadPart] = [read]
        self._sizes = [shape]
        while max(self._sizes[-1]) > TILE:
            self._add_level()

    def _add_level(self) -> None:
        height, width = self._sizes[-1]
        size = (-(-height // 2), -(-width // 2))
        kind = self.dtype if self.dtype.name in _RESIZED else np.dtype(np.float32)
        reduced = _space((*size, self.channels), kind)
        band = max(2, _BAND_PIXELS // width // 2 * 2)
        for top in range(0, height, band):
            part = self.levels[-1](slice(top, min(top + band, height)), slice(0, width))
            half = _halved(np.asarray(part, kind))
            reduced[top // 2 : top // 2 + half.shape[0]] = half
        self.levels.append(lambda rows, columns: reduced[rows, columns])
        self._sizes.append(size)

    def at_most(self, side: int) -> NDArray[Any]:
        """Return the largest level whose sides are at most `side` px, h x w x C; the smallest if there is none."""
        level = sum(1 for _ in takewhile(lambda size: max(size) > side, self._sizes))
        return self.whole(min(level, len(self.levels) - 1))

    def whole(self, level: int) -> NDArray[Any]:
        """Return all pixels of a level, h x w x C."""
        height, width = self._sizes[level]
        return self.levels[level](slice(0, height), slice(0, width))

    @cached_property
    def ranges(self) -> list[tuple[float, float]]:
        """Lowest and highest value of each channel, of a reduced image."""
        pixels = self.at_most(_SAMPLE_SIDE).astype(np.float64)
        return [(float(pixels[..., c].min()), float(pixels[..., c].max())) for c in range(self.channels)]

    @cached_property
    def contrast(self) -> list[tuple[float, float]]:
        """Range of each channel without its extreme values: 0.1 % to 99.8 % of the pixels."""
        pixels = self.at_most(_SAMPLE_SIDE).astype(np.float64)  # percentiles of pixels of 1 bit have no sense
        found = [np.percentile(pixels[..., c], (_LOW, _HIGH)).tolist() for c in range(self.channels)]
        return [(low, high if high > low else low + 1) for low, high in found]

    @cached_property
    def is_grey(self) -> bool:
        """Whether all channels are the same."""
        pixels = self.at_most(_SAMPLE_SIDE)
        return bool((pixels == pixels[..., :1]).all())

    def tile(self, level: int, column: int, row: int, views: Sequence[ChannelView]) -> bytes:
        """Return a tile as PNG, at most 256 x 256 px.

        Raises:
            UsageError: There is no such tile or channel.
        """
        inside = 0 <= level < len(self.levels) and row >= 0 and column >= 0
        if not inside or row * TILE >= self._sizes[level][0] or column * TILE >= self._sizes[level][1]:
            raise UsageError(f"Expected a tile of this image; found level {level}, column {column}, row {row}.")
        height, width = self._sizes[level]
        rows = slice(row * TILE, min((row + 1) * TILE, height))
        columns = slice(column * TILE, min((column + 1) * TILE, width))
        return encode_png(shown(self.levels[level](rows, columns), views))


def _space(shape: tuple[int, ...], kind: np.dtype[Any]) -> NDArray[Any]:
    """Return room for a level: in memory, or in a temporary file if it is large."""
    if int(np.prod(shape)) * kind.itemsize <= _IN_MEMORY_BYTES:
        return np.empty(shape, kind)
    return temporary_array(shape, kind, "a reduced image")[0]


def _halved(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return the mean of each 2 x 2 pixels; the last row and column count twice if their number is odd."""
    height, width = pixels.shape[:2]
    even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
    size = (even.shape[1] // 2, even.shape[0] // 2)
    channels = [cv2.resize(even[..., c], size, interpolation=cv2.INTER_AREA) for c in range(even.shape[2])]
    return np.stack(channels, axis=2)


def shown(pixels: NDArray[Any], views: Sequence[ChannelView]) -> RgbImage:
    """Return pixels (h x w x C) as they are shown, h x w x 3.

    Raises:
        UsageError: A view is of a channel that the image does not have.
    """
    total = np.zeros((*pixels.shape[:2], 3), np.float32)
    for view in views:
        if not 0 <= view.channel < pixels.shape[2]:
            raise UsageError(f"Expected a channel from 0 to {pixels.shape[2] - 1}; found {view.channel}.")
        values = (pixels[..., view.channel].astype(np.float32) - view.low) / max(view.high - view.low, 1e-12)
        total += np.clip(values, 0, 1)[..., np.newaxis] * view.rgb
    return np.clip(total + 0.5, 0, 255).astype(np.uint8)


def pyramid_of(source: ImageSource, *, stored: bool) -> Pyramid:
    """Return the pyramid of an image: of all stored channels, or of what eyes see, grey or RGB."""
    return Pyramid(source.read_channels if stored else source.read, (source.height, source.width))


def default_views(pyramid: Pyramid, *, stored: bool) -> list[ChannelView]:
    """Return how an image is shown at first: RGB as it is, grey stretched, other channels in a colour each."""
    if not stored and (pyramid.channels == 1 or pyramid.is_grey):
        return [ChannelView(0, *pyramid.contrast[0], "#ffffff")]
    if not stored:
        together = pyramid.contrast
        low, high = min(low for low, _ in together), max(high for _, high in together)
        if pyramid.dtype == np.uint8:
            low, high = 0.0, _WIDEST_8_BIT
        return [ChannelView(channel, low, high, colour) for channel, colour in enumerate(_RGB)]
    return [
        ChannelView(channel, *pyramid.contrast[channel], _COLOURS[channel % len(_COLOURS)])
        for channel in range(pyramid.channels)
    ]


def parse_views(text: str) -> list[ChannelView]:
    """Return the views that a text of the form `0:10:200:ff0000,1:...` names.

    Raises:
        UsageError: The text has another form.
    """
    try:
        return list(_parsed(text))
    except ValueError as error:
        raise UsageError(f"Expected channels such as 0:10:200:ff0000; found {text[:60]!r}.") from error


def _parsed(text: str) -> Iterator[ChannelView]:
    parts = [part for part in text.split(",") if part]
    if len(parts) > _MOST_VIEWS:
        raise ValueError(text)
    for part in parts:
        channel, low, high, colour = part.split(":", _PARTS_OF_VIEW - 1)
        if len(colour) != len("rrggbb") or not np.isfinite([float(low), float(high)]).all():
            raise ValueError(part)
        yield ChannelView(int(channel), float(low), float(high), f"#{int(colour, 16):06x}")


def thumbnail(pyramid: Pyramid, views: Sequence[ChannelView], labels: NDArray[np.int32] | None, side: int) -> bytes:
    """Return a PNG of at most `side` px per side, with the outlines of the nuclei if there are labels."""
    pixels = shown(pyramid.at_most(2 * side), views)
    scale = min(1.0, side / max(pixels.shape[:2]))
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    picture = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    if labels is not None:
        rows = (np.arange(size[1]) * labels.shape[0] / size[1]).astype(np.intp)
        columns = (np.arange(size[0]) * labels.shape[1] / size[0]).astype(np.intp)
        picture = draw_outlines(picture, labels[np.ix_(rows, columns)])
    return encode_png(picture)
