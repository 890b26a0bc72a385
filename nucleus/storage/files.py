"""Files on disk: SHA-256 sums, atomic writes and why they fail, and versioned JSON documents."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from nucleus import __version__
from nucleus.errors import IntegrityError, NucleusError, OutputError, UsageError
from nucleus.surroundings import CACHE_VARIABLE, disk_space, export, find_cache, who_may_write

__all__ = [
    "SUMS_FILE",
    "atomic_folder",
    "atomic_path",
    "check_sums",
    "disk_errors",
    "disk_room",
    "failed_write",
    "free_bytes",
    "is_full",
    "mover",
    "output_error",
    "put_in_place",
    "read_document",
    "read_sums",
    "sha256_of",
    "temporary_folder",
    "write_atomic",
    "write_sums",
    "writing",
]


SUMS_FILE = "sums.json"
_SUMS = TypeAdapter(dict[str, str])
_BLOCK = 1 << 20
_TEMPORARY_VARIABLE = "TMPDIR"
_TEMPORARY_PREFIX = "nucleus-"
"""With this begin the names of this project's temporary folders."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNKNOWN = "Unknown error"
_FULL_TEXTS = tuple(text for text in map(os.strerror, sorted(_FULL)) if not text.startswith(_UNKNOWN))
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR}

Document = TypeVar("Document", bound=BaseModel)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def output_error(path: Path, error: OSError, move: str | None = None) -> OutputError:
    """Return the error of a file or folder that could not be written: what is in the way, and what helps.

    Args:
        path: The file or folder.
        error: The error of the file system.
        move: What chooses another place, such as `--dir DIR`; None for what the path suggests: the variable of the
            cache or of temporary files, else `--out`.
    """
    there = _nearest(path)
    reason = error.strerror or (os.strerror(errno.ENOSPC) if is_full(error) else str(error))
    move = move or mover(path)
    if is_full(error):
        return OutputError(
            f"Expected room to write {path}; found none ({reason}; {disk_room(there)}). Files that were written before "
            f"are whole. Make room, or choose a folder on another disk ({move}), and repeat the command."
        )
    if not there.is_dir() and (there != path or error.errno in _IN_THE_WAY):
        return OutputError(
            f"Expected a folder at {there}; it is a file. Name another folder ({move}), or move the file away."
        )
    if error.errno in _FORBIDDEN:
        return OutputError(
            f"Expected permission to write {path}; found none ({reason}; {who_may_write(there)}). Name another folder "
            f"({move}), or change the permissions."
        )
    return OutputError(f"Expected to write {path}; found an obstacle: {reason}. Name another file or folder ({move}).")


def mover(path: Path) -> str:
    """Return what chooses another place for a path: a variable with its command, or an option."""
    above = {path.absolute(), *path.absolute().parents}
    with suppress(UsageError):
        if find_cache().path in above:
            return export(CACHE_VARIABLE)
    with suppress(FileNotFoundError):
        temporary = Path(tempfile.gettempdir()).absolute()
        if any(place.parent == temporary and place.name.startswith(_TEMPORARY_PREFIX) for place in above):
            return export(_TEMPORARY_VARIABLE)
    return "--out DIR, or the folder that the command was given"


def free_bytes(place: Path) -> int | None:
    """Return how many bytes this user can still write to the disk of a path; None if its file system does not say."""
    free, more_files = disk_space(_nearest(place))
    return free if more_files else 0


