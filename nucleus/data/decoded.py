"""Decoded images on the local disk, so that a crop touches its own pixels only, not the whole PNG of its image.

Beside a cached shard lies a file of its decoded records. A record is written when it is first needed, by whichever
process of the machine needs it; its entry, with checksums, is written last. So a process never waits for others, and
what a dead process or a full disk left behind is not used. A process compares a record's checksum before it first reads
it. With a record stands what follows from the whole image: the table of the normalization that was asked for last.

The file: a header, an entry per record, and the records at places that follow from the sizes in the manifest. Of a
record first the image is stored, then its labels, each in strips of 512 columns, so that a window is read in few calls.
Images whose channels are equal have one channel.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import NormalizationOptions
from nucleus.data.augmentation import Pixels, ReadWindow
from nucleus.data.images import LabelImage, RgbImage
from nucleus.data.normalization import intensity_sample, normalization_table
from nucleus.data.shards import ShardFile, decode_record, read_at, write_at
from nucleus.errors import IntegrityError
from nucleus.storage.files import is_full

__all__ = ["DecodedFile", "DecodedSample", "decoded_bytes", "decoded_image", "decoded_sample", "sample_of_record"]

_log = logging.getLogger(__name__)

_MAGIC = b"nucleus decoded1"
_HEADER = struct.Struct("<16s16s32sI")  # magic, a random mark of the file, SHA-256 of the shard, number of records
_FACTS = struct.Struct("<IIII")  # height, width, channels, checksum of the pixels
_TABLE = struct.Struct("<16s256s")  # digest of the normalization, table
_CHECKSUM = struct.Struct("<I")
_FACTS_BYTES = _FACTS.size + _CHECKSUM.size
_TABLE_BYTES = _TABLE.size + _CHECKSUM.size
_ENTRY_BYTES = _FACTS_BYTES + _TABLE_BYTES
_RGB, _LABEL_BYTES = 3, 2
_STRIP = 512

# Which records of a file this process has verified, by the mark of the file.
_verified: dict[bytes, bytearray] = {}


@dataclass(frozen=True)
class DecodedSample:
    """A record whose pixels can be read.

    Attributes:
        shape: Height and width.
        table: Normalized value of each value of the image, 256, uint8.
        read: Reads a window.
    """

    shape: tuple[int, int]
    table: NDArray[np.uint8]
    read: ReadWindow


def decoded_sample(shard: ShardFile, record: int, normalization: NormalizationOptions) -> DecodedSample:
    """Return a record of a shard, from the file of its decoded records if it has one, which may write it there.

    Raises:
        IntegrityError: The record is damaged, or has not the size that the manifest states.
    """
    file = shard.pixels
    if file is None:
        return sample_of_record(shard.read(record), normalization)
    digest = _digest(normalization)
    facts, table = file.find(record, digest)
    if facts is None:
        image, labels = _decoded(shard.read(record))
        table = _table_of(image, normalization)
        file.write(record, image, labels)
        file.write_table(record, digest, table)
        return _in_memory(image, labels, table)
    if table is None:
        image, _ = file.window(record, facts, slice(0, facts.height), slice(0, facts.width))
        table = _table_of(image, normalization)
        file.write_table(record, digest, table)
    return DecodedSample((facts.height, facts.width), table, partial(file.window, record, facts))


def decoded_image(shard: ShardFile, record: int, name: str) -> tuple[RgbImage, LabelImage]:
    """Return a whole record of a shard, from the file of its decoded records if it has one, which may write it there.

    Args:
        shard: The shard.
        record: Number of the record in it.
        name: Name of the image by the manifest.

    Returns:
        Image, H x W x 3, and labels, H x W.

    Raises:
        IntegrityError: The record is damaged, or has not the name or the size that the manifest states.
    """
    file = shard.pixels
    facts = None if file is None else file.facts(record)
    if file is None or facts is None:
        found, image, labels = decode_record(shard.read(record))
        if found != name:
            raise IntegrityError(
                f"Expected the image {name!r} as record {record} of {shard.name}, as the manifest of the dataset "
                f"states; found {found!r}. Import the images again."
            )
        if file is not None:
            file.write(record, _reduced(image), labels)
        return image, labels
    pixels, labels = file.window(record, facts, slice(0, facts.height), slice(0, facts.width))
    return np.repeat(pixels[..., np.newaxis], _RGB, axis=2) if pixels.ndim == 2 else pixels.copy(), labels.copy()


def sample_of_record(data: bytes, normalization: NormalizationOptions) -> DecodedSample:
    """Return a record that is in memory. Raises `IntegrityError` if it is damaged."""
    image, labels = _decoded(data)
    return _in_memory(image, labels, _table_of(image, normalization))


def _decoded(data: bytes) -> tuple[Pixels, LabelImage]:
    """Return image (H x W if it is grey, else H x W x 3) and labels of a record."""
    _, image, labels = decode_record(data)
    return _reduced(image), labels


def _reduced(image: RgbImage) -> Pixels:
    """Return one channel of an image whose channels are equal, else the image."""
    grey = bool((image[..., 1:] == image[..., :1]).all())
    return np.ascontiguousarray(image[..., 0]) if grey else image


def _in_memory(image: Pixels, labels: LabelImage, table: NDArray[np.uint8]) -> DecodedSample:
    return DecodedSample(labels.shape, table, lambda rows, columns: (image[rows, columns], labels[rows, columns]))


def _table_of(image: Pixels, normalization: NormalizationOptions) -> NDArray[np.uint8]:
    if normalization.method == "none":
        return np.arange(256, dtype=np.uint8)
    pixels = image[..., np.newaxis] if image.ndim == 2 else image
    return normalization_table(intensity_sample(pixels), normalization)


@lru_cache(maxsize=8)
def _digest(normalization: NormalizationOptions) -> bytes:
    return hashlib.sha256(normalization.model_dump_json().encode()).digest()[: _TABLE.size - 256]


@dataclass(frozen=True)
class Facts:
    """Height, width and channels (1 or 3) of a stored image."""

    height: int
    width: int
    channels: int


class DecodedFile:
    """An open file of the decoded records of a shard. It is closed when the object is no longer referenced.

    Args:
        descriptor: Descriptor of the file, opened for reading and writing, which this object owns.
        sizes: Height and width of each record, N x 2.

    Raises:
        IntegrityError: The file is not one of these records.
    """

    def __init__(self, descriptor: int, sha256: str, sizes: NDArray[np.int64]) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._sizes = sizes
        self._ends = _ends(sizes)
        header = read_at(descriptor, _HEADER.size, 0)
        if not _is_header(header, sha256, len(sizes)) or os.fstat(descriptor).st_size != decoded_bytes(sizes):
            raise IntegrityError("Expected decoded records of this shard in the cache; the file is another one.")
        mark = _HEADER.unpack(header)[1]
        self._verified = _verified.setdefault(mark, bytearray(len(sizes)))
        self._known: dict[int, tuple[bytes, Facts, NDArray[np.uint8]]] = {}
        self._is_full = False

    @staticmethod
    def create(descriptor: int, sha256: str, sizes: NDArray[np.int64]) -> None:
        """Write the header of a new file, which has its final size already."""
        write_at(descriptor, _HEADER.pack(_MAGIC, os.urandom(16), bytes.fromhex(sha256), len(sizes)), 0)

    def find(self, record: int, digest: bytes) -> tuple[Facts | None, NDArray[np.uint8] | None]:
        """Find a record and its table.

        Returns:
            Size and channels, None if the record was not written or is damaged; and its table, None if that of other
            options was stored last.
        """
        known = self._known.get(record)
        if known is not None and known[0] == digest:
            return known[1:]
        entry = read_at(self._descriptor, _ENTRY_BYTES, self._entry(record))
        facts = self._verified_facts(record, _checked(entry[:_FACTS_BYTES]))
        found = _checked(entry[_FACTS_BYTES:])
        stored, table = _TABLE.unpack(found) if found else (b"", b"")
        if facts is None or stored != digest:
            return facts, None
        self._known[record] = digest, facts, np.frombuffer(table, np.uint8)
        return self._known[record][1:]

    def facts(self, record: int) -> Facts | None:
        """Return size and channels of a record, None if it was not written or is damaged."""
        return self._verified_facts(record, _checked(read_at(self._descriptor, _FACTS_BYTES, self._entry(record))))

    def _verified_facts(self, record: int, found: bytes | None) -> Facts | None:
        if found is None:
            return None
        height, width, channels, checksum = _FACTS.unpack(found)
        if not self._verified[record]:
            pixels = read_at(self._descriptor, height * width * (channels + _LABEL_BYTES), self._start(record))
            if google_crc32c.value(pixels) != checksum:
                return None
            self._verified[record] = 1
        return Facts(height, width, channels)

    def write(self, record: int, image: Pixels, labels: LabelImage) -> None:
        """Store a record. On a full disk it is left out.

        Raises:
            IntegrityError: It has not the size that the manifest states.
        """
        if labels.shape != tuple(self._sizes[record]):
            raise IntegrityError(
                f"Expected an image of {self._sizes[record][0]} x {self._sizes[record][1]} px, as the manifest of the "
                f"dataset states; its record has {labels.shape[0]} x {labels.shape[1]} px. Import the images again."
            )
        pixels = b"".join([*_strips(image), *_strips(labels)])
        channels = 1 if image.ndim == 2 else _RGB
        facts = _FACTS.pack(*labels.shape, channels, google_crc32c.value(pixels))
        self._put(pixels, self._start(record))
        self._put(_with_checksum(facts), self._entry(record))

    def write_table(self, record: int, digest: bytes, table: NDArray[np.uint8]) -> None:
        """Store the table of a record."""
        self._put(_with_checksum(_TABLE.pack(digest, table.tobytes())), self._entry(record) + _FACTS_BYTES)

    def window(self, record: int, facts: Facts, rows: slice, columns: slice) -> tuple[Pixels, LabelImage]:
        """Return image (h x w if it is grey, else h x w x 3) and labels of a window of a record."""
        start = self._start(record)
        colours = () if facts.channels == 1 else (facts.channels,)
        image = self._read(start, np.dtype((np.uint8, colours)), facts, rows, columns)
        labels_start = start + facts.height * facts.width * facts.channels
        return image, self._read(labels_start, np.dtype("<u2"), facts, rows, columns)

    def _read(self, start: int, pixel: np.dtype[Any], facts: Facts, rows: slice, columns: slice) -> NDArray[Any]:
        """Return the pixels of a window from the strips that begin at `start`."""
        parts = []
        for left in range(columns.start // _STRIP * _STRIP, columns.stop, _STRIP):
            width = min(_STRIP, facts.width - left)
            offset = start + (left * facts.height + rows.start * width) * pixel.itemsize
            count = (rows.stop - rows.start) * width
            found = np.frombuffer(read_at(self._descriptor, count * pixel.itemsize, offset), pixel, count)
            found = found.reshape(rows.stop - rows.start, width, *pixel.shape)
            parts.append(found[:, max(columns.start - left, 0) : columns.stop - left])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _start(self, record: int) -> int:
        before = int(self._ends[record - 1]) if record else 0
        return _HEADER.size + _ENTRY_BYTES * len(self._sizes) + before

    def _entry(self, record: int) -> int:
        return _HEADER.size + _ENTRY_BYTES * record

    def _put(self, data: bytes, offset: int) -> None:
        if self._is_full:
            return
        try:
            write_at(self._descriptor, data, offset)
        except OSError as error:
            if not is_full(error):
                raise
            self._is_full = True
            _log.warning("No room on the disk for decoded images; they are decoded for every crop, which takes longer.")


def decoded_bytes(sizes: NDArray[np.int64]) -> int:
    """Return the largest size of the file for records of these sizes (N x 2), bytes: that for colours."""
    return _HEADER.size + _ENTRY_BYTES * len(sizes) + int(_ends(sizes)[-1])


def _ends(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(sizes[:, 0] * sizes[:, 1] * (_RGB + _LABEL_BYTES))


def _is_header(header: bytes, sha256: str, records: int) -> bool:
    if len(header) != _HEADER.size:
        return False
    magic, _, shard, count = _HEADER.unpack(header)
    return bool(magic == _MAGIC and shard.hex() == sha256 and count == records)


def _strips(pixels: NDArray[np.generic]) -> Sequence[bytes]:
    little = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)
    return [little[:, left : left + _STRIP].tobytes() for left in range(0, pixels.shape[1], _STRIP)]


def _with_checksum(data: bytes) -> bytes:
    return data + _CHECKSUM.pack(google_crc32c.value(data))


def _checked(data: bytes) -> bytes | None:
    """Return data whose checksum is right, without it; None if it is wrong. Nothing but zeros was never written."""
    content = data[: -_CHECKSUM.size]
    right = _CHECKSUM.pack(google_crc32c.value(content)) == data[-_CHECKSUM.size :]
    return content if right and any(content) else None
