"""TFRecord shards of images and labels: the format of a record, writing, and random access.

A record is a `tf.train.Example` with `name`, `image` (PNG, 8-bit RGB, original size) and `labels` (PNG, one channel of
16 bits, 0 background, 1..K nuclei).
"""

from __future__ import annotations

import errno
import os
import struct
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from nucleus.data.images import LabelImage, RgbImage, encode_png
from nucleus.errors import IntegrityError
from nucleus.lazy import tf
from nucleus.storage.files import output_error

__all__ = ["ShardFile", "decode_record", "encode_record", "write_shard"]

# Framing of a TFRecord (tensorflow/core/lib/io/record_writer.h): length, its checksum, the record, its checksum.
_LENGTH = struct.Struct("<Q")
_HEADER_BYTES = 12
_FOOTER_BYTES = 4


def encode_record(name: str, image: RgbImage, labels: LabelImage) -> bytes:
    """Return a record of a shard; the same bytes for the same input."""

    def feature(data: bytes) -> Any:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))

    features = {"name": name.encode(), "image": encode_png(image), "labels": encode_png(labels)}
    example = tf.train.Example(
        features=tf.train.Features(feature={key: feature(value) for key, value in features.items()})
    )
    return bytes(example.SerializeToString(deterministic=True))


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Write records to a TFRecord file. Raises `OutputError` if the disk is full."""
    try:
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record)
    except tf.errors.ResourceExhaustedError as error:
        raise output_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error


def decode_record(data: bytes) -> tuple[str, RgbImage, LabelImage]:
    """Return name, image (H x W x 3, uint8) and labels (H x W, uint16) of a record. Raises `IntegrityError`."""
    try:
        feature = tf.train.Example.FromString(data).features.feature
        name, image_png, labels_png = (feature[key].bytes_list.value[0] for key in ("name", "image", "labels"))
        image = cv2.imdecode(np.frombuffer(image_png, np.uint8), cv2.IMREAD_COLOR_RGB)
        labels = cv2.imdecode(np.frombuffer(labels_png, np.uint8), cv2.IMREAD_UNCHANGED)
        return name.decode(), np.asarray(image, np.uint8), np.asarray(labels, np.uint16)
    except (DecodeError, IndexError, ValueError, TypeError, cv2.error) as error:
        raise IntegrityError(f"Expected a record with name, image and labels; it is damaged: {error}.") from error


class ShardFile:
    """An open shard, with random access to its records.

    The file may be unlinked while it is open. It is closed when the object is no longer referenced.

    Args:
        descriptor: Descriptor of the file, opened for reading, which this object owns.
        name: Name of the file in error messages.

    Raises:
        IntegrityError: The file ends in the middle of a record.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._index = _index(descriptor, name)

    @classmethod
    def open(cls, path: Path) -> ShardFile:
        """Open a shard file."""
        return cls(os.open(path, os.O_RDONLY), str(path))

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._index)

    def read(self, record: int) -> bytes:
        """Return the bytes of a record."""
        offset, length = self._index[record]
        return os.pread(self._descriptor, int(length), int(offset))


def _index(descriptor: int, name: str) -> NDArray[np.int64]:
    """Return the offset and length of each record in bytes, N x 2. Reads only the headers."""
    size = os.fstat(descriptor).st_size
    found = []
    position = 0
    while position < size:
        header = os.pread(descriptor, _HEADER_BYTES, position)
        length = _LENGTH.unpack_from(header)[0] if len(header) == _HEADER_BYTES else size
        found.append((position + _HEADER_BYTES, length))
        position += _HEADER_BYTES + length + _FOOTER_BYTES
    if position != size:
        raise IntegrityError(f"Expected complete records in {name}; the last one is cut off. Remove it and run again.")
    return np.array(found, np.int64).reshape(-1, 2)
