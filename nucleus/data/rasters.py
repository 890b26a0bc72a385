"""Decoders of PNG, JPEG, WebP and BMP: the header is read here, the pixels by imagecodecs or, for BMP, by NumPy.

Stored values are kept: palettes are not applied, few bits are not scaled, EXIF does not turn, alpha does not multiply.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from nucleus.data.pixel_files import (
    Content,
    PixelFacts,
    PixelFile,
    bytes_of,
    check_declared,
    exif_orientation,
    naming_damage,
)
from nucleus.errors import ImageError

__all__ = ["open_bmp", "open_jpeg", "open_png", "open_webp"]

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_NEEDED = frozenset({b"IHDR", b"PLTE", b"IDAT"})
_GREY, _PALETTE = 0, 3
_DEFLATE_MOST = 1100
"""Deflate reaches 1032 bytes from one."""
_JPEG_MOST = 4096
_JPEG_FRAMES = {0xC0: True, 0xC1: True, 0xC2: True, 0xC3: False, 0xC9: True, 0xCA: True}
"""Markers of the frames that the decoder reads: baseline, extended, progressive, lossless, arithmetic; if lossy."""
_JPEG_OTHER_FRAMES = frozenset({0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7})
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers without a length: restarts, and the start of an image."""
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_EXIF = b"Exif\0\0"
_BMP_MASKS = (0xFF0000, 0xFF00, 0xFF)
_BMP_COMPRESSIONS = {1: "run lengths (RLE8)", 2: "run lengths (RLE4)", 4: "JPEG", 5: "PNG"}


