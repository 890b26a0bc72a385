"""What offline W&B runs have logged: read back from their files, which `wandb sync` sends later.

A file is a header of 7 bytes and a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) of
`wandb_internal_pb2.Record`. W&B has no reader of its own.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["logged_epochs", "offline_files", "records"]

_HEADER = 7
_BLOCK = 32 << 10
_RECORD_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _LAST = 1, 2, 4


def offline_files(folder: Path, run: str) -> list[Path]:
    """The files of an offline run that `wandb.init(dir=folder, id=run)` wrote, one for each time that it was begun."""
    return sorted(folder.glob(f"wandb/offline-run-*/run-{run}.wandb"))


def logged_epochs(folder: Path, run: str) -> set[int]:
    """The epochs that an offline run has logged in a folder."""
    return {
        int(json.loads(item.value_json))
        for path in offline_files(folder, run)
        for record in records(path)
        for item in record.history.item
        if (item.key or ".".join(item.nested_key)) == "epoch"
    }


def records(path: Path) -> Iterator[Any]:
    """The records of a file, up to where a process that was killed left off."""
    from google.protobuf.message import DecodeError  # noqa: PLC0415
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415  over a second

    data = path.read_bytes()
    payload = b""
    at = _HEADER
    while at + _RECORD_HEADER.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _RECORD_HEADER.size:
            at += left
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(data, at)
        part = data[at + _RECORD_HEADER.size : at + _RECORD_HEADER.size + length]
        at += _RECORD_HEADER.size + length
        if not kind or len(part) < length:
            return
        payload = part if kind in {_FULL, _FIRST} else payload + part
        if kind in {_FULL, _LAST}:
            try:
                yield wandb_internal_pb2.Record.FromString(payload)
            except DecodeError:  # torn by whatever ended the process
                return
