"""Writing to a disk that is full, to folders without permission, and where a file is in the way."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nucleus.errors import OutputError, UsageError
from nucleus.storage.files import atomic_path, failed_write, output_error, write_atomic, writing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_path_and_what_is_left(number: int, tmp_path: Path) -> None:
    path = tmp_path / "not yet" / "x.tif"
    with pytest.raises(OutputError) as caught, atomic_path(path) as beside:  # noqa: PT012  both are in the block
        beside.write_bytes(b"half")
        raise OSError(number, os.strerror(number))  # writes to an open file give no name
    for fact in (str(path), os.strerror(number), "MiB are free"):
        assert fact in str(caught.value)
    assert list(path.parent.iterdir()) == []


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    """A file system of 1 MiB, where the system allows to mount one."""
    code = (
        "import sys; from pathlib import Path; from nucleus.storage.files import write_atomic\\n"
        "folder = Path(sys.argv[1]); write_atomic(folder / 'a', bytes(400_000))\\n"
        "try: write_atomic(folder / 'b', bytes(900_000))\\n"
        "except Exception as error: print(type(error).__name__, error, [p.name for p in folder.iterdir()])"
    ).replace("\\n", "\n")
    mounted = f'mount -t tmpfs -o size=1m tmpfs "{tmp_path}" && "{sys.executable}" -c "$1" "{tmp_path}"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, "sh", code],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.stdout.startswith(f"OutputError Expected room to write {tmp_path / 'b'}; found none (No space left")
    assert "; 0 MiB are free" in done.stdout
    assert done.stdout.endswith("['a']\n")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "x.tif", tmp_path / "file" / "deeper" / "x.tif"):
        with pytest.raises(OutputError, match=r"Expected a folder at .*file; it is a file"):
            write_atomic(path, b"")
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match=r"folder\.png; found an obstacle: Is a directory"):
        write_atomic(tmp_path / "folder.png", b"")


def test_missing_permissions(tmp_path: Path) -> None:
    error = output_error(tmp_path / "a" / "x.tif", PermissionError(errno.EACCES, "Permission denied"))
    for fact in (str(tmp_path / "a" / "x.tif"), f"user {os.getuid()}", f"{tmp_path} belongs to user"):
        assert fact in str(error)
    with pytest.raises(OutputError, match="Read-only"), writing(tmp_path / "x"):
        raise OSError(errno.EROFS, "Read-only file system")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "none", "/elsewhere/x"), UsageError("wrong"), ValueError("wrong")):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "x"):
            raise error
        assert caught.value is error
    assert failed_write(PermissionError(errno.EACCES, "none", "/elsewhere/x")) is None  # perhaps it was read
    assert "ends" in str(failed_write(OSError(errno.ENOSPC, "ends", "x")))


def test_names_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 251}.tif"
    write_atomic(path, b"whole")
    assert path.read_bytes() == b"whole"
