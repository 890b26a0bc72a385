"""TFRecord shards of images and labels: the format of a record, writing, and random access; without TensorFlow.

A record is a `tf.train.Example` with `name`, `image` (PNG, 8-bit RGB, original size) and `labels` (PNG, one channel of
16 bits, 0 background, 1..K nuclei).
"""

from __future__ import annotations

import os
import struct
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from nucleus.data.dataset import Shard
from nucleus.data.images import LabelImage, RgbImage, encode_png
from nucleus.data.sampling import shard_count, stored_order
from nucleus.errors import IntegrityError
from nucleus.storage.files import sha256_of, writing
from nucleus.surroundings import BINARY

if TYPE_CHECKING:
    from nucleus.data.decoded import DecodedFile

__all__ = [
    "RecordPlace",
    "ShardFile",
    "ShardPlan",
    "decode_record",
    "encode_record",
    "plan_shards",
    "read_at",
    "record_name",
    "renamed_record",
    "span_of_record",
    "unframed_record",
    "write_at",
    "write_planned",
    "write_shard",
]

# Framing of a TFRecord (tensorflow/core/lib/io/record_writer.h): length, its checksum, the record, its checksum.
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES = 12
_FOOTER_BYTES = 4
_MASK = 0xA282EAD8
_FIELDS = ("name", "image", "labels")


@dataclass(frozen=True, slots=True)
class RecordPlace:
    """Where a record is, for an import that makes shards of it.

    Attributes:
        file: Path of a file, or key of an object.
        start: Number of bytes before it there.
        size: Its size, bytes.
        named: Whether it has its name; one that was just made has an empty one.
    """

    file: str
    start: int
    size: int
    named: bool = False


@dataclass(frozen=True)
class ShardPlan:
    """A shard that is to be written.

    Attributes:
        file: File name, as that of `Shard`.
        split: `train`, `val` or `test`.
        records: Place and name of each record, in the order of the shard.
    """

    file: str
    split: str
    records: tuple[tuple[RecordPlace, str], ...]

    @property
    def size(self) -> int:
        """Bytes of the records as they are, without their names and frames."""
        return sum(place.size for place, _ in self.records)


def encode_record(name: str, image: RgbImage, labels: LabelImage) -> bytes:
    """Return a record of a shard; the same bytes for the same input."""
    return _record((name.encode(), encode_png(image), encode_png(labels)))


def renamed_record(data: bytes, name: str) -> bytes:
    """Return a record with another name. Raises `IntegrityError` if it is damaged."""
    _, image_png, labels_png = _values(data)
    return _record((name.encode(), image_png, labels_png))


def record_name(data: bytes) -> str:
    """Return the name of a record, whose pixels are not decoded. Raises `IntegrityError` if it is damaged."""
    return _values(data)[0].decode()