def open_png(content: Content, name: str) -> PixelFile:
    """Read the header of a PNG file. Raises `ImageError`, `OSError`."""
    with naming_damage(name, "PNG"):
        data = bytes_of(content)
        chunks = list(_png_chunks(data, name))
        width, height, bits, kind, *_ = struct.unpack(">IIBBBBB", _first(chunks, b"IHDR"))
        channels = _PNG_CHANNELS[kind]
        pixels = [chunk for what, chunk in chunks if what == b"IDAT"]
        facts = PixelFacts(
            colours=3 if kind & ~4 == 2 else 1,
            bits=bits,
            alpha=channels - 1 if kind & 4 else None,
            palette=_png_palette(chunks) if kind == _PALETTE else None,
            pages=max(1, int.from_bytes(_first(chunks, b"acTL")[:4], "big")),
            orientation=exif_orientation(_first(chunks, b"eXIf")),
        )
        check_declared(name, height * ((width * channels * bits + 7) // 8), sum(map(len, pixels)), _DEFLATE_MOST)

    def fill(out: NDArray[Any]) -> None:
        with naming_damage(name, "PNG"):
            _fill_png(_bare_png(width, height, bits, kind, chunks), bits, kind, out)

    return PixelFile(
        name=name, shape=(height, width, channels), dtype=_dtype_of(bits), fill=fill, facts=facts,
        several=_frames(facts.pages, name),
    )  # fmt: skip


def _frames(count: int, name: str) -> str | None:
    """Return why an animation is not a single image; None if it has one frame."""
    if count == 1:
        return None
    return f"Expected one image in {name}; found an animation of {count} frames. Save each as a separate file."


def _png_chunks(data: bytes, name: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and data of each chunk. Raises `ImageError` if the file ends before its last one."""
    view = memoryview(data)
    at = len(_PNG_START)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if at + 12 + length > len(data):
            break
        chunk = bytes(view[at + 8 : at + 8 + length])
        if kind in _PNG_NEEDED and zlib.crc32(kind + chunk) != int.from_bytes(view[at + 8 + length :][:4], "big"):
            raise ImageError(f"Expected a PNG image in {name}; found a damaged image: a wrong sum. Copy it again.")
        yield kind, chunk
        if kind == b"IEND":
            return
        at += 12 + length
    raise ImageError(
        f"Expected a complete PNG image in {name}; found a damaged image that ends after {len(data):,} bytes. Copy it "
        "again."
    )


def _first(chunks: list[tuple[bytes, bytes]], kind: bytes) -> bytes:
    return next((data for what, data in chunks if what == kind), b"")


def _png_palette(chunks: list[tuple[bytes, bytes]]) -> NDArray[np.uint8]:
    return np.frombuffer(_first(chunks, b"PLTE"), np.uint8).reshape(-1, 3)


def _dtype_of(bits: int) -> np.dtype[Any]:
    return np.dtype(np.bool_ if bits == 1 else np.uint8 if bits <= 8 else np.uint16)


def _bare_png(width: int, height: int, bits: int, kind: int, chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Return the PNG without what changes values when it is decoded: palette, transparent colour, animation.

    The indices of a palette image are read as grey values of the same number of bits.
    """
    methods = _first(chunks, b"IHDR")[10:13]
    header = struct.pack(">IIBB", width, height, bits, _GREY if kind == _PALETTE else kind) + methods
    kept = [(b"IHDR", header), *((what, data) for what, data in chunks if what == b"IDAT"), (b"IEND", b"")]
    return _PNG_START + b"".join(
        struct.pack(">I", len(data)) + what + data + struct.pack(">I", zlib.crc32(what + data)) for what, data in kept
    )


def _fill_png(data: bytes, bits: int, kind: int, out: NDArray[Any]) -> None:
    decoded = out.view(np.uint8) if bits == 1 else out
    imagecodecs.png_decode(data, out=decoded[..., 0] if out.shape[2] == 1 else decoded)
    if bits < 8 and kind in {_GREY, _PALETTE}:  # the decoder fills 8 bits
        np.floor_divide(decoded, 255 // ((1 << bits) - 1), out=decoded)


def open_jpeg(content: Content, name: str) -> PixelFile:
    """Read the header of a JPEG file. Raises `ImageError`, also for CMYK inks; `OSError`."""
    with naming_damage(name, "JPEG"):
        data = bytes_of(content)
        orientation, frame, lossy = 1, b"", True
        for marker, segment in _jpeg_segments(data, name):
            if marker in _JPEG_FRAMES and not frame:
                frame, lossy = segment, _JPEG_FRAMES[marker]
            if marker in _JPEG_OTHER_FRAMES:
                raise ImageError(f"Expected a JPEG image in {name}; found JPEG of a rare kind (marker {marker:X}).")
            if marker == 0xE1 and segment.startswith(_EXIF) and orientation == 1:
                orientation = exif_orientation(segment[len(_EXIF) :])
        bits, height, width, channels = struct.unpack_from(">BHHB", frame)
        _check_jpeg_channels(channels, name)
        check_declared(name, height * width * channels, len(data), _JPEG_MOST)

    def fill(out: NDArray[Any]) -> None:
        with naming_damage(name, "JPEG"):
            imagecodecs.jpeg8_decode(data, out=out[..., 0] if channels == 1 else out)

    return PixelFile(
        name=name, shape=(height, width, channels), dtype=_dtype_of(bits), fill=fill,
        facts=PixelFacts(colours=channels, bits=bits, lossy=lossy, orientation=orientation),
    )  # fmt: skip


def _check_jpeg_channels(channels: int, name: str) -> None:
    if channels not in {1, 3}:
        found = "CMYK inks" if channels == 4 else f"{channels} channels"
        raise ImageError(f"Expected grey or RGB pixels in {name}; found {found}. Save it as RGB.")


def _jpeg_segments(data: bytes, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield marker and content of the segments of the first image in a JPEG file, without its entropy-coded data.

    Raises:
        ImageError: The file ends before the image does; the decoder would fill the rest with grey.
    """
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker, at = data[found.end() - 1], found.end()
        if marker == 0xD9:
            return
        if marker not in _JPEG_ALONE:
            length = int.from_bytes(data[at : at + 2], "big")
            yield marker, data[at + 2 : at + length]
            at += max(2, length)
    raise ImageError(
        f"Expected a complete JPEG image in {name}; found a damaged image that ends after {len(data):,} bytes. Copy it "
        "again."
    )


def open_webp(content: Content, name: str) -> PixelFile:
    """Read the header of a WebP file. Raises `ImageError`, `OSError`."""
    with naming_damage(name, "WebP"):
        data = bytes_of(content)
        chunks = dict(reversed(list(_webp_chunks(data))))
        height, width, alpha = _webp_size(chunks)
        frames = sum(kind == b"ANMF" for kind, _ in _webp_chunks(data))
        exif = chunks.get(b"EXIF", b"")
        facts = PixelFacts(
            colours=3,
            alpha=3 if alpha else None,
            lossy=b"VP8 " in chunks,
            pages=max(1, frames),
            orientation=exif_orientation(exif.removeprefix(_EXIF)),
        )

    def fill(out: NDArray[Any]) -> None:
        with naming_damage(name, "WebP"):
            imagecodecs.webp_decode(data, hasalpha=alpha, out=out)

    return PixelFile(
        name=name, shape=(height, width, 4 if alpha else 3), dtype=np.dtype(np.uint8), fill=fill, facts=facts,
        several=_frames(facts.pages, name),
    )  # fmt: skip


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        yield kind, data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def _webp_size(chunks: dict[bytes, bytes]) -> tuple[int, int, bool]:
    """Return height, width, and whether there is an alpha channel."""
    if extended := chunks.get(b"VP8X"):
        width, height = (int.from_bytes(extended[at : at + 3], "little") + 1 for at in (4, 7))
        return height, width, bool(extended[0] & 16)
    if lossless := chunks.get(b"VP8L"):
        packed = int.from_bytes(lossless[1:5], "little")
        return (packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1, bool(packed >> 28 & 1)
    width, height = struct.unpack_from("<HH", chunks[b"VP8 "], 6)
    return height & 0x3FFF, width & 0x3FFF, False


def open_bmp(content: Content, name: str) -> PixelFile:
    """Read the header of a BMP file of 1, 4, 8, 24 or 32 bits. Raises `ImageError`, `OSError`."""
    with naming_damage(name, "BMP"):
        data = bytes_of(content)
        start, size = struct.unpack_from("<II", data, 10)
        sizes = "<HHHH" if size == 12 else "<iiHH"
        width, rows, _, bits = struct.unpack_from(sizes, data, 18)
        compression = 0 if size == 12 else struct.unpack_from("<I", data, 30)[0]
        alpha = _check_bmp(data, bits, compression, size, name)
        height, stride = abs(rows), (width * bits + 31) // 32 * 4
        if width <= 0 or height <= 0 or start + height * stride > len(data):
            raise ImageError(
                f"Expected a complete BMP image in {name}; found a damaged image: {len(data):,} bytes for "
                f"{width} x {height} px of {bits} bits. Copy it again."
            )
        palette = _bmp_palette(data[14 + size : start], bits, 3 if size == 12 else 4) if bits <= 8 else None
        channels = 1 if bits <= 8 else 4 if alpha else 3

    def fill(out: NDArray[Any]) -> None:
        stored = np.frombuffer(data, np.uint8, height * stride, start).reshape(height, stride)
        out[...] = _BMP_PIXELS[bits](stored[::-1] if rows > 0 else stored, width, channels)

    return PixelFile(
        name=name, shape=(height, width, channels), dtype=_dtype_of(bits if bits < 8 else 8), fill=fill,
        facts=PixelFacts(
            colours=min(channels, 3), bits=min(bits, 8), alpha=3 if alpha else None, palette=palette
        ),
    )  # fmt: skip


def _check_bmp(data: bytes, bits: int, compression: int, size: int, name: str) -> bool:
    """Return whether there is an alpha channel. Raises `ImageError` for a kind of BMP that is not read."""
    masks = struct.unpack_from("<IIII", data, 54) if compression in {3, 6} else (*_BMP_MASKS, 0)
    plain = compression == 0 or (compression in {3, 6} and bits == 32 and masks[:3] == _BMP_MASKS)
    if bits not in _BMP_PIXELS or not plain:
        found = _BMP_COMPRESSIONS.get(compression, f"{bits} bits per pixel, compression {compression}")
        raise ImageError(f"Expected a BMP of 1, 4, 8, 24 or 32 bits in {name}; found {found}. Save it as PNG.")
    return masks[3] == 0xFF000000 and size >= 56


def _bmp_palette(data: bytes, bits: int, width: int) -> NDArray[np.uint8] | None:
    """Return the RGB colours of a palette; None if they are the grey values that the indices stand for."""
    count = min(len(data) // width, 1 << bits)
    colours = np.frombuffer(data, np.uint8, count * width).reshape(count, width)[:, 2::-1]
    ramp = np.arange(1 << bits) * 255 // ((1 << bits) - 1)
    return None if count == len(ramp) and (colours == ramp[:, np.newaxis]).all() else colours


def _bmp_few_bits(stored: NDArray[np.uint8], width: int, bits: int) -> NDArray[np.uint8]:
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    values = stored[..., np.newaxis] >> shifts & np.uint8((1 << bits) - 1)
    return values.reshape(len(stored), -1)[:, :width, np.newaxis]


def _bmp_colours(stored: NDArray[np.uint8], width: int, channels: int, step: int) -> NDArray[np.uint8]:
    pixels = stored[:, : width * step].reshape(len(stored), width, step)
    return pixels[..., [2, 1, 0, 3][:channels]]


_BMP_PIXELS: dict[int, Callable[[NDArray[np.uint8], int, int], NDArray[Any]]] = {
    1: lambda stored, width, _: _bmp_few_bits(stored, width, 1).astype(np.bool_),
    4: lambda stored, width, _: _bmp_few_bits(stored, width, 4),
    8: lambda stored, width, _: stored[:, :width, np.newaxis],
    24: lambda stored, width, channels: _bmp_colours(stored, width, channels, 3),
    32: lambda stored, width, channels: _bmp_colours(stored, width, channels, 4),
}
