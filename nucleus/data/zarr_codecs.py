"""How the chunks of a Zarr array are packed: only numbers, known codecs, and chunks that unpack to what they should be.

Metadata may lie, and a packed chunk of some kilobytes may unpack to gigabytes. So both are looked at before zarr-python
decodes anything.
"""

import bz2
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import imagecodecs
import numpy as np

from nucleus.errors import ImageError

__all__ = ["ChunkPacking", "Span", "chunk_packing"]

Span = tuple[int | None, int | None]
"""Bytes of an object from a start to before a stop; (None, n) are the last n bytes, (n, None) those from n."""

Packed = bytes | memoryview

_LARGEST_CHUNK = 1 << 29
"""Bytes of a decoded chunk, which is decoded as a whole."""
_MOST_IN_SHARD = 1 << 20
"""Chunks in a shard, whose places are read as a whole."""
_LONGEST_SIDE, _MOST_PIXELS = 1 << 31, 1 << 40
_TYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}
_TYPES |= {"float16", "float32", "float64"}
_KINDS = {"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"}
_PACKINGS = {"blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"}
_FILTERS = {
    *("adler32", "astype", "bitround", "crc32", "crc32c", "delta", "fixedscaleoffset", "fletcher32", "packbits"),
    *("quantize", "shuffle"),
}
"""Codecs of Zarr v2 that make bytes of bytes or numbers of numbers; not `pickle`, and not those of objects."""
_SHARDS = "sharding_indexed"
_CODECS = {"blosc", "bytes", "crc32c", "gzip", _SHARDS, "transpose", "zstd"}
_CODECS |= {f"numcodecs.{name}" for name in _PACKINGS | _FILTERS}
"""Codecs of Zarr v3."""
_OF_INDEX = {"bytes", "crc32c"}
_MOST_BY_FILTER = 8
"""How many times more bytes filters may make of a chunk, as of bits; with some for sums."""
_DEFLATE_MOST = 1100
_CHECKED_PART = 1 << 20
_ABSENT = np.iinfo(np.uint64).max


