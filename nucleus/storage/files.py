"""Files on disk: sums, and writes that either happen whole or not at all."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from nucleus import __version__
from nucleus.errors import IntegrityError, NucleusError

__all__ = [
    "SUMS_FILE",
    "atomic_path",
    "check_sums",
    "read_document",
    "read_sums",
    "sha256_of",
    "write_atomic",
    "write_sums",
]


_BLOCK = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; move it there when the block ends well, remove it when not.

    The name is unique to the process and call, so writers at once never share it; the last one wins whole. Its
    suffix is that of `path`, because image writers choose the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path`, which holds either what it held or all of `data`."""
    with atomic_path(path) as beside:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)


SUMS_FILE = "sums.json"
_SUMS = TypeAdapter(dict[str, str])


def write_sums(folder: Path) -> None:
    """Write the sums of all files below a folder."""
    (folder / SUMS_FILE).write_text(json.dumps(_sums(folder), indent=1))


def check_sums(folder: Path, where: str) -> None:
    """Compare a folder with the sums in it.

    Args:
        folder: A folder for which `write_sums` was called, or a copy of it.
        where: What the user calls it.

    Raises:
        IntegrityError: A file is missing, is not what it was, or was not there.
    """
    try:
        data = (folder / SUMS_FILE).read_bytes()
    except OSError as error:
        raise IntegrityError(f"Expected the sums of the files in {where}; they cannot be read: {error}.") from error
    expected = read_sums(data, where)
    found = _sums(folder)
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        raise IntegrityError(
            f"Expected the files in {where} to have the SHA-256 that {SUMS_FILE} says; these have not, or are missing: "
            f"{', '.join(wrong)}."
        )


def read_sums(data: bytes, where: str) -> dict[str, str]:
    """SHA-256 of each file of a folder, by its path there, from what `write_sums` wrote.

    Raises:
        IntegrityError: It is damaged.
    """
    try:
        return _SUMS.validate_json(data)
    except ValidationError as error:
        raise IntegrityError(f"Expected the sums of the files in {where}; they cannot be read: {error}") from error


def _sums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS_FILE)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(files)}


Document = TypeVar("Document", bound=BaseModel)


def read_document(
    kind: type[Document],
    data: bytes,
    *,
    what: str,
    where: str,
    newest: int,
    error: type[NucleusError],
    oldest: int = 1,
) -> Document:
    """Parse and check a document.

    Args:
        kind: What it must be; has a field `format`, and may have `needs`, the version of this package that reads it.
        data: The JSON.
        what: What the user calls it, such as `a dataset manifest`.
        where: Its file or URI.
        newest: The newest format that this version of the package reads.
        error: Raised if the document is damaged, newer or too old.
        oldest: The oldest format that it reads.
    """
    try:
        found = json.loads(data)
        stored = found.get("format") if isinstance(found, dict) else None
        if not isinstance(stored, int) or oldest <= stored <= newest:
            return kind.model_validate(found)
    except (ValueError, RecursionError) as problem:  # also what pydantic and the decoder of UTF-8 raise
        raise error(f"Expected {what} at {where}; it is damaged: {problem}") from problem
    if stored < oldest:
        raise error(
            f"Expected {what} of format {oldest} or newer at {where}; found format {stored}, which this version "
            f"({__version__}) no longer reads. Make it again, or install the version that wrote it."
        )
    needs = found.get("needs")
    raise error(
        f"Expected {what} of format {newest} or older at {where}; found format {stored}. "
        + (f"It needs nucleus {needs} or newer" if needs else "A newer version of this package wrote it")
        + f", and this is {__version__}: upgrade."
    )
