"""Locks on files, and claims on a place for results, so that no two processes write to it at the same time.

Linux and macOS let a process rename and remove a file that another one has open, and lock a file without effect on who
reads it. Windows does neither; here, and nowhere else, is how the locks work there too.

A folder is claimed by a lock of the operating system, which ends with its process. A prefix in a bucket is claimed by
an object that its holder writes again every minute; a claim that is not renewed belongs to a process that is gone.
"""

import errno
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from nucleus.errors import ObjectExistsError, ObjectNotFoundError, OutputError
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import mover, writing
from nucleus.surroundings import BINARY
from nucleus.text import moment_text

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = [
    "CLAIM_LOST_SECONDS",
    "PrefixClaim",
    "claimed_folder",
    "claimed_prefix",
    "file_lock",
    "lock_file",
    "remove_unused",
]

_LOCKED_BYTE = (1 << 31) - 2
"""Byte that a lock covers on Windows, where nobody can read what another process has locked: far behind the content."""
_LOCK_POLL_SECONDS = 0.05

_FOLDER_FILE = ".nucleus-claim"
_ATTEMPTS = 20
_BEAT_SECONDS = 60.0
_LAST_WRITE_SECONDS = 10.0
CLAIM_LOST_SECONDS = 300.0
"""Seconds without renewal after which a claim in a bucket ends: its holder was killed, or cannot reach the bucket."""


def _open_lockable(path: Path) -> int:
    """Open a file for reading and writing, created if there is none; return its descriptor. Raises `OSError`."""
    return os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o644)


def lock_file(descriptor: int, path: Path, move: str | None = None, *, shared: bool = False, wait: bool = True) -> None:
    """Lock an open file until it is closed by `_close_locked`, or its process ends.

    Args:
        descriptor: The open file; it is open for writing, which network file systems require of an exclusive lock.
        path: Its path.
        move: That of `output_error`.
        shared: Whether others can hold the lock too, if theirs is shared.
        wait: Whether to wait for those who hold the lock.

    Raises:
        BlockingIOError: Another process holds the lock, and `wait` is false.
        OutputError: The file system has no locks, as some network file systems.
    """
    try:
        _take_lock(descriptor, shared=shared, wait=wait)
    except BlockingIOError:
        raise
    except OSError as error:
        raise OutputError(
            f"Expected a file system with locks at {path}; it has none ({error.strerror}), so two processes could "
            f"write there at once. Choose a folder on another file system ({move or mover(path)}), such as that of a "
            "local disk."
        ) from error


def _take_lock(descriptor: int, *, shared: bool, wait: bool) -> None:
    """Lock a file; on Windows a shared lock is the open file itself, which nobody can remove (`remove_unused`)."""
    if sys.platform == "win32":
        while not shared and not _take_byte(descriptor, msvcrt.LK_NBLCK):
            if not wait:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            time.sleep(_LOCK_POLL_SECONDS)
    else:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def _take_byte(descriptor: int, how: int) -> bool:
    """Lock or unlock the byte of a file on Windows; return whether no other process has locked it."""
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, how, 1)
    except PermissionError:
        return False
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)
    return True


def _close_locked(descriptor: int) -> None:
    """Close a file, and end its lock; Windows, if it is not told to, may end it later."""
    if sys.platform == "win32":
        _take_byte(descriptor, msvcrt.LK_UNLCK)
    os.close(descriptor)


def _discard_locked(descriptor: int, path: Path) -> None:
    """Remove a file that this process has locked, if it can be removed, and end the lock."""
    if sys.platform != "win32":
        with suppress(OSError):
            path.unlink()  # before the lock ends, so that nobody's new lock is removed
    _close_locked(descriptor)
    if sys.platform == "win32":
        with suppress(OSError):  # another process has it open, for its lock
            path.unlink()


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one at a path, and was not removed or renamed."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


