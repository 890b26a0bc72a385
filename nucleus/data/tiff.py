"""The decoder of TIFF: which page is the image, what its values mean, and its strips and tiles, read with tifffile."""

import html
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from nucleus.data.pixel_files import Content, PixelFacts, PixelFile, ReadPart, check_declared, naming_damage
from nucleus.errors import ImageError

__all__ = ["open_tiff"]

_OME_SIZE = re.compile(r'PhysicalSize([XY])="([^"]*)"')  # instead of an XML parser, which a malicious file could harm
_OME_UNIT = re.compile(r'PhysicalSizeXUnit="([^"]*)"')
_MICROMETRES = {"µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_SQUARE = 0.01
"""Pixels are square if their sides differ by less than this fraction."""
_SIDE_IMAGES = re.compile(r"thumbnail|label|macro|overview|map|resolution|level ?[1-9]\d*")
"""Names of the images that slide scanners add to the main one."""
_MISSING_PAGES = re.compile("corrupted tag list|invalid offset to page|invalid page offset|circular|corrupted file")
_ALPHA = frozenset({1, 2})
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_REFUSED = {4: "a transparency mask", 5: "CMYK inks", 32803: "the mosaic of a camera sensor"}
_JPEG = frozenset({6, 7, 33007, 34892})
_APERIO_YCBC, _WEBP = 33003, 50001
_LOSSLESS = {_WEBP: b"VP8L", **dict.fromkeys(_JPEG, b"\xff\xc3")}
"""What the head of a strip or tile contains if a compression that is usually lossy is not."""
_MOST = {1: 1, 5: 4096, 8: 1100, 32946: 1100, 50013: 1100, 32773: 128}
"""Largest number of decoded bytes from one: none, LZW, Deflate, PackBits."""
_MOST_OTHERS = 1 << 17
_LARGEST_TILE = 1 << 24
"""Images with larger tiles, bytes, are unpacked once, instead of decoded whenever a part is read."""
_KEPT_BYTES = 1 << 25
"""Decoded tiles of an image that are kept for the next part."""
_WORTH_THREADS = 1 << 20
_HEAD = 4096


def open_tiff(content: Content, name: str) -> PixelFile:
    """Read the header of a TIFF file, and find its main image among thumbnails, labels and reduced pages.

    Args:
        content: The file, or its bytes.
        name: Name of the file in messages.

    Raises:
        ImageError: The file is damaged, or has pixels of a kind that is not read.
        OSError: The file cannot be read.
    """
    source = content if isinstance(content, Path) else io.BytesIO(content)
    with naming_damage(name, "TIFF") as lines, tifffile.TiffFile(source) as file:
        images = _main_images(file, name)
        _check_complete(file, lines, name)
        several = _several(file, images, name)
        pages = [_first_page(file, images[0])] if several else list(images[0])
        first = pages[0].keyframe
        _check_kind(first, name)
        parts = [_Page.of(page, content, name, file.filehandle.size) for page in pages]
        return PixelFile(
            name=name,
            shape=(first.imagelength, first.imagewidth, first.samplesperpixel * len(pages)),
            dtype=np.dtype(first.dtype),
            fill=lambda out: _fill_all(parts, out),
            read_part=_part_reader(parts),
            facts=_facts(parts[0], sum(map(_planes, images)), alone=len(pages) == 1),
            pixel_size=_pixel_size(file),
            several=several,
            choose=len(pages) > 1 or _is_multichannel(first),
        )


def _main_images(file: tifffile.TiffFile, name: str) -> list[tifffile.TiffPageSeries]:
    """Return the images of a file without thumbnails, labels, transparency masks and reduced copies."""
    found = [series for series in file.series if len(series) and series.keyframe is not None]
    main = [series for series in found if not _is_beside(series)] or found[:1]
    if not main:
        raise ImageError(f"Expected an image in {name}; found a TIFF without one.")
    return main


def _check_complete(file: tifffile.TiffFile, lines: Sequence[str], name: str) -> None:
    """Raise `ImageError` if pages are missing: tifffile tells of them in its log alone."""
    pages = len(file.pages)  # reads the places of all of them
    missing = next((line for line in lines if _MISSING_PAGES.search(line)), None)
    if missing is not None:
        raise ImageError(
            f"Expected a complete TIFF image in {name}; found a damaged one: pages after the first {pages} are "
            "missing. Copy it again, or save it again from its source."
        )


def _is_beside(series: tifffile.TiffPageSeries) -> bool:
    page = series.keyframe
    named = _SIDE_IMAGES.fullmatch(series.name.lower()) is not None
    return named or page.is_reduced or page.is_mask or page.is_subifd


def _sizes(series: tifffile.TiffPageSeries) -> dict[str, int]:
    return {axis: size for axis, size in zip(series.axes, series.shape, strict=True) if size > 1}


def _planes(series: tifffile.TiffPageSeries) -> int:
    """Return the number of planes of an image, each as large as a page."""
    return int(math.prod(series.shape) // max(1, math.prod(series.keyframe.shape)))


def _several(file: tifffile.TiffFile, images: Sequence[tifffile.TiffPageSeries], name: str) -> str | None:
    """Return why a file is not a single image; None if it is one, with its channels in one page or a page each."""
    if len(images) != 1:
        return f"Expected one image in {name}; found {len(images)}. Save each as a separate file."
    (series,) = images
    sizes = _sizes(series)
    if set(sizes) - set("YXSC"):
        return (
            f"Expected one image in {name}; found a stack with axes {series.axes} of {series.shape}. "
            "Save its planes as separate files."
        )
    if _planes(series) != len(series):
        return (
            f"Expected a page for each channel in {name}; found {_planes(series)} channels in {len(series)} page. "
            "Save them as separate files."
        )
    if any(page is None or page.parent is not file for page in series):
        return f"Expected a complete image in {name}; it is one of several files of an OME-TIFF. Save them as one file."
    return None


def _first_page(file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Any:
    """Return the first page of an image that is in this file, which may be one of several."""
    return next((page for page in series if page is not None and page.parent is file), file.pages.first)


def _check_kind(page: tifffile.TiffPage, name: str) -> None:
    """Raise `ImageError` for pixels of a kind that is not read, by its name."""
    found = None
    plain = {_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE}
    jpeg = page.compression in _JPEG
    if page.photometric not in plain and not (page.photometric == _YCBCR and jpeg):
        found = _REFUSED.get(page.photometric, f"photometric interpretation {_name_of(page.photometric)}")
    elif page.photometric == _RGB and page.samplesperpixel < 3:
        found = f"RGB with {page.samplesperpixel} sample per pixel"
    elif page.dtype is not None and page.dtype.kind == "c":
        found = "complex numbers"
    elif page.dtype is None or page.dtype.kind not in "buif" or isinstance(page.bitspersample, tuple):
        found = f"{page.bitspersample} bits per value, sample format {_name_of(page.sampleformat)}"
    elif page.compression == _APERIO_YCBC or not _is_known(page.compression):
        found = f"compression {_name_of(page.compression)}"
    if found is not None:
        fix = "Save it as RGB." if "CMYK" in found else "Save it again as an uncompressed grey or RGB TIFF."
        raise ImageError(f"Expected grey, RGB or palette pixels in {name}; found {found}. {fix}")


def _name_of(value: Any) -> str:
    return f"{value.name} ({int(value)})" if hasattr(value, "name") else str(value)


def _is_known(compression: int) -> bool:
    try:
        return compression == 1 or bool(tifffile.TIFF.DECOMPRESSORS[compression])
    except KeyError:
        return False


def _colours(page: tifffile.TiffPage) -> int:
    return 3 if page.photometric in {_RGB, _YCBCR} else 1


def _is_multichannel(page: tifffile.TiffPage) -> bool:
    """Return whether a page has several channels of which neither three are RGB nor one is alpha."""
    return page.samplesperpixel > 1 and _colours(page) == 1 and _alpha(page) is None


def _alpha(page: tifffile.TiffPage) -> int | None:
    """Return the channel that is declared as alpha."""
    first = page.samplesperpixel - len(page.extrasamples)
    return next((first + i for i, kind in enumerate(page.extrasamples) if kind in _ALPHA), None)


def _facts(part: "_Page", pages: int, *, alone: bool) -> PixelFacts:
    page = part.keyframe
    orientation = page.tags.valueof("Orientation", 1)
    return PixelFacts(
        colours=_colours(page) if alone else 1,
        bits=page.bitspersample,
        alpha=_alpha(page) if alone else None,
        palette=page.colormap.T.copy() if page.photometric == _PALETTE and page.colormap is not None else None,
        white_is_zero=page.photometric == _WHITE_IS_ZERO,
        lossy=page.compression in _LOSSLESS and _LOSSLESS[page.compression] not in part.head(),
        pages=pages,
        orientation=orientation if orientation in range(1, 9) else 1,
    )


@dataclass(frozen=True)
class _Page:
    """A page whose tags were read: it needs the open file no more, only the bytes of its strips or tiles.

    Attributes:
        content: The file, or its bytes.
        name: Name of the file in messages.
        keyframe: The page with the tags that all pages of an image share.
        offsets: Place of each strip or tile in the file, bytes.
        counts: Size of each strip or tile, bytes.
        options: Options of the decoder: tables of JPEG.
    """

    content: Content
    name: str
    keyframe: tifffile.TiffPage
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, page: Any, content: Content, name: str, size: int) -> "_Page":
        """Return a page of an open file of `size` bytes. Raises `ImageError` if strips or tiles are missing."""
        keyframe = page.keyframe
        offsets, counts = tuple(page.dataoffsets), tuple(page.databytecounts)
        expected = math.prod(keyframe.chunked)
        whole = [0 < count <= size - offset and offset for offset, count in zip(offsets, counts, strict=False)]
        if sum(map(bool, whole)) < expected:
            raise ImageError(
                f"Expected {expected} strips or tiles in {name}; found {sum(map(bool, whole))} complete ones in its "
                f"{size:,} bytes. The file is damaged: copy it again, or save it again from its source."
            )
        jpeg = keyframe.compression in _JPEG
        options = {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader} if jpeg else {}
        keyframe.init_decode()
        return cls(content, name, keyframe, offsets, counts, options)

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


def _fill_all(pages: Sequence[_Page], out: NDArray[Any]) -> None:
    """Decode whole pages into an array, one strip or tile per thread at a time."""
    rows, columns = slice(0, out.shape[0]), slice(0, out.shape[1])
    for channels, page in _channels_of(pages, out):
        with page.opened() as read:
            _each(partial(_paste, page, read, channels), page.touching(rows, columns), page.tile_bytes)


def _paste(page: "_Page", read: Callable[[int, int], bytes], out: NDArray[Any], index: int) -> None:
    page.decoded(read, index).paste(out, slice(0, out.shape[0]), slice(0, out.shape[1]))


def _channels_of(pages: Sequence[_Page], out: NDArray[Any]) -> Iterator[tuple[NDArray[Any], _Page]]:
    """Yield the channels of each page in an array of all channels."""
    each = out.shape[2] // len(pages)
    for number, page in enumerate(pages):
        yield out[..., number * each : (number + 1) * each], page


def _part_reader(pages: Sequence[_Page]) -> ReadPart | None:
    """Return the function that reads parts of pages; None if it would decode much more than the part."""
    if all(page.keyframe.is_final and isinstance(page.content, Path) for page in pages):
        readers = [_mapped_reader(page) for page in pages]
    elif pages[0].keyframe.is_tiled and pages[0].tile_bytes <= _LARGEST_TILE:
        readers = [_tile_reader(page, _KEPT_BYTES // len(pages)) for page in pages]
    else:
        return None
    return lambda rows, columns: np.concatenate([read(rows, columns) for read in readers], axis=2)


def _mapped_reader(page: _Page) -> ReadPart:
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


def _tile_reader(page: _Page, limit: int) -> ReadPart:
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


def _pixel_size(file: tifffile.TiffFile) -> float | None:
    """Return the pixel size in micrometres from the metadata of OME or ImageJ; None if unknown or not square.

    Plain resolution tags are ignored, because they often describe a screen.
    """
    if file.is_ome and file.ome_metadata:
        sizes = dict(_OME_SIZE.findall(file.ome_metadata))
        unit = _OME_UNIT.search(file.ome_metadata)
        return _micrometres([sizes.get("X", ""), sizes.get("Y", sizes.get("X", ""))], unit[1] if unit else "µm")
    tags = file.pages.first.tags
    found = [tags.get(name) for name in ("XResolution", "YResolution")]
    if file.imagej_metadata is None or None in found:
        return None
    sides = [tag.value[1] / tag.value[0] if tag.value[0] else "" for tag in found]
    return _micrometres(sides, str(file.imagej_metadata.get("unit", "")))


def _micrometres(sides: Sequence[Any], unit: str) -> float | None:
    """Return the side of square pixels in micrometres; None for other units or invalid numbers."""
    unit = html.unescape(unit).replace("\\u00B5", "µ").replace("\u03bc", "µ")
    try:
        width, height = (float(side) for side in sides)
    except ValueError:
        return None
    usable = math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0
    if unit not in _MICROMETRES or not usable or abs(width - height) > _SQUARE * width:
        return None
    return width * _MICROMETRES[unit]
