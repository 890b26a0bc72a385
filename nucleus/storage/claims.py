"""Claims on a place for results, so that two processes never write to one folder or prefix at the same time.

A folder is claimed by a lock of the operating system, which ends with its process. A prefix in a bucket is claimed by
an object that its holder writes again every minute; a claim that is not renewed belongs to a process that is gone.
"""

import fcntl
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from nucleus.errors import ObjectExistsError, ObjectNotFoundError, OutputError
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import lock_file, writing
from nucleus.text import moment_text

__all__ = ["CLAIM_LOST_SECONDS", "PrefixClaim", "claimed_folder", "claimed_prefix"]

_FOLDER_FILE = ".nucleus-claim"
_ATTEMPTS = 20
_BEAT_SECONDS = 60.0
_LAST_WRITE_SECONDS = 10.0
CLAIM_LOST_SECONDS = 300.0
"""Seconds without renewal after which a claim in a bucket ends: its holder was killed, or cannot reach the bucket."""


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
        with suppress(OSError):
            file.unlink()  # before the lock ends, so that nobody's new claim is removed
        os.close(descriptor)
        with suppress(OSError):  # raised by the first that has results
            for place in made:
                place.rmdir()


def _locked(file: Path) -> int:
    """Create, lock and fill the file of a claim; return its descriptor, which holds the lock."""
    for _ in range(_ATTEMPTS):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the previous holder has just removed its empty folder
            continue
        try:
            _lock(descriptor, file)
            if _is_at(descriptor, file):
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
        lock_file(descriptor, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        other = _holder(os.pread(descriptor, 1 << 12, 0)) or "a process that has just begun"
        raise OutputError(
            f"Expected no other process that writes results to {file.parent}; found one: {other}. Wait until it has "
            "ended or stop it, or name another --out."
        ) from error


def _is_at(descriptor: int, file: Path) -> bool:
    """Return whether an open file is the one at a path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), file.stat())
    return False


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
