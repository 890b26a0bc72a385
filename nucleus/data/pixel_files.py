"""Image files as their decoders see them: what is known from the header, and the stored pixels, read in parts.

Each decoder (`nucleus.data.rasters`, `nucleus.data.tiff`) gives a `PixelFile`. Images, masks, whole files and parts of
large ones are all read through it, so that they have the same values.
"""

import logging
import mmap
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nucleus.errors import ImageError, StorageError
from nucleus.surroundings import free_pages, take_room

__all__ = [
    "Content",
    "Level",
    "PixelFacts",
    "PixelFile",
    "ReadPart",
    "bytes_of",
    "check_declared",
    "exif_orientation",
    "level_steps",
    "memory_part",
    "naming_damage",
    "seen_channels",
    "seen_pixels",
    "temporary_array",
    "temporary_pages",
    "unpacked_part",
]

Content = Path | bytes
"""A file, or the content of one."""
ReadPart = Callable[[slice, slice], NDArray[Any]]
"""Reads rows and columns of an image: h x w x C."""

_lines: ContextVar[list[str] | None] = ContextVar("_lines", default=None)
"""Where the lines go that libraries log while a file is decoded in this thread."""
_ORIENTATION = 274
_SHORT = 3


def _kept_back(record: logging.LogRecord) -> bool:
    """Return whether a line is not about a file that is decoded here; the lines that are about one are kept."""
    lines = _lines.get()
    if lines is None:
        return True
    lines.append(record.getMessage())
    return False


for _library in ("tifffile", "imagecodecs"):
    logging.getLogger(_library).addFilter(_kept_back)


@dataclass(frozen=True, kw_only=True)
class PixelFacts:
    """What the stored values of an image mean.

    Attributes:
        colours: Number of leading channels that are colour, 1 or 3; the others are alpha or extra channels.
        bits: Bits per value; 1 bit is stored as bool, 2 to 7 bits as uint8, 9 to 15 bits as uint16, without scaling.
        alpha: Index of the channel that the file declares as alpha, or None.
        palette: K x 3 RGB colours (uint8 or uint16) of a palette image, or None; its one colour channel is of indices.
        white_is_zero: Whether 0 is white (TIFF MINISWHITE).
        lossy: Whether the compression changed values (JPEG, lossy WebP, JPEG within TIFF).
        pages: Number of full-size pages or frames in the file.
        orientation: Orientation tag, 1 to 8 (TIFF tag 274, EXIF), 1 if absent. Pixels are never turned by it.
    """

    colours: int = 1
    bits: int = 8
    alpha: int | None = None
    palette: NDArray[Any] | None = None
    white_is_zero: bool = False
    lossy: bool = False
    pages: int = 1
    orientation: int = 1


@dataclass(frozen=True)
class Level:
    """A reduced copy of an image in its file: a level of a pyramid.

    Its upper left corner is that of the image. What is read from it only feeds the network: labels, outlines and tables
    are in pixels of the image.

    Attributes:
        steps: Pixels of the image per pixel of the level, above 1, by rows and by columns.
        shape: Height and width, pixels of the level.
        read: Function that reads stored pixels of the level, in the type and with the channels of the image.
    """

    steps: tuple[float, float]
    shape: tuple[int, int]
    read: ReadPart


@dataclass(frozen=True, kw_only=True)
class PixelFile:
    """An image file whose header was read.

    Attributes:
        name: Name of the file in messages.
        shape: Height and width (px), and number of stored channels.
        dtype: Type of the stored values.
        fill: Function that decodes all pixels into an array of this shape and type.
        read_part: Function that decodes only the parts it reads; None if the format has no such parts.
        facts: What the values mean.
        pixel_size: Side of a pixel, micrometres; None if unknown.
        several: Why the file is not a single image; None if it is one.
        choose: Whether the channels are several images of one field, of which one must be chosen to segment.
        levels: Function that opens the reduced copies that can be read in parts, from fine to coarse. It raises
            `ImageError` if they contradict the image.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    fill: Callable[[NDArray[Any]], None]
    read_part: ReadPart | None = None
    facts: PixelFacts = field(default_factory=PixelFacts)
    pixel_size: float | None = None
    several: str | None = None
    choose: bool = False
    levels: Callable[[], tuple[Level, ...]] = tuple

    @property
    def size(self) -> int:
        """Bytes of all decoded pixels."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def bytes_of(content: Content) -> bytes:
    """Return the bytes of a file. Raises `OSError`."""
    return content.read_bytes() if isinstance(content, Path) else content


