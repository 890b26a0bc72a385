"""SHA-256 sums of the files of a folder, kept in it: written last, checked before anything else is read."""

import json
from pathlib import Path

from nucleus.errors import IntegrityError
from nucleus.storage.files import sha256_of

__all__ = ["check_sums", "write_sums"]

_SUMS_FILE = "sums.json"


def write_sums(folder: Path) -> None:
    """Write the sums of all files below a folder."""
    (folder / _SUMS_FILE).write_text(json.dumps(_sums(folder), indent=1))


def check_sums(folder: Path, where: str) -> None:
    """Compare a folder with the sums in it.

    Args:
        folder: A folder for which `write_sums` was called, or a copy of it.
        where: What the user calls it.

    Raises:
        IntegrityError: A file is missing, is not what it was, or was not there.
    """
    try:
        expected = json.loads((folder / _SUMS_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"Expected the sums of the files in {where}; they cannot be read: {error}.") from error
    found = _sums(folder)
    if found == expected:
        return
    names = expected if isinstance(expected, dict) else {}
    wrong = sorted(name for name in {*found, *names} if found.get(name) != names.get(name))
    raise IntegrityError(
        f"Expected the files in {where} to have the SHA-256 that {_SUMS_FILE} says; these have not, or are missing: "
        f"{', '.join(wrong) or _SUMS_FILE}."
    )


def _sums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / _SUMS_FILE)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(files)}
