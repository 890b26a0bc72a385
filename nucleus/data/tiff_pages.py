"""Pages of a TIFF whose tags were read: their strips and tiles, decoded with tifffile whenever pixels are needed."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from nucleus.data.pixel_files import Content, ReadPart, check_declared, naming_damage
from nucleus.errors import ImageError

__all__ = ["JPEG", "StoredPage", "fill_pages", "page_reader"]

JPEG = frozenset({6, 7, 33007, 34892})
"""Compressions of TIFF that are JPEG."""
_MOST = {1: 1, 5: 4096, 8: 1100, 32946: 1100, 50013: 1100, 32773: 128}
"""Largest number of decoded bytes from one: none, LZW, Deflate, PackBits."""
_MOST_OTHERS = 1 << 17
_PALETTE = 3
"""Photometric interpretation of indices of a palette."""
_LARGEST_TILE = 1 << 24
"""Images with larger tiles, bytes, are unpacked once, instead of decoded whenever a part is read."""
_KEPT_BYTES = 1 << 25
"""Decoded tiles of an image that are kept for the next part."""
_WORTH_THREADS = 1 << 20
_HEAD = 4096


@dataclass(frozen=True)
class StoredPage:
    """A page whose tags were read: it needs the open file no more, only the bytes of its strips or tiles.

    Attributes:
        content: The file, or its bytes.
        name: Name of the file in messages.
        keyframe: The page with the tags that all pages of an image share.
        offsets: Place of each strip or tile in the file, bytes.
        counts: Size of each strip or tile, bytes.
        options: Options of the decoder: tables of JPEG.
        palette: K x 3 colours of the page, or None: each page of a stack may have its own.
    """

    content: Content
    name: str
    keyframe: tifffile.TiffPage
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    options: dict[str, Any]
    palette: NDArray[Any] | None = None

    @classmethod
    def of(cls, page: Any, content: Content, name: str, shift: int = 0) -> "StoredPage":
        """Return a page of an open file, or the one that follows it by `shift` bytes without tags of its own."""
        keyframe = page.keyframe
        jpeg = keyframe.compression in JPEG
        options = {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader} if jpeg else {}
        keyframe.init_decode()
        offsets = tuple(offset + shift for offset in page.dataoffsets) if shift else tuple(page.dataoffsets)
        colours = page.aspage().colormap if keyframe.photometric == _PALETTE else None
        palette = None if colours is None else colours.T.copy()
        return cls(content, name, keyframe, offsets, tuple(page.databytecounts), options, palette)

    def check_size(self, size: int) -> None:
        """Raise `ImageError` if strips or tiles are missing in the file, which has `size` bytes."""
        expected = math.prod(self.keyframe.chunked)
        pairs = zip(self.offsets, self.counts, strict=False)
        whole = sum(0 < count <= size - offset for offset, count in pairs)
        if whole < expected:
            raise ImageError(
                f"Expected {expected} strips or tiles in {self.name}; found {whole} complete ones in its {size:,} "
                "bytes. The file is damaged: copy it again, or save it again from its source."
            )

    @property
    def is_mapped(self) -> bool:
        """Whether the pixels lie in the file uncompressed and in their order, so that parts of them can be read."""
        follow = pairwise(zip(self.offsets, self.counts, strict=False))
        in_order = all(offset + count == after for (offset, count), (after, _) in follow)
        return self.keyframe.is_final and isinstance(self.content, Path) and in_order

    @property
    def step(self) -> tuple[int, int]:
        """Height and width of a strip or tile."""
        page = self.keyframe
        strip = min(page.rowsperstrip, page.imagelength), page.imagewidth
        return (page.tilelength, page.tilewidth) if page.is_tiled else strip

    @property
    def tile_bytes(self) -> int:
        """Bytes of a decoded strip or tile."""
        page = self.keyframe
        samples = page.samplesperpixel if page.planarconfig == 1 else 1
        return int(math.prod(self.step) * samples * page.dtype.itemsize)

    def touching(self, rows: slice, columns: slice) -> list[int]:
        """Return the indices of the strips or tiles that share pixels with a part."""
        page, (height, width) = self.keyframe, self.step
        down, across = -(-page.imagelength // height), -(-page.imagewidth // width)
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        places = product(
            range(planes),
            range(rows.start // height, -(-rows.stop // height)),
            range(columns.start // width, -(-columns.stop // width)),
        )
        return [(plane * down + y) * across + x for plane, y, x in places]

    @contextmanager
    def opened(self) -> Iterator[Callable[[int, int], bytes]]:
        """Provide a function that reads a number of bytes from a place in the file, for any number of threads."""
        if not isinstance(self.content, Path):
            content = self.content
            yield lambda offset, count: content[offset : offset + count]
            return
        lock = Lock()
        with self.content.open("rb") as file:

            def read(offset: int, count: int) -> bytes:
                with lock:
                    file.seek(offset)
                    return file.read(count)

            yield read

    def head(self) -> bytes:
        """Return the first bytes of the first strip or tile."""
        with self.opened() as read:
            return read(self.offsets[0], min(self.counts[0], _HEAD))

    def decoded(self, read: Callable[[int, int], bytes], index: int) -> "_Segment":
        """Decode a strip or tile. Raises `ImageError`."""
        page = self.keyframe
        check_declared(self.name, self._size_of(index), self.counts[index], _MOST.get(page.compression, _MOST_OTHERS))
        with naming_damage(self.name, "TIFF"):
            pixels, (plane, _, top, left, _), _ = page.decode(
                read(self.offsets[index], self.counts[index]), index, **self.options
            )
            if page.dtype == np.bool_ and pixels.dtype == np.uint8:  # of fax codecs
                pixels = pixels.view(np.bool_)
            if pixels.dtype != page.dtype:
                raise ImageError(f"Expected {page.dtype} in {self.name}; found a strip or tile of {pixels.dtype}.")
        return _Segment(pixels[0], plane, top, left)

    def _size_of(self, index: int) -> int:
        """Return the bytes of a strip or tile without compression; the last strip may be shorter."""
        page, (height, width) = self.keyframe, self.step
        top = index // -(-page.imagewidth // width) % -(-page.imagelength // height) * height
        rows = height if page.is_tiled else min(height, page.imagelength - top)
        return int(self.tile_bytes // height * rows * page.bitspersample // (8 * page.dtype.itemsize))


@dataclass(frozen=True)
class _Segment:
    """A decoded strip or tile: its pixels (h x w x C), its first channel, and its place in the image."""

    pixels: NDArray[Any]
    channel: int
    top: int
    left: int

    def paste(self, out: NDArray[Any], rows: slice, columns: slice) -> None:
        """Copy the pixels into `out`, which holds these rows and columns of the image."""
        top, left = max(self.top, rows.start), max(self.left, columns.start)
        part = self.pixels[top - self.top : rows.stop - self.top, left - self.left : columns.stop - self.left]
        y, x = top - rows.start, left - columns.start
        out[y : y + part.shape[0], x : x + part.shape[1], self.channel : self.channel + part.shape[2]] = part


def _each(work: Callable[[int], None], indices: Sequence[int], size: int) -> None:
    """Do work for each index, in threads if it is much: decoders release the lock of the interpreter."""
    if len(indices) * size < _WORTH_THREADS:
        for index in indices:
            work(index)
        return
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(work, indices):
            pass


def fill_pages(pages: Sequence[StoredPage], out: NDArray[Any]) -> None:
    """Decode whole pages into an array, H x W x C, one strip or tile per thread at a time.

    Each page holds the same number of channels. Raises `ImageError` for damaged data, `OSError`.
    """
    rows, columns = slice(0, out.shape[0]), slice(0, out.shape[1])
    for channels, page in _channels_of(pages, out):
        with page.opened() as read:
            _each(partial(_paste, page, read, channels), page.touching(rows, columns), page.tile_bytes)


def _paste(page: "StoredPage", read: Callable[[int, int], bytes], out: NDArray[Any], index: int) -> None:
    page.decoded(read, index).paste(out, slice(0, out.shape[0]), slice(0, out.shape[1]))


def _channels_of(pages: Sequence[StoredPage], out: NDArray[Any]) -> Iterator[tuple[NDArray[Any], StoredPage]]:
    """Yield the channels of each page in an array of all channels."""
    each = out.shape[2] // len(pages)
    for number, page in enumerate(pages):
        yield out[..., number * each : (number + 1) * each], page


def page_reader(pages: Sequence[StoredPage]) -> ReadPart | None:
    """Return the function that reads parts of pages, each with the same number of channels.

    None if it would decode much more than the part: compressed strips, and large tiles.
    """
    if all(page.is_mapped for page in pages):
        readers = [_mapped_reader(page) for page in pages]
    elif pages[0].keyframe.is_tiled and pages[0].tile_bytes <= _LARGEST_TILE:
        readers = [_tile_reader(page, _KEPT_BYTES // len(pages)) for page in pages]
    else:
        return None
    return lambda rows, columns: np.concatenate([read(rows, columns) for read in readers], axis=2)


def _mapped_reader(page: StoredPage) -> ReadPart:
    """Return a reader of parts of uncompressed pixels that lie in the file in their order."""
    tags = page.keyframe
    planes, together = (tags.samplesperpixel, 1) if tags.planarconfig == 2 else (1, tags.samplesperpixel)
    shape = (planes, tags.imagelength, tags.imagewidth, together)
    dtype = np.dtype(tags.dtype).newbyteorder(tags.parent.byteorder)

    def read(rows: slice, columns: slice) -> NDArray[Any]:
        with naming_damage(page.name, "TIFF"):
            stored = np.memmap(str(page.content), dtype, "r", page.offsets[0], shape)
            part = np.moveaxis(stored[:, rows, columns], 0, 2)
            return np.array(part.reshape(*part.shape[:2], -1), tags.dtype)

    return read


def _tile_reader(page: StoredPage, limit: int) -> ReadPart:
    """Return a reader of parts that keeps up to `limit` bytes of decoded tiles, because the next part needs some."""
    kept: dict[int, _Segment] = {}

    def read(rows: slice, columns: slice) -> NDArray[Any]:
        tags = page.keyframe
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start, tags.samplesperpixel), tags.dtype)

        def paste(index: int) -> None:
            kept[index] = kept.pop(index) if index in kept else page.decoded(load, index)  # the last is the newest
            kept[index].paste(out, rows, columns)

        with page.opened() as load:
            _each(paste, page.touching(rows, columns), page.tile_bytes)
        while len(kept) * page.tile_bytes > limit:
            del kept[next(iter(kept))]
        return out

    return read
