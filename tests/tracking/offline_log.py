"""Reader of W&B's offline files, to prove what was logged: a LevelDB log of `wandb_internal_pb2.Record`.

The format (https://github.com/google/leveldb/blob/main/doc/log_format.md) is W&B's own and has no public reader. A
header of 7 bytes stands before it.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nucleus.tracking.wandb_run import offline_files

__all__ = ["logged_artifacts", "logged_rows", "records", "rows_of_run"]

_HEADER = 7
_BLOCK = 32 << 10
_RECORD_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _LAST = 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a file, up to where a process that was killed left off."""
    from wandb.proto import wandb_internal_pb2

    data, payload, at = path.read_bytes(), b"", _HEADER
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
            yield wandb_internal_pb2.Record.FromString(payload)


def logged_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file's history; the parts of a picture are dictionaries."""
    for record in records(path):
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:
                *above, last = list(item.nested_key) or [item.key]
                place = row
                for key in above:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            yield row


def rows_of_run(folder: Path, run: str) -> list[dict[str, Any]]:
    """The rows of all attempts of an offline run in a folder."""
    return [row for path in offline_files(folder, run) for row in logged_rows(path)]


def logged_artifacts(folder: Path, run: str) -> list[Any]:
    """The `ArtifactRecord`s of all attempts of an offline run in a folder."""
    found = [record for path in offline_files(folder, run) for record in records(path)]
    return [record.artifact for record in found if record.HasField("artifact")]