@contextmanager
def naming_damage(name: str, kind: str) -> Iterator[list[str]]:
    """Turn what a decoder raises about damaged data into `ImageError`, and keep its own lines off the terminal.

    Errors of the file system and of a bucket pass.

    Args:
        name: Name of the file in messages.
        kind: Format of the file.

    Yields:
        The decoder's own lines, as they are logged.
    """
    lines: list[str] = []
    token = _lines.set(lines)
    try:
        yield lines
    except (ImageError, StorageError):
        raise
    except MemoryError as error:
        raise ImageError(f"Expected {name} to fit in memory; it does not. Cut it into tiles first.") from error
    except Exception as error:  # decoders raise many kinds of errors for damaged data
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"Expected a complete {kind} image in {name}; found a damaged one, or one of a kind that cannot be read: "
            f"{reason}. Save it again from its source."
        ) from error
    finally:
        _lines.reset(token)


def check_declared(name: str, size: int, stored: int, most: int) -> None:
    """Raise `ImageError` if a header declares more pixels than the compressed bytes can hold.

    Args:
        name: Name of the file in messages.
        size: Bytes of the decoded pixels.
        stored: Bytes of the compressed pixels.
        most: Largest number of decoded bytes per compressed byte that the compression reaches.
    """
    if size > most * (stored + 64):
        raise ImageError(
            f"Expected a complete image in {name}; its header declares {size:,} bytes of pixels, which its {stored:,} "
            "bytes of data cannot hold. The file is damaged: save it again from its source."
        )


def level_steps(whole: tuple[int, int], level: tuple[int, int], name: str) -> tuple[float, float]:
    """Return the pixels of an image per pixel of a reduced copy, by rows and by columns.

    Sides of copies are rounded: 1001 px reduced by 4 are 250 or 251. Where one whole number explains both sides, it is
    the step of both.

    Args:
        whole: Height and width of the image, px.
        level: Height and width of the copy, px.
        name: Name of the file in messages.

    Raises:
        ImageError: The copy is larger than the image, or has other proportions.
    """
    ratios = whole[0] / level[0], whole[1] / level[1]
    step = max(1, round(sum(ratios) / 2))
    if all(abs(side - full / step) <= 1 for full, side in zip(whole, level, strict=True)):
        return float(step), float(step)
    if min(ratios) < 1 or abs(1 / ratios[0] - 1 / ratios[1]) > 1 / whole[0] + 1 / whole[1]:
        raise ImageError(
            f"Expected levels of one pyramid in {name}; found an image of {whole[1]} x {whole[0]} px (width x height) "
            f"and a level of {level[1]} x {level[0]} px, which has other proportions. Save the image again from its "
            "source."
        )
    return ratios


