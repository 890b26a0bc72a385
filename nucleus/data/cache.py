"""A local cache of dataset shards, shared by the processes of one machine, with a limit.

A file under its shard's name is whole. Whoever reads a shard holds a shared lock on the file and whoever writes one an
exclusive lock, so what is not locked may be evicted, the least recently used first; the kernel releases the locks of a
process that dies. A download reserves its room by making its file as long as it will be.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from platformdirs import user_cache_path

from nucleus.config.recipe import DEFAULT_CACHE_LIMIT_GIB
from nucleus.data.dataset import Dataset, Shard
from nucleus.data.shards import ShardFile
from nucleus.errors import CacheFullError, IntegrityError, ObjectNotFoundError
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import sha256_of

__all__ = ["ShardCache", "default_cache_dir"]

_GIB = 1 << 30
# In this order: a file that is renamed between the two is then counted, if twice.
_PATTERNS = (".*.tfrecord.part", "*.tfrecord")
_PART = ".part"
_NOTE_BYTES = 24
_WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.2

# Files that this process has compared with their SHA-256, by device, inode and size.
_verified: set[tuple[int, int, int]] = set()


def default_cache_dir() -> Path:
    """The user's cache folder for this program."""
    return Path(user_cache_path("nucleus"))


@dataclass(frozen=True)
class _Entry:
    used: float
    size: int
    path: Path


class ShardCache:
    """Shards on local disk.

    Args:
        folder: The cache folder; shards lie below its `datasets`.
        limit_gib: Upper bound of their size, GiB.
        wait_seconds: How long to wait for room while everything is in use.
    """

    def __init__(
        self, folder: Path, limit_gib: float = DEFAULT_CACHE_LIMIT_GIB, *, wait_seconds: float = _WAIT_SECONDS
    ) -> None:
        self._folder = folder / "datasets"
        self._limit = int(limit_gib * _GIB)
        self._wait_seconds = wait_seconds
        self._bucket = lru_cache(maxsize=1)(Bucket)  # one client for all shards of a dataset

    def open(self, dataset: Dataset, shard: Shard) -> ShardFile:
        """Open a shard, fetched first if it is not there; one process of the machine fetches, the others wait.

        A shard that is there is used if its SHA-256 is right, and fetched anew if not. It stays in the cache as long
        as it is open.

        Raises:
            IntegrityError: The shard in the bucket is missing or damaged.
            CacheFullError: There is no room for it.
        """
        path = self._folder / dataset.uri.bucket / dataset.uri.key / dataset.manifest.version / shard.file
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = None
        while descriptor is None:
            descriptor = _open_verified(path, shard) or self._fetch(dataset, shard, path)
        os.utime(descriptor)
        return ShardFile(descriptor, str(path))

    def _fetch(self, dataset: Dataset, shard: Shard, path: Path) -> int | None:
        """Download a shard and return its descriptor, with a shared lock; None if another process was faster.

        The file that is written is also the lock; what a dead process left in it is written over.
        """
        beside = path.with_name(f".{path.name}{_PART}")
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, beside) or path.exists():
                if _is_at(descriptor, beside):
                    beside.unlink()
                os.close(descriptor)
                return None
            self._reserve(descriptor, shard.size)
            try:
                with os.fdopen(os.dup(descriptor), "wb") as file:
                    self._bucket(dataset.version_uri).read_into(shard.file, file, sha256=shard.sha256)
            except ObjectNotFoundError as error:
                raise IntegrityError(f"{dataset} has lost {shard.file}. Import it again.") from error
            beside.replace(path)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            beside.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        _verified.add(_identity(descriptor))
        return descriptor

    def _reserve(self, descriptor: int, size: int) -> None:
        """Make a file as long as it will be, when there is room for it."""
        deadline = time.monotonic() + self._wait_seconds
        while True:
            with _locked(self._folder / ".lock") as note:
                if self._make_room(note, size):
                    os.truncate(descriptor, 0)
                    os.truncate(descriptor, size)
                    return
            if time.monotonic() > deadline or size > self._limit:
                raise CacheFullError(
                    f"Expected room for {size / _GIB:.3g} GiB in the cache {self._folder}; its limit of "
                    f"{self._limit / _GIB:.3g} GiB is taken by shards in use. Set cache_limit_gib higher."
                )
            time.sleep(_POLL_SECONDS)

    def _make_room(self, note: int, size: int) -> bool:
        """Make room for `size` bytes and note that they are taken.

        The file `note` holds an upper bound of the bytes in the cache, so that most calls need not look at its files.
        What failed downloads gave back is missing from it until files are next looked at.
        """
        text = os.pread(note, _NOTE_BYTES, 0)
        total = int(text) if text else self._limit
        if total + size > self._limit:
            total = self._evict(size)
        fits = total + size <= self._limit
        os.pwrite(note, str(total + size if fits else total).rjust(_NOTE_BYTES).encode(), 0)
        return fits

    def _evict(self, size: int) -> int:
        """Remove what dead processes left, then the least recently used, until `size` bytes fit; give the sum left."""
        entries = sorted(_entries(self._folder).values(), key=lambda entry: entry.used)
        total = sum(entry.size for entry in entries)
        for entry in entries:
            left_over = entry.path.name.endswith(_PART)
            if (left_over or total + size > self._limit) and _remove_unused(entry.path):
                total -= entry.size
        return total


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a lock over threads and processes; gives the file's descriptor.

    Waits in the kernel: `filelock` looks every 50 ms, which made many short waits slow.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _entries(folder: Path) -> dict[int, _Entry]:
    """The files of the cache by inode."""
    found = {}
    for path in (path for pattern in _PATTERNS for path in folder.rglob(pattern)):
        try:
            status = path.stat()
        except FileNotFoundError:  # renamed or removed meanwhile
            continue
        found[status.st_ino] = _Entry(status.st_mtime, status.st_size, path)
    return found


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process has it locked; return whether that was done."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # renamed, perhaps: its bytes may still be there
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(descriptor, path):  # renamed since it was opened, and let go: its bytes are still there
            return False
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _open_verified(path: Path, shard: Shard) -> int | None:
    """Open a cached shard with a shared lock; None, and nothing at `path`, if it is not there or not right."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    identity = _identity(descriptor)
    if identity not in _verified:
        if os.fstat(descriptor).st_size != shard.size or sha256_of(path) != shard.sha256:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        _verified.add(identity)
    return descriptor


def _identity(descriptor: int) -> tuple[int, int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size
