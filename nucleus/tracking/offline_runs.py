"""What offline W&B runs have logged: read back from their files, which `wandb sync` sends later.

A file is a header of 7 bytes and a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) of
`wandb_internal_pb2.Record`. W&B has no reader of its own.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nucleus.storage.bucket import Bucket
from nucleus.storage.files import write_atomic

__all__ = [
    "LoggedArtifact",
    "keep_files",
    "kept_files",
    "logged_artifacts",
    "logged_epochs",
    "logged_rows",
    "logged_steps",
    "offline_files",
    "records",
    "settle",
    "wait_until_written",
]

_HEADER = 7
_BLOCK = 32 << 10
_RECORD_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4

_STAGED = Path("artifacts", "staging")
"""Where an offline run's folder holds the files of its artifacts; see `nucleus.tracking.wandb_run.staged_in`."""
_PATIENCE = 30.0
_POLL = 0.02


@dataclass(frozen=True)
class LoggedArtifact:
    """An artifact that an offline run has logged.

    Attributes:
        type: Such as `model`.
        name: Its name.
        aliases: Those that it is to have.
        metadata: As it was given.
        references: Name and address of each file that is not in W&B.
        files: Name and local file of each that is sent to W&B.
    """

    type: str
    name: str
    aliases: frozenset[str]
    metadata: dict[str, Any]
    references: dict[str, str]
    files: dict[str, Path]


def offline_files(folder: Path, run: str) -> list[Path]:
    """The files of an offline run that `wandb.init(dir=folder, id=run)` wrote, one for each time that it was begun."""
    return sorted(folder.glob(f"wandb/offline-run-*/run-{run}.wandb"))


def kept_files(folder: Path, run: str) -> dict[str, Path]:
    """All that `wandb sync` needs of an offline run: name (`offline-run-.../...`) and file, but for W&B's own logs."""
    return {
        f"{main.parent.name}/{path.relative_to(main.parent).as_posix()}": path
        for main in offline_files(folder, run)
        for path in sorted(main.parent.rglob("*"))
        if path.is_file() and path.relative_to(main.parent).parts[0] != "logs"
    }


def keep_files(folder: Bucket, files: Mapping[str, Path]) -> None:
    """Put what `kept_files` gives into a folder of the run in the project's bucket."""
    for name, path in files.items():
        folder.put(name, path)


def logged_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file's history: key and value; the parts of a picture or table are dictionaries."""
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


def logged_epochs(folder: Path, run: str) -> set[int]:
    """The epochs whose metrics an offline run has logged in a folder."""
    return {
        int(row["epoch"])
        for path in offline_files(folder, run)
        for row in logged_rows(path)
        if "epoch" in row and not any(isinstance(value, dict) for value in row.values())
    }


def logged_steps(folder: Path, run: str) -> set[int]:
    """The steps of the rows that an offline run has logged in a folder."""
    return {int(row["_step"]) for path in offline_files(folder, run) for row in logged_rows(path)}


def logged_artifacts(folder: Path, run: str) -> Iterator[LoggedArtifact]:
    """The artifacts that an offline run has logged in a folder."""
    for path in offline_files(folder, run):
        for record in records(path):
            if record.HasField("artifact"):
                found = record.artifact
                yield LoggedArtifact(
                    type=found.type,
                    name=found.name,
                    aliases=frozenset(found.aliases),
                    metadata=json.loads(found.metadata or "{}"),
                    references={item.path: item.ref for item in found.manifest.contents if item.ref},
                    files={item.path: Path(item.local_path) for item in found.manifest.contents if item.local_path},
                )


def settle(folder: Path, run: str) -> None:
    """Make an offline run whose kept files were fetched into `<folder>/wandb/` ready for `wandb sync`.

    Its records name the files of artifacts by absolute paths of the machine that wrote them. Where they are missing,
    W&B sends all but those artifacts, without a word.
    """
    for path in offline_files(folder, run):
        found = list(records(path))
        for record in found:
            for item in record.artifact.manifest.contents:
                if item.local_path:
                    item.local_path = str(path.parent.absolute() / _STAGED / Path(item.local_path).name)
        header = path.read_bytes()[:_HEADER]
        write_atomic(path, header + _log_of(record.SerializeToString() for record in found))


def _log_of(payloads: Iterable[bytes]) -> bytes:
    """The LevelDB log that follows a file's header; its sums are CRC-32 as zlib has it, not LevelDB's own."""
    log = bytearray()
    for payload in payloads:
        rest, first = payload, True
        while first or rest:
            left = _BLOCK - (_HEADER + len(log)) % _BLOCK
            if left < _RECORD_HEADER.size:
                log += bytes(left)
                continue
            part, rest = rest[: left - _RECORD_HEADER.size], rest[left - _RECORD_HEADER.size :]
            kind = (_FULL if first else _LAST) if not rest else (_FIRST if first else _MIDDLE)
            log += _RECORD_HEADER.pack(zlib.crc32(part, zlib.crc32(bytes([kind]))), len(part), kind) + part
            first = False
    return bytes(log)


def wait_until_written(folder: Path, run: str) -> None:
    """Wait until W&B has written the last file of a run that is over: it does so a moment after `finish` returns.

    At most half a minute, for what W&B cannot write, as on a full disk, must not be the end of a training run.
    """
    path = offline_files(folder, run)[-1]
    deadline = time.monotonic() + _PATIENCE
    while not any(record.HasField("exit") for record in records(path)) and time.monotonic() < deadline:
        time.sleep(_POLL)


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