def disk_room(place: Path) -> str:
    """Return how much room is left on the disk of a path, as text."""
    free, more_files = disk_space(_nearest(place))
    names = "" if more_files else ", and no more files can be made (inodes)"
    return f"{(free or 0) >> 20:,} MiB are free on its disk{names}"


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise `OutputError` for a write that failed anywhere in the block, as `failed_write` explains it."""
    try:
        yield
    except NucleusError:
        raise
    except Exception as error:
        found = failed_write(error)
        if found is None:
            raise
        raise found from error


def failed_write(error: Exception) -> OutputError | None:
    """Return the error of a failed write as `output_error` does; None if it may have been another operation."""
    if not isinstance(error, OSError):
        return _full_somewhere() if is_full(error) else None
    if isinstance(error, FileNotFoundError) and "usable temporary directory" in str(error):  # Python tried to write
        return OutputError(
            f"Expected a folder for temporary files that can be written; found none ({error.strerror}). Make room, or "
            f"choose another folder: {export(_TEMPORARY_VARIABLE)}."
        )
    if not isinstance(error.filename, str):
        return _full_somewhere() if is_full(error) else None
    return output_error(Path(error.filename), error) if error.errno in _FULL | _IN_THE_WAY | {errno.EROFS} else None


def is_full(error: Exception) -> bool:
    """Return whether a disk was full; HDF5, Arrow and TensorFlow say so in the text of an error only."""
    number = error.errno if isinstance(error, OSError) else None
    return number in _FULL or (number is None and any(text in str(error) for text in _FULL_TEXTS))


def _full_somewhere() -> OutputError:
    """Return the error of a full disk that the system does not name: the room where this program writes."""
    places = {"the current folder": Path.cwd()}
    with suppress(FileNotFoundError):
        places[_TEMPORARY_VARIABLE] = Path(tempfile.gettempdir())
    with suppress(UsageError):
        places[CACHE_VARIABLE] = find_cache().path
    rooms = "; ".join(f"{path} ({name}): {disk_room(path)}" for name, path in places.items())
    return OutputError(
        f"Expected room on the disk; found none. Where this program writes: {rooms}. Make room, or choose folders on "
        f"another disk: {export(_TEMPORARY_VARIABLE)} {CACHE_VARIABLE}=DIR, or --out DIR."
    )


def _nearest(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists and can be reached."""
    for place in (path, *path.parents):
        with suppress(OSError):
            place.stat()
            return place
    return Path()


@contextmanager
def writing(path: Path, move: str | None = None) -> Iterator[None]:
    """Raise `OutputError` for errors of the file system that concern `path`, while the block writes it.

    `move` is that of `output_error`.
    """
    try:
        yield
    except NucleusError:
        raise
    except OSError as error:
        place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        near = place is not None and (path.parent in (place, *place.parents) or place in path.parents)
        if near or is_full(error) or error.errno == errno.EROFS:  # writes to an open file give no name
            raise output_error(path if near or place is None else place, error, move) from error
        raise
    except Exception as error:  # TensorFlow and HDF5 have their own
        if not is_full(error):
            raise
        raise output_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), move) from error


@contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """Provide an empty folder below TMPDIR, `nucleus-<what>-...`, and remove it after the block.

    Raises:
        OutputError: There is no such folder, or the block wrote to it, and it has no room.
    """
    prefix = f"{_TEMPORARY_PREFIX}{what}-"
    with disk_errors(), tempfile.TemporaryDirectory(prefix=prefix) as folder, writing(Path(folder) / what):
        yield Path(folder)


@contextmanager
def atomic_path(path: Path, move: str | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, else remove it.

    The name is unique per process and call, so concurrent writers never share it; the last one wins. It has the suffix
    of `path`, by which image writers choose the format. `move` is that of `output_error`.

    Raises:
        OutputError: The disk is full, the permissions are missing, or a file is in the place of a folder.
    """
    with writing(path, move):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
        try:
            yield beside
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; put it in its place if the block succeeds, else remove it.

    Raises:
        OutputError: As in `atomic_path`.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder.with_name(f".{os.getpid()}-{secrets.token_hex(4)}")
        beside.mkdir()
        try:
            yield beside
            put_in_place(beside, folder, beside.with_name(f"{beside.name}-old"))
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def write_atomic(path: Path, data: bytes | str, move: str | None = None) -> None:
    """Write `data` to `path`, completely or not at all. Raises the errors of `atomic_path`."""
    with atomic_path(path, move) as beside:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of all files below a folder to `sums.json` in it."""
    (folder / SUMS_FILE).write_bytes(json.dumps(_sums(folder), indent=1).encode())


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


def put_in_place(new: Path, folder: Path, old: Path) -> None:
    """Replace a folder by another; until then, the replaced one is kept as `old`."""
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