@contextmanager
def file_lock(path: Path, move: str | None = None, *, wait: bool = True) -> Iterator[int]:
    """Hold an exclusive lock between threads and processes while the block runs; yield the descriptor of its file.

    The system releases the lock when its process ends. The file stays.

    Args:
        path: File of the lock; its folder is created.
        move: That of `output_error`.
        wait: Whether to wait for a process that holds the lock.

    Raises:
        BlockingIOError: Another process holds the lock, and `wait` is false.
        OutputError: The file cannot be written, or its file system has no locks.
    """
    with writing(path, move):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_lockable(path)
    try:
        lock_file(descriptor, path, move, wait=wait)
        yield descriptor
    finally:
        _close_locked(descriptor)


def remove_unused(path: Path) -> bool:
    """Remove a file unless a process holds a lock on it or, on Windows, has it open; return whether it was removed."""
    try:
        if sys.platform == "win32":
            path.unlink()
            removed = True
        else:
            removed = _removed_alone(path)
    except (FileNotFoundError, PermissionError, BlockingIOError):  # renamed, in use, or another user's: it may exist
        removed = False
    return removed


def _removed_alone(path: Path) -> bool:
    """Remove a file under its lock, unless it was renamed before; return whether it was removed."""
    descriptor = os.open(path, os.O_RDWR)  # network file systems give no exclusive lock to readers
    try:
        lock_file(descriptor, path, wait=False)
        if not _is_open_at(descriptor, path):  # its bytes still exist
            return False
        path.unlink()
    finally:
        os.close(descriptor)
    return True