def decode_record(data: bytes) -> tuple[str, RgbImage, LabelImage]:
    """Return name, image (H x W x 3, uint8) and labels (H x W, uint16) of a record. Raises `IntegrityError`."""
    name, image_png, labels_png = _values(data)
    try:
        image = cv2.imdecode(np.frombuffer(image_png, np.uint8), cv2.IMREAD_COLOR_RGB)
        labels = cv2.imdecode(np.frombuffer(labels_png, np.uint8), cv2.IMREAD_UNCHANGED)
        return name.decode(), np.asarray(image, np.uint8), np.asarray(labels, np.uint16)
    except (ValueError, TypeError, cv2.error) as error:
        raise _damaged(error) from error


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Write records to a TFRecord file. Raises `OutputError` if the disk is full."""
    with writing(path), path.open("wb") as file:
        for record in records:
            length = _LENGTH.pack(len(record))
            file.write(length + _masked_checksum(length))
            file.write(record)
            file.write(_masked_checksum(record))


def plan_shards(split: str, records: Sequence[tuple[RecordPlace, str]]) -> list[ShardPlan]:
    """Deal the records of a split, each with its name, in their stored order (`sampling`) to its shards in turn."""
    count = shard_count(len(records), sum(place.size for place, _ in records)) if records else 0
    order = [records[i] for i in stored_order(len(records))]
    files = [f"{split}-{number:05d}-of-{count:05d}.tfrecord" for number in range(count)]
    return [ShardPlan(file, split, tuple(order[number::count])) for number, file in enumerate(files)]


def write_planned(plan: ShardPlan, folder: Path, records: Iterable[bytes]) -> Shard:
    """Write a shard to a folder.

    Args:
        plan: Its plan.
        folder: The folder.
        records: The bytes of its records, as they are at their places; only one needs to be in memory at a time.

    Raises:
        IntegrityError: A record is damaged.
        OutputError: The disk is full.
    """
    path = folder / plan.file
    pairs = zip(records, plan.records, strict=True)
    write_shard(path, (data if place.named else renamed_record(data, name) for data, (place, name) in pairs))
    facts = {"records": len(plan.records), "size": path.stat().st_size, "sha256": sha256_of(path)}
    return Shard(file=plan.file, split=plan.split, **facts)


def span_of_record(place: RecordPlace) -> str:
    """Return the value of the header `Range` for a record in a TFRecord file, with its checksum."""
    return f"bytes={place.start}-{place.start + place.size + _FOOTER_BYTES - 1}"


def unframed_record(data: bytes, where: str) -> bytes:
    """Return a record that is followed by its checksum. Raises `IntegrityError` if they do not belong together."""
    record, checksum = data[:-_FOOTER_BYTES], data[-_FOOTER_BYTES:]
    if _masked_checksum(record) != checksum:
        raise IntegrityError(f"Expected a record with its checksum in {where}; it is damaged. Remove it and run again.")
    return record


def _masked_checksum(data: bytes) -> bytes:
    """Return the CRC-32C of data as TFRecords store it: rotated by 15 bits, plus a constant.

    >>> _masked_checksum(b"123456789").hex()
    'e5b08ac7'
    """
    checksum = google_crc32c.value(data)
    return _CHECKSUM.pack(((checksum >> 15 | checksum << 17) + _MASK) & 0xFFFFFFFF)


def _record(values: tuple[bytes, ...]) -> bytes:
    example = _example_class()()
    for field, value in zip(_FIELDS, values, strict=True):
        example.features.feature[field].bytes_list.value.append(value)
    return bytes(example.SerializeToString(deterministic=True))


def _values(data: bytes) -> tuple[bytes, ...]:
    """Return the values of a record in the order of `_FIELDS`. Raises `IntegrityError`."""
    try:
        feature = _example_class().FromString(data).features.feature
        return tuple(feature[field].bytes_list.value[0] for field in _FIELDS)
    except (DecodeError, IndexError) as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> IntegrityError:
    return IntegrityError(f"Expected a record with name, image and labels; it is damaged: {error}.")


@cache
def _example_class() -> Any:
    """Return the class of `tf.train.Example` (tensorflow/core/example/example.proto), with the fields that are used.

    It is in a pool of its own, because TensorFlow registers the same name in the common one.
    """
    file = descriptor_pb2.FileDescriptorProto(name="nucleus/example.proto", package="nucleus", syntax="proto3")
    bytes_list = file.message_type.add(name="BytesList")
    bytes_list.field.add(name="value", number=1, label=3, type=12)  # repeated bytes
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    feature.field.add(name="bytes_list", number=1, label=1, type=11, type_name=".nucleus.BytesList", oneof_index=0)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry", options=descriptor_pb2.MessageOptions(map_entry=True))
    entry.field.add(name="key", number=1, label=1, type=9)
    entry.field.add(name="value", number=2, label=1, type=11, type_name=".nucleus.Feature")
    features.field.add(name="feature", number=1, label=3, type=11, type_name=".nucleus.Features.FeatureEntry")
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, label=1, type=11, type_name=".nucleus.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("nucleus.Example"))


class ShardFile:
    """An open shard, with random access to its records.

    The file may be unlinked while it is open. It is closed when the object is no longer referenced.

    Args:
        descriptor: Descriptor of the file, opened for reading, which this object owns.
        name: Name of the file in error messages.
        pixels: File of its decoded records, if there is one.

    Attributes:
        name: Name of the file in error messages.
        pixels: File of its decoded records, if there is one.

    Raises:
        IntegrityError: The file ends in the middle of a record.
    """

    def __init__(self, descriptor: int, name: str, pixels: DecodedFile | None = None) -> None:
        self.name = name
        self.pixels = pixels
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._index = _index(descriptor, name)

    @classmethod
    def open(cls, path: Path) -> ShardFile:
        """Open a shard file."""
        return cls(os.open(path, os.O_RDONLY | BINARY), str(path))

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._index)

    def read(self, record: int) -> bytes:
        """Return the bytes of a record."""
        offset, length = self.span(record)
        return read_at(self._descriptor, length, offset)

    def span(self, record: int) -> tuple[int, int]:
        """Return the offset and length of a record in the file, bytes."""
        offset, length = self._index[record]
        return int(offset), int(length)


def _index(descriptor: int, name: str) -> NDArray[np.int64]:
    """Return the offset and length of each record in bytes, N x 2. Reads only the headers."""
    size = os.fstat(descriptor).st_size
    found = []
    position = 0
    while position < size:
        header = read_at(descriptor, _HEADER_BYTES, position)
        length = _LENGTH.unpack_from(header)[0] if len(header) == _HEADER_BYTES else size
        found.append((position + _HEADER_BYTES, length))
        position += _HEADER_BYTES + length + _FOOTER_BYTES
    if position != size:
        raise IntegrityError(f"Expected complete records in {name}; the last one is cut off. Remove it and run again.")
    return np.array(found, np.int64).reshape(-1, 2)


_seeking = threading.Lock()


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write part of a file; Windows, which has no `pwrite`, moves the position of the descriptor."""
    view = memoryview(data)
    while view:
        if hasattr(os, "pwrite"):
            done = os.pwrite(descriptor, view, offset)
        else:
            with _seeking:
                os.lseek(descriptor, offset, os.SEEK_SET)
                done = os.write(descriptor, view)
        view, offset = view[done:], offset + done


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Read part of a file; Windows, which has no `pread`, moves the position of the descriptor."""
    if hasattr(os, "pread"):
        return bytes(os.pread(descriptor, length, offset))
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)
