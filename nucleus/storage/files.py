"""Files on disk: SHA-256 sums, atomic writes, and versioned JSON documents."""

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


SUMS_FILE = "sums.json"
_SUMS = TypeAdapter(dict[str, str])
_BLOCK = 1 << 20

Document = TypeVar("Document", bound=BaseModel)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, else remove it.

    The name is unique per process and call, so concurrent writers never share it; the last one wins. It has the suffix
    of `path`, by which image writers choose the format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path`, completely or not at all."""
    with atomic_path(path) as beside:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of all files below a folder to `sums.json` in it."""
    (folder / SUMS_FILE).write_text(json.dumps(_sums(folder), indent=1))


def check_sums(folder: Path, where: str) -> None:
    """Compare the files in a folder with its `sums.json`.

    Args:
        folder: A folder in which `write_sums` wrote, or a copy of it.
        where: Name of the folder in error messages.

    Raises:
        IntegrityError: A file is missing, has changed, or was added.
    """
    try:
        data = (folder / SUMS_FILE).read_bytes()
    except OSError as error:
        raise IntegrityError(f"Expected {SUMS_FILE} in {where}; it cannot be read: {error}.") from error
    expected = read_sums(data, where)
    found = _sums(folder)
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        raise IntegrityError(
            f"Expected the files in {where} to have the SHA-256 in {SUMS_FILE}; these differ or are missing: "
            f"{', '.join(wrong)}."
        )


def read_sums(data: bytes, where: str) -> dict[str, str]:
    """Parse the content of `sums.json`: the SHA-256 of each file of a folder, by its relative path.

    Raises:
        IntegrityError: The document is damaged.
    """
    try:
        return _SUMS.validate_json(data)
    except ValidationError as error:
        raise IntegrityError(f"Expected {SUMS_FILE} in {where}; it cannot be read: {error}") from error


def _sums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS_FILE)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(files)}


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
    """Parse and check a JSON document that states its format.

    Args:
        kind: Model of the document; has a field `format`, and may have `needs`, the oldest version of this package
            that reads the format.
        data: The JSON text.
        what: Name of the document in error messages, such as `a dataset manifest`.
        where: Its file or URI.
        newest: The newest format that this version of the package reads.
        error: Class of the error that is raised if the document is damaged, too new or too old.
        oldest: The oldest format that this version of the package reads.
    """
    try:
        found = json.loads(data)
        stored = found.get("format") if isinstance(found, dict) else None
        if not isinstance(stored, int) or oldest <= stored <= newest:
            return kind.model_validate(found)
    except (ValueError, RecursionError) as problem:  # includes the errors of pydantic and of the UTF-8 decoder
        raise error(f"Expected {what} at {where}; it is damaged: {problem}") from problem
    if stored < oldest:
        raise error(
            f"Expected {what} of format {oldest} or newer at {where}; found format {stored}, which this version "
            f"({__version__}) no longer reads. Create it again, or install the version that wrote it."
        )
    needs = found.get("needs")
    raise error(
        f"Expected {what} of format {newest} or older at {where}; found format {stored}. "
        + (f"It needs nucleus {needs} or newer" if needs else "A newer version of this package wrote it")
        + f", and this is {__version__}: upgrade."
    )