class _Holder(BaseModel):
    """The process that holds a claim.

    Attributes:
        host: Name of its machine.
        process: Its number there.
        since: Time of the claim, UTC, ISO 8601.
        token: Random text that makes the claim unique.
        ended: Whether the process has given up the claim.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    process: int
    since: str
    token: str
    ended: bool = False

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {moment_text(self.since)} UTC"


def _myself() -> _Holder:
    since = datetime.now(UTC).replace(microsecond=0).isoformat()
    return _Holder(host=socket.gethostname(), process=os.getpid(), since=since, token=secrets.token_hex(8))


def _holder(data: bytes) -> _Holder | None:
    """Return who wrote a claim; None if it is empty or damaged."""
    try:
        return _Holder.model_validate_json(data)
    except ValidationError:
        return None


@contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """Hold the claim on a folder while the block runs. The folder is created, and removed again if it stays empty.

    The claim is a lock on a hidden file in the folder. It ends with the block or, whatever happens, with the process.

    Raises:
        OutputError: Another process holds the claim, or the folder cannot be created or written.
    """
    file = folder / _FOLDER_FILE
    with writing(file):
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        descriptor = _locked(file)
    try:
        yield
    finally:
        _discard_locked(descriptor, file)
        with suppress(OSError):  # raised by the first that has results
            for place in made:
                place.rmdir()


def _locked(file: Path) -> int:
    """Create, lock and fill the file of a claim; return its descriptor, which holds the lock."""
    for _ in range(_ATTEMPTS):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _open_lockable(file)
        except FileNotFoundError:  # the previous holder has just removed its empty folder
            continue
        try:
            _lock(descriptor, file)
            if _is_open_at(descriptor, file):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _myself().model_dump_json().encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the previous holder removed the file before it was locked here
    raise OutputError(f"Expected to claim {file.parent}; others took and left it all the time. Repeat the command.")


def _lock(descriptor: int, file: Path) -> None:
    try:
        lock_file(descriptor, file, wait=False)
    except BlockingIOError as error:
        other = _holder(os.read(descriptor, 1 << 12)) or "a process that has just begun"
        raise OutputError(
            f"Expected no other process that writes results to {file.parent}; found one: {other}. Wait until it has "
            "ended or stop it, or name another --out."
        ) from error


class PrefixClaim:
    """A claim on a prefix in a bucket, renewed by a thread until `end`.

    Args:
        bucket: The bucket at the prefix.
        key: Key of the object that represents the claim.
        beat_seconds: Seconds between two renewals.
    """

    def __init__(self, bucket: Bucket, key: str, beat_seconds: float = _BEAT_SECONDS) -> None:
        self._bucket = bucket
        self._key = key
        self._beat_seconds = beat_seconds
        self._myself = _myself()
        self._over = threading.Event()
        self._taken: str | None = None
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)

    def begin(self) -> None:
        """Take the claim. Raises `OutputError` if another process holds it."""
        for _ in range(_ATTEMPTS):
            try:
                self._take()
            except ObjectExistsError:  # another process was faster; see who
                continue
            self._thread.start()
            return
        raise OutputError(f"Expected to claim {self._bucket.uri}; others took it all the time. Repeat the command.")

    def check(self) -> None:
        """Raise `OutputError` if another process has taken the claim, because it could not be renewed in time."""
        if self._taken is not None:
            raise OutputError(
                f"Expected to be the only process that writes to {self._bucket.uri}; this one could not renew its "
                f"claim for {CLAIM_LOST_SECONDS / 60:g} minutes, and found it taken: {self._taken}. Repeat the command "
                "when that process has ended."
            )

    def end(self) -> None:
        """Give up the claim."""
        self._over.set()
        self._thread.join(_LAST_WRITE_SECONDS)  # a bucket that does not answer must not delay the end

    def _take(self) -> None:
        try:
            data, tag = self._bucket.get_tagged(self._key)
        except ObjectNotFoundError:
            self._bucket.put(self._key, self._myself.model_dump_json().encode(), if_absent=True)
            return
        other = _holder(data)
        if other is not None and not other.ended:
            self._refuse(other)
        self._bucket.put(self._key, self._myself.model_dump_json().encode(), if_match=tag)

    def _refuse(self, other: _Holder) -> None:
        """Raise `OutputError` unless the holder of the claim has not renewed it for too long."""
        stored = self._bucket.find(self._key)
        ahead = self._bucket.seconds_ahead() or 0.0
        now = datetime.now(UTC) - timedelta(seconds=ahead)
        if stored is None or (now - stored.modified).total_seconds() > CLAIM_LOST_SECONDS:
            return
        raise OutputError(
            f"Expected no other process that writes results to {self._bucket.uri}; found one: {other}, last heard of "
            f"at {moment_text(stored.modified)} UTC. Wait until it has ended (a killed one counts for "
            f"{CLAIM_LOST_SECONDS / 60:g} minutes), or name another --out."
        )

    def _renew(self) -> None:
        while self._taken is None:
            over = self._over.wait(self._beat_seconds)
            with suppress(Exception):  # the bucket may be out of reach; the claim then ends by itself
                self._write(self._myself.model_copy(update={"ended": over}))
            if over:
                return

    def _write(self, holder: _Holder) -> None:
        """Write the claim if it is still this process's; else remember whose it is."""
        data, tag = self._bucket.get_tagged(self._key)
        found = _holder(data)
        if found is not None and found.token == self._myself.token:
            self._bucket.put(self._key, holder.model_dump_json().encode(), if_match=tag)
        else:
            self._taken = str(found or "a damaged claim")


@contextmanager
def claimed_prefix(bucket: Bucket, key: str, beat_seconds: float = _BEAT_SECONDS) -> Iterator[PrefixClaim]:
    """Hold the claim on a prefix in a bucket while the block runs; provide it, so that the block can `check` it.

    Args:
        bucket: The bucket at the prefix.
        key: Key of the object that represents the claim.
        beat_seconds: Seconds between two renewals.

    Raises:
        OutputError: Another process holds the claim.
        StorageError: The bucket cannot be read or written.
    """
    claim = PrefixClaim(bucket, key, beat_seconds)
    claim.begin()
    try:
        yield claim
    finally:
        claim.end()
