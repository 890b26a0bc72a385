"""Reader of the file that W&B writes for an attempt of a run: what it holds is what `wandb sync` can send.

The file is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) of W&B's `Record` messages,
after a header of 7 bytes. W&B has no public reader.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

__all__ = ["logged_steps", "records"]

_HEADER = b":W&B\xe1\xbe\x00"
"""Magic number and version of the format."""
_BLOCK = 32 << 10
_PART = struct.Struct("<IHB")
"""Before each part of a record: checksum, length, kind."""
_FULL, _FIRST, _LAST = 1, 2, 4


def logged_steps(path: Path) -> set[int]:
    """Return the step of each row of metrics or pictures that a file holds; none of a file in another format."""
    return {int(record.history.step.num) for record in records(path) if record.HasField("history")}


def records(path: Path) -> Iterator[Any]:
    """Yield the records (`wandb_internal_pb2.Record`) of a file, up to where a process that was killed left off."""
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415 - with the extra `train` alone

    data, payload, at = path.read_bytes(), b"", len(_HEADER)
    if not data.startswith(_HEADER):
        return
    while at + _PART.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _PART.size:
            at += left
            continue
        _, length, kind = _PART.unpack_from(data, at)
        part = data[at + _PART.size : at + _PART.size + length]
        at += _PART.size + length
        if not kind or len(part) < length:
            return
        payload = part if kind in {_FULL, _FIRST} else payload + part
        if kind in {_FULL, _LAST}:
            try:
                yield wandb_internal_pb2.Record.FromString(payload)
            except DecodeError:
                return
