"""Writing to a disk that is full, to folders without permission, and where a file is in the way."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from nucleus.errors import OutputError, UsageError
from nucleus.storage.claims import file_lock
from nucleus.storage.files import (
    atomic_path,
    disk_errors,
    failed_write,
    free_bytes,
    output_error,
    temporary_folder,
    write_atomic,
    writing,
)


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


FULL = os.strerror(errno.ENOSPC)
FOREIGN = [
    OSError(f"Can't write data (file write failed: errno = 28, error message = '{FULL}')"),  # HDF5
    RuntimeError(f"Unable to flush file's cached information (errno = 28, error message = '{FULL}')"),  # HDF5
    type("ResourceExhaustedError", (Exception,), {})(f"/x/events; {FULL}"),  # TensorFlow
    OSError(f"Error writing bytes to file. Detail: [errno 28] {FULL}"),  # Arrow
]


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_full_disks_in_the_words_of_libraries(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=rf"{tmp_path}/x.*{FULL}"), writing(tmp_path / "x"):
        raise error
    with (
        pytest.raises(OutputError, match=r"TMPDIR\).*XDG_CACHE_HOME\).*export TMPDIR=DIR XDG_CACHE_HOME=DIR"),
        disk_errors(),
    ):
        raise error
    for other in (RuntimeError("HDF5"), ValueError("wrong"), OSError("Can't open file")):
        with pytest.raises(type(other)) as caught, writing(tmp_path / "x"), disk_errors():
            raise other
        assert caught.value is other


def test_the_variable_that_moves_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "tmp" / "nucleus-1"))  # without a home folder
    error = OSError(errno.ENOSPC, FULL)
    for path, variable in {
        "tmp/nucleus-1/nucleus/datasets/x": "(export XDG_CACHE_HOME=DIR)",
        "tmp/nucleus-train-a1/best.h5": "(export TMPDIR=DIR)",
        "tmp/mine/x.tif": "(--out DIR",
        "out/x.tif": "(--out DIR",
    }.items():
        assert variable in str(output_error(tmp_path / path, error))
        assert "(--dir DIR)" in str(output_error(tmp_path / path, error, "--dir DIR"))


def test_a_full_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OutputError, match=rf"{tmp_path}/nucleus-train-.*export TMPDIR=DIR"), temporary_folder("train"):
        raise OSError(errno.ENOSPC, FULL)
    assert list(tmp_path.iterdir()) == []
    elsewhere = OSError(errno.ENOSPC, FULL, str(tmp_path / "other" / "x"))
    with pytest.raises(OutputError, match=rf"write {tmp_path}/other/x"), temporary_folder("train"):
        raise elsewhere
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError), temporary_folder("train"):
        pass


def test_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
    with pytest.raises(OutputError, match=r"gone.*export TMPDIR=DIR"), temporary_folder("train"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OutputError) as caught, file_lock(tmp_path / "deeper" / "x.lock"):
        pass
    for fact in (str(tmp_path / "deeper" / "x.lock"), os.strerror(number), "--out"):
        assert fact in str(caught.value)


def test_a_lock_is_held_until_the_block_ends(tmp_path: Path) -> None:
    with file_lock(tmp_path / "x.lock"), pytest.raises(BlockingIOError), file_lock(tmp_path / "x.lock", wait=False):
        pass
    with file_lock(tmp_path / "x.lock", wait=False):
        pass


def test_room_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems give no numbers; a disk without inodes has no room, whatever its bytes."""
    assert free_bytes(tmp_path / "not yet" / "there") > 0
    found = os.statvfs(tmp_path)
    values = {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**{**values, "f_blocks": 0}))
    assert free_bytes(tmp_path) is None
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**{**values, "f_files": 9, "f_favail": 0}))
    assert free_bytes(tmp_path) == 0
