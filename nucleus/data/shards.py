"""TFRecord shards of images and labels: the format of a record, writing, and reading at any position.

A record is a `tf.train.Example`: `name`, `image` (PNG, RGB of 8 bits, native size) and `labels` (PNG, one channel
of 16 bits, 0 background, 1..K nuclei).
"""

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import LabelImage, RgbImage, encode_png
from nucleus.errors import IntegrityError

__all__ = ["encode_record", "index_shard", "read_record", "read_records", "write_shard"]

# Framing of a TFRecord (tensorflow/core/lib/io/record_writer.h): length, its checksum, the record, its checksum.
_LENGTH = struct.Struct("<Q")
_HEADER_BYTES = 12
_FOOTER_BYTES = 4


def encode_record(name: str, image: RgbImage, labels: LabelImage) -> bytes:
    """One record of a shard; the same bytes for the same input."""
    import tensorflow as tf  # noqa: PLC0415  seconds that reading a manifest need not spend

    def feature(data: bytes) -> Any:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))

    features = {"name": name.encode(), "image": encode_png(image), "labels": encode_png(labels)}
    example = tf.train.Example(
        features=tf.train.Features(feature={key: feature(value) for key, value in features.items()})
    )
    return bytes(example.SerializeToString(deterministic=True))


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Write records to a TFRecord file."""
    import tensorflow as tf  # noqa: PLC0415

    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)


def index_shard(path: Path) -> NDArray[np.int64]:
    """Where the records of a shard are: N x 2, offset and length in bytes. Reads headers only.

    Raises:
        IntegrityError: The file ends in the middle of a record.
    """
    size = path.stat().st_size
    found = []
    position = 0
    with path.open("rb") as file:
        while position < size:
            header = file.read(_HEADER_BYTES)
            length = _LENGTH.unpack_from(header)[0] if len(header) == _HEADER_BYTES else size
            found.append((position + _HEADER_BYTES, length))
            position += _HEADER_BYTES + length + _FOOTER_BYTES
            file.seek(position)
    if position != size:
        raise IntegrityError(f"Expected whole records in {path}; it ends inside one. Remove it and run again.")
    return np.array(found, np.int64).reshape(-1, 2)


def read_record(path: Path, offset: int, length: int) -> bytes:
    """The bytes of one record."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def read_records(path: Path) -> Iterator[tuple[str, RgbImage, LabelImage]]:
    """Name, image and labels of each record of a shard, decoded one at a time."""
    import cv2  # noqa: PLC0415
    import tensorflow as tf  # noqa: PLC0415

    for offset, length in index_shard(path):
        feature = tf.train.Example.FromString(read_record(path, int(offset), int(length))).features.feature
        image, labels = (
            cv2.imdecode(np.frombuffer(feature[key].bytes_list.value[0], np.uint8), cv2.IMREAD_UNCHANGED)
            for key in ("image", "labels")
        )
        name = feature["name"].bytes_list.value[0].decode()
        yield name, np.ascontiguousarray(image[..., ::-1]), np.asarray(labels, np.uint16)