def exif_orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8, in a block of EXIF data (a TIFF header and its tags); 1 if there is none."""
    order = {b"II": "little", b"MM": "big"}.get(exif[:2])
    if order is None:
        return 1

    def number(start: int, count: int) -> int:
        return int.from_bytes(exif[start : start + count], "little" if order == "little" else "big")

    first = number(4, 4)
    for entry in range(first + 2, first + 2 + 12 * min(number(first, 2), 512), 12):
        if number(entry, 2) == _ORIENTATION and number(entry + 2, 2) == _SHORT:
            return number(entry + 8, 2) if 1 <= number(entry + 8, 2) <= 8 else 1
    return 1


def seen_pixels(pixels: NDArray[Any], facts: PixelFacts, name: str) -> NDArray[Any]:
    """Return the colours of stored pixels as eyes see them.

    Palettes are applied, 0 is black, 2 to 7 bits fill 8 bits; alpha and extra channels are left out.

    Args:
        pixels: Stored pixels, h x w x C.
        facts: What they mean.
        name: Name of the file in messages.

    Returns:
        h x w x 1 (grey) or h x w x 3 (RGB), otherwise in the depth of the file.

    Raises:
        ImageError: The palette lacks colours that are used.
    """
    if facts.palette is not None:
        return _painted(pixels[..., 0], facts.palette, name)
    return seen_channels(pixels[..., : facts.colours], facts)


def seen_channels(channels: NDArray[Any], facts: PixelFacts) -> NDArray[Any]:
    """Return stored colour channels as brightness: 0 is black, and 2 to 7 bits fill 8 bits."""
    if facts.white_is_zero:
        channels = _inverted(channels, facts.bits)
    if 1 < facts.bits < 8 and channels.dtype == np.uint8:
        levels = np.arange(1 << facts.bits) * 255 / ((1 << facts.bits) - 1)
        channels = np.rint(levels).astype(np.uint8)[channels]
    return channels


def _inverted(channels: NDArray[Any], bits: int) -> NDArray[Any]:
    if channels.dtype.kind == "u":
        return np.asarray(channels.dtype.type((1 << bits) - 1) - channels)
    return np.asarray(-channels if channels.dtype.kind == "f" else ~channels)


def _painted(indices: NDArray[Any], palette: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Return 8-bit colours: h x w x 1 if all colours of the palette are grey, else h x w x 3."""
    if indices.max(initial=0) >= len(palette):
        raise ImageError(
            f"Expected a palette of all colours in {name}; found colour {indices.max()} of {len(palette)}. "
            "Save it again from its source."
        )
    colours = palette if palette.max() <= 255 else palette >> 8  # some writers fill 16 bits, some do not
    grey = (colours == colours[:, :1]).all()
    indices = indices.view(np.uint8) if indices.dtype == np.bool_ else indices
    return np.asarray((colours[:, :1] if grey else colours).astype(np.uint8)[indices])


def memory_part(array: NDArray[Any]) -> ReadPart:
    """Return the function that reads parts of an array in memory."""
    return lambda rows, columns: array[rows, columns]


def temporary_pages(size: int, prefix: str, folder: Path | None = None) -> mmap.mmap:
    """Map a temporary file of zeros, which is removed when the map is no longer referenced.

    Args:
        size: Bytes.
        prefix: Begin of the name of the file.
        folder: Folder of the file; None for that of temporary files.

    Raises:
        OSError: The disk has no room for it, or the folder cannot be written.
    """
    with tempfile.TemporaryFile(prefix=prefix, dir=folder) as file:
        take_room(file.fileno(), size)
        return mmap.mmap(file.fileno(), size)


def unpacked_part(file: PixelFile) -> ReadPart:
    """Return a function that reads parts of a file from a temporary file, to which it is unpacked at the first use.

    The pixels are in pages of the temporary file, which the system can write out whenever it needs memory.
    """
    whole = lru_cache(maxsize=1)(lambda: _unpacked(file))

    def read(rows: slice, columns: slice) -> NDArray[Any]:
        array, backing = whole()
        part = array[rows, columns].copy()
        free_pages(backing)
        return part

    return read


def temporary_array(shape: tuple[int, ...], dtype: DTypeLike, name: str) -> tuple[NDArray[Any], mmap.mmap]:
    """Return an array of zeros in a temporary file, whose pages the system can write out whenever it needs memory.

    Args:
        shape: Shape of the array.
        dtype: Its type.
        name: Name of the image in messages.

    Returns:
        The array, and the map of the file that it lies in.

    Raises:
        ImageError: The disk has no room for it.
    """
    size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    try:
        pages = temporary_pages(size, "nucleus-pixels-")
    except OSError as error:
        raise ImageError(
            f"Expected {size:,} free bytes in {tempfile.gettempdir()} to unpack {name}; {error.strerror}. "
            "Free space there, or set TMPDIR to a folder that has it."
        ) from error
    return np.frombuffer(pages, dtype).reshape(shape), pages


def _unpacked(file: PixelFile) -> tuple[NDArray[Any], mmap.mmap]:
    array, pages = temporary_array(file.shape, file.dtype, file.name)
    file.fill(array)
    return array, pages
