"""TFRecord shards of images and labels: the format of a record, writing, and reading at any position.

A record is a `tf.train.Example`: `name`, `image` (PNG, RGB of 8 bits, native size) and `labels` (PNG, one channel
of 16 bits, 0 background, 1..K nuclei).
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nucleus.data.images import LabelImage, RgbImage, encode_png
from nucleus.errors import IntegrityError

__all__ = ["ShardReader", "decode_record", "encode_record", "index_shard", "write_shard"]

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


def decode_record(data: bytes) -> tuple[str, RgbImage, LabelImage]:
    """Name, image and labels of one record. Raises `IntegrityError`."""
    import cv2  # noqa: PLC0415
    import tensorflow as tf  # noqa: PLC0415
    from google.protobuf.message import DecodeError  # noqa: PLC0415

    try:
        feature = tf.train.Example.FromString(data).features.feature
        name, image_png, labels_png = (feature[key].bytes_list.value[0] for key in ("name", "image", "labels"))
        image = cv2.imdecode(np.frombuffer(image_png, np.uint8), cv2.IMREAD_COLOR_RGB)
        labels = cv2.imdecode(np.frombuffer(labels_png, np.uint8), cv2.IMREAD_UNCHANGED)
        return name.decode(), np.asarray(image, np.uint8), np.asarray(labels, np.uint16)
    except (DecodeError, IndexError, ValueError, TypeError, cv2.error) as error:
        raise IntegrityError(f"Expected a record of name, image and labels; it is damaged: {error}.") from error


class ShardReader:
    """Random access to the records of cached shards.

    Args:
        paths: Local file of each shard by its number; shards of other workers may be missing.
    """

    def __init__(self, paths: dict[int, Path]) -> None:
        self._paths = paths
        self._index = {number: index_shard(path) for number, path in paths.items()}

    def read(self, shard: int, record: int) -> bytes:
        """The bytes of one record."""
        offset, length = self._index[int(shard)][int(record)]
        descriptor = os.open(self._paths[int(shard)], os.O_RDONLY)
        try:
            return os.pread(descriptor, int(length), int(offset))
        finally:
            os.close(descriptor)