@dataclass(frozen=True)
class ChunkPacking:
    """How the chunks of an array are stored.

    Attributes:
        size: Bytes of a decoded chunk.
        packing: Name of its compression; None without.
        filtered: Whether other codecs change the number of bytes.
        sums: Number of checksums of 4 bytes at the end of a chunk.
        in_shard: Number of chunks in a stored object; None if each is an object of its own.
        index_first: Whether the places of the chunks in a shard are at its start.
        index_sums: Number of checksums of 4 bytes after these places.
    """

    size: int
    packing: str | None = None
    filtered: bool = False
    sums: int = 0
    in_shard: int | None = None
    index_first: bool = False
    index_sums: int = 0

    def check(self, data: bytes, span: Span | None, where: str) -> None:
        """Check stored bytes before they are decoded.

        Args:
            data: Bytes of an object: a chunk, a shard, or a span of a shard.
            span: The span; None for all bytes.
            where: Name of the object in messages.

        Raises:
            ImageError: A chunk unpacks to another size than the metadata say.
        """
        for part in self._chunks(data, span):
            most = _MOST_BY_FILTER * self.size + 64 if self.filtered else self.size
            found = _unpacked_size(self.packing, part[: len(part) - 4 * self.sums], most)
            if found is not None and (found > most or (found < self.size and not self.filtered)):
                raise ImageError(
                    f"Expected a chunk of {self.size:,} bytes in {where}, as the metadata of the array say; it unpacks "
                    f"to {found:,}{' or more' if found > most else ''}. Copy the Zarr again from its source."
                )

    def _chunks(self, data: bytes, span: Span | None) -> Iterator[Packed]:
        """Yield the packed chunks in bytes that were read; a read of the places in a shard has none."""
        if self.in_shard is None or (span is not None and not self._is_index(span)):
            yield memoryview(data)
        elif span is None:
            size = 16 * self.in_shard
            stop = len(data) - 4 * self.index_sums
            index = data[:size] if self.index_first else data[max(0, stop - size) : stop]
            places = np.frombuffer(index[: len(index) // 16 * 16], "<u8").reshape(-1, 2)
            for start, length in places[places[:, 0] != _ABSENT].tolist():
                yield memoryview(data)[start : start + length]

    def _is_index(self, span: Span) -> bool:
        return span[0] == 0 if self.index_first else span[0] is None


def chunk_packing(document: Mapping[str, Any], zarr_format: int, where: str) -> ChunkPacking:
    """Return how the chunks of an array are stored.

    Args:
        document: Metadata of the array, `.zarray` or `zarr.json`.
        zarr_format: Version of Zarr, 2 or 3.
        where: Name of the array in messages.

    Raises:
        ImageError: It is of other things than numbers, has a codec that is not read, or a shape that no image has.
    """
    return (_packing_v3 if zarr_format == 3 else _packing_v2)(document, where)


def _packing_v2(document: Mapping[str, Any], where: str) -> ChunkPacking:
    kind = document.get("dtype")
    if not isinstance(kind, str) or kind[1:] not in _KINDS or kind[0] not in "<>|":
        raise _refused(where, "numbers", f"type {kind!r}")
    packing, filters = document.get("compressor"), document.get("filters") or []
    names = _names([packing] if packing is not None else [], _PACKINGS, where, "id")
    changing = _names(filters, _FILTERS, where, "id")
    _check_shape(document.get("shape"), where)
    size = _size(document.get("chunks"), document.get("shape"), np.dtype(kind).itemsize, where)
    return ChunkPacking(size, names[0] if names else None, filtered=bool(changing))


def _packing_v3(document: Mapping[str, Any], where: str) -> ChunkPacking:
    kind = document.get("data_type")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise _refused(where, "numbers", f"type {kind!r}")
    grid = document.get("chunk_grid")
    if not isinstance(grid, dict) or grid.get("name") != "regular":
        raise _refused(where, "a regular grid of chunks", repr(grid))
    shape, item = document.get("shape"), np.dtype(kind).itemsize
    _check_shape(shape, where)
    stored = _configuration(grid).get("chunk_shape")
    names = _names(document.get("codecs"), _CODECS, where, "name")
    if _SHARDS not in names:
        return _packed_by(names, _size(stored, shape, item, where), where)
    if names != [_SHARDS]:
        raise _refused(where, "no other codecs beside shards", ", ".join(names))
    return _packing_in_shards(_configuration(document["codecs"][0]), _counts(stored, shape, where), item, where)


def _packing_in_shards(inside: Mapping[str, Any], shard: Sequence[int], item: int, where: str) -> ChunkPacking:
    index = _names(inside.get("index_codecs"), _OF_INDEX, where, "name")
    names = _names(inside.get("codecs"), _CODECS - {_SHARDS}, where, "name")
    chunk = _counts(inside.get("chunk_shape"), shard, where)
    count = prod(-(-side // part) for side, part in zip(shard, chunk, strict=True))
    if count > _MOST_IN_SHARD:
        raise _refused(where, f"at most {_MOST_IN_SHARD:,} chunks in a shard", f"{count:,}")
    packed = _packed_by(names, _size(chunk, shard, item, where), where)
    return ChunkPacking(
        packed.size,
        packed.packing,
        packed.filtered,
        packed.sums,
        in_shard=count,
        index_first=inside.get("index_location") == "start",
        index_sums=index.count("crc32c"),
    )


def _packed_by(names: Sequence[str], size: int, where: str) -> ChunkPacking:
    """Return the packing by these codecs of Zarr v3."""
    plain = [name.removeprefix("numcodecs.") for name in names]
    packings = [at for at, name in enumerate(plain) if name in _PACKINGS]
    if len(packings) > 1:
        raise _refused(where, "at most one compression", ", ".join(plain[at] for at in packings))
    after = plain[packings[0] + 1 :] if packings else []
    if set(after) - {"crc32c"}:
        raise _refused(where, "at most a checksum after the compression", ", ".join(after))
    before = plain[: packings[0]] if packings else [name for name in plain if name != "crc32c"]
    sums = len(after) if packings else plain.count("crc32c")
    filtered = any(name in _FILTERS for name in before)
    return ChunkPacking(size, plain[packings[0]] if packings else None, filtered, sums)


def _configuration(part: Any) -> Mapping[str, Any]:
    found = part.get("configuration") if isinstance(part, dict) else None
    return found if isinstance(found, dict) else {}


def _names(found: Any, known: set[str], where: str, key: str) -> list[str]:
    """Return the names of codecs. Raises `ImageError` unless all are known."""
    if not isinstance(found, list):
        raise _refused(where, "a list of codecs", repr(found))
    names = [str(codec.get(key)) if isinstance(codec, dict) else repr(codec) for codec in found]
    for name in names:
        if name not in known:
            raise _refused(where, f"codecs that are read ({', '.join(sorted(known))})", repr(name))
    raw = [codec for codec in found if lzma.FORMAT_RAW in (codec.get("format"), _configuration(codec).get("format"))]
    if raw:
        raise _refused(where, "LZMA with a head", "raw LZMA")
    return names


def _refused(where: str, expected: str, found: str) -> ImageError:
    return ImageError(f"Expected {expected} in the array {where}; found {found}. Save the image again as OME-Zarr.")


def _check_shape(shape: Any, where: str) -> None:
    if not _are_counts(shape, 0):
        raise _refused(where, "a shape of whole numbers", repr(shape))
    if max(shape, default=0) >= _LONGEST_SIDE or prod(shape[-2:]) > _MOST_PIXELS:
        raise _refused(
            where, f"sides below {_LONGEST_SIDE:,} and planes of at most {_MOST_PIXELS:,} px", "x".join(map(str, shape))
        )


def _are_counts(found: Any, least: int) -> bool:
    return isinstance(found, list | tuple) and all(type(each) is int and each >= least for each in found)


def _counts(chunk: Any, shape: Any, where: str) -> Sequence[int]:
    """Return the shape of a chunk. Raises `ImageError` unless it has the axes of its array, and whole numbers."""
    if not _are_counts(chunk, 1) or len(chunk) != len(shape):
        raise _refused(where, f"the sides of a chunk, as many as in {list(shape)}", repr(chunk))
    return list(chunk)


def _size(chunk: Any, shape: Any, item: int, where: str) -> int:
    """Return the bytes of a decoded chunk. Raises `ImageError` if it is too large."""
    sides = _counts(chunk, shape, where)
    size = prod(sides) * item
    if size > _LARGEST_CHUNK:
        raise ImageError(
            f"Expected chunks of at most {_LARGEST_CHUNK >> 20} MiB in {where}, because each is decoded as a whole; "
            f"found {'x'.join(map(str, sides))} of {item} bytes, {size >> 20} MiB. Save the image with smaller chunks."
        )
    return size


def _unpacked_size(packing: str | None, data: Packed, most: int) -> int | None:
    """Return the bytes that packed bytes make, counted to little more than `most`; None if it is for sure not more."""
    if packing is None:
        return len(data)
    if packing == "blosc":
        return int.from_bytes(data[4:8], "little")
    if packing == "lz4":
        return int.from_bytes(data[:4], "little")
    if packing == "zstd":
        stated = _zstd_size(data)
        return _counted_zstd(data, most) if stated is None else stated
    if packing in {"gzip", "zlib"} and len(data) * _DEFLATE_MOST <= max(most, _CHECKED_PART):
        return None
    return _counted(packing, data, most)


def _zstd_size(data: Packed) -> int | None:
    """Return the size that the head of a Zstandard frame states (RFC 8878, 3.1.1.1); None if it states none."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 6:
        return None
    flags = data[4]
    single, size = flags >> 5 & 1, (0, 2, 4, 8)[flags >> 6] or flags >> 5 & 1
    start = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    return int.from_bytes(data[start : start + size], "little") + (256 if size == 2 else 0) if size else None


def _counted_zstd(data: Packed, most: int) -> int | None:
    try:
        return len(imagecodecs.zstd_decode(bytes(data), out=most))
    except imagecodecs.ZstdError as error:  # damaged, which zarr-python tells; or too small a place for what there is
        return most + 1 if "small" in str(error) else None


def _counted(packing: str, data: Packed, most: int) -> int | None:
    """Return how many bytes packed bytes make, counted without keeping them; None if they are damaged."""
    total, rest = 0, data
    try:
        while len(rest) and total <= most:  # one member of several
            unpack = _unpacker(packing)
            part = unpack.decompress(rest, _CHECKED_PART)
            while part and total <= most:
                total += len(part)
                part = b"" if unpack.eof else unpack.decompress(getattr(unpack, "unconsumed_tail", b""), _CHECKED_PART)
            rest = unpack.unused_data
    except lzma.LZMAError as error:
        return most + 1 if "limit" in str(error) else None
    except (OSError, EOFError, zlib.error):
        return None
    return total


def _unpacker(packing: str) -> Any:
    if packing == "bz2":
        return bz2.BZ2Decompressor()
    if packing == "lzma":
        return lzma.LZMADecompressor(memlimit=_LARGEST_CHUNK)
    return zlib.decompressobj(31 if packing == "gzip" else 15)
