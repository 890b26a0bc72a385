"""Local cache of dataset shards with a size limit, shared by the processes of a machine.

A file with the name of a shard is always complete. Readers of a shard hold a shared lock on its file, so files without
a lock can be evicted, the least recently used first. Who downloads or evicts a shard holds the lock beside it. The
system releases the locks of a process that dies. A download reserves space by extending its file to the final size.

Beside a shard may lie a file of its decoded records (`decoded`), which is made empty and filled as records are needed.
It counts with its final size, and is locked and evicted as shards are.
"""

import logging
import os
import time
from dataclasses import dataclass
from functools import cache as once
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nucleus.config.recipe import DEFAULT_CACHE_LIMIT_GIB
from nucleus.data.dataset import DATASETS, Dataset, Shard
from nucleus.data.decoded import DecodedFile, decoded_bytes
from nucleus.data.shards import ShardFile
from nucleus.errors import CacheFullError, IntegrityError, ObjectNotFoundError, OutputError
from nucleus.storage.bucket import Bucket
from nucleus.storage.claims import file_lock, lock_file, remove_unused
from nucleus.storage.files import sha256_of, writing
from nucleus.storage.uri import local_path
from nucleus.surroundings import BINARY, cache_folder

__all__ = ["ShardCache"]

_log = logging.getLogger(__name__)
_GIB = 1 << 30
_PIXELS = ".pixels"
# In this order, a file that is renamed between the two searches is found (perhaps twice).
_PATTERNS = (".*.tfrecord.part", f".*{_PIXELS}.part", "*.tfrecord", f"*{_PIXELS}")
_PART, _LOCK = ".part", ".lock"
_NOTE_BYTES = 24
_WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.2

# Files whose SHA-256 this process has verified, by device, inode and size.
_verified: set[tuple[int, int, int]] = set()


@dataclass(frozen=True)
class _Entry:
    used: float
    size: int
    path: Path


class ShardCache:
    """Cache of dataset shards on the local disk.

    Args:
        folder: Folder of the cache; shards are stored below `datasets` in it. This program's folder for caches if not
            given (`nucleus.surroundings.cache_folder`, with its errors).
        limit_gib: Size limit of the shards, GiB.
        wait_seconds: How long to wait for space while all shards are in use.
    """

    def __init__(
        self,
        folder: Path | None = None,
        limit_gib: float = DEFAULT_CACHE_LIMIT_GIB,
        *,
        wait_seconds: float = _WAIT_SECONDS,
    ) -> None:
        self._folder = (folder or cache_folder()) / DATASETS
        self._limit = int(limit_gib * _GIB)
        self._wait_seconds = wait_seconds
        self._bucket = lru_cache(maxsize=8)(Bucket)  # one client for all shards of a dataset

    @property
    def limit(self) -> int:
        """Size limit, bytes."""
        return self._limit

    def open(self, dataset: Dataset, shard: Shard, sizes: NDArray[np.int64] | None = None) -> ShardFile:
        """Open a shard; if it is missing, one process of the machine downloads it while the others wait.

        The SHA-256 of a cached shard is verified; a damaged shard is downloaded again. An open shard is not evicted.

        Args:
            dataset: The dataset.
            shard: One of its shards.
            sizes: Height and width of each record, N x 2, if its decoded records are to be kept beside it. They are
                not where other files, which are in use, leave no space.

        Raises:
            IntegrityError: The shard in the bucket is missing or damaged.
            CacheFullError: The limit leaves no space for it.
            OutputError: The disk is full, or the folder of the cache cannot be written or has no locks.
        """
        path = self._folder / local_path(dataset.version_uri / shard.file)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = None
            while descriptor is None:
                descriptor = _open_verified(path, shard) or self._fetch(dataset, shard, path)
            os.utime(path)
            pixels = None if sizes is None else self._open_pixels(path.with_suffix(_PIXELS), shard, sizes)
        return ShardFile(descriptor, str(path), pixels)

    def _open_pixels(self, path: Path, shard: Shard, sizes: NDArray[np.int64]) -> DecodedFile | None:
        """Open the file of decoded records; a missing one is made, a damaged one is replaced. None: no space."""
        while True:
            descriptor = _open_locked(path, os.O_RDWR)
            if descriptor is None:
                if not self._create_pixels(path, shard, sizes):
                    return None
                continue
            os.utime(path)
            try:
                return DecodedFile(descriptor, shard.sha256, sizes)
            except IntegrityError:
                path.unlink(missing_ok=True)

    def _create_pixels(self, path: Path, shard: Shard, sizes: NDArray[np.int64]) -> bool:
        """Make an empty file of decoded records, unless another process was faster; return whether there was space."""
        beside = path.with_name(f".{path.name}{_PART}")
        with file_lock(_lock_of(path)):
            try:
                if not path.exists():
                    with beside.open("wb") as file:
                        self._reserve(file.fileno(), decoded_bytes(sizes), wait_seconds=0)
                        DecodedFile.create(file.fileno(), shard.sha256, sizes)
                    beside.replace(path)
            except CacheFullError:
                beside.unlink(missing_ok=True)
                _note_lack_of_space()
                return False
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
        return True

    def _fetch(self, dataset: Dataset, shard: Shard, path: Path) -> int | None:
        """Download a shard, unless another process was faster, and open it; None if it is damaged since then."""
        beside = path.with_name(f".{path.name}{_PART}")
        with file_lock(_lock_of(path)):
            try:
                if not path.exists():
                    self._download(dataset, shard, beside)
                    beside.replace(path)
                return _open_verified(path, shard)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise

    def _download(self, dataset: Dataset, shard: Shard, beside: Path) -> None:
        """Download a shard to a partial file; data that a dead process left in it is overwritten."""
        try:
            with beside.open("wb") as file:
                self._reserve(file.fileno(), shard.size, self._wait_seconds)
                self._bucket(dataset.version_uri).read_into(shard.file, file, sha256=shard.sha256)
                _verified.add(_identity(file.fileno()))
        except ObjectNotFoundError as error:
            raise IntegrityError(
                f"Expected {shard.file} of {dataset} in the bucket; it is missing. Import the images again."
            ) from error

    def _reserve(self, descriptor: int, size: int, wait_seconds: float) -> None:
        """Extend a file to its final size as soon as there is space for it."""
        deadline = time.monotonic() + wait_seconds
        while True:
            with file_lock(self._folder / _LOCK) as note:
                if self._make_room(note, size):
                    os.ftruncate(descriptor, size)
                    return
            if time.monotonic() > deadline or size > self._limit:
                raise CacheFullError(
                    f"Expected space for {size / _GIB:.3g} GiB in the cache {self._folder}; its limit of "
                    f"{self._limit / _GIB:.3g} GiB is taken by shards in use. Raise cache_limit_gib."
                )
            time.sleep(_POLL_SECONDS)

    def _make_room(self, note: int, size: int) -> bool:
        """Make space for `size` bytes and record that they are taken; return whether that was possible.

        The file `note` contains an upper bound of the bytes in the cache, so that most calls need not list its files.
        Bytes that failed downloads released count as taken until the files are listed again.
        """
        text = os.read(note, _NOTE_BYTES)
        total = int(text) if text else self._limit
        if total + size > self._limit:
            total = self._evict(size)
        fits = total + size <= self._limit
        os.lseek(note, 0, os.SEEK_SET)
        os.write(note, str(total + size if fits else total).rjust(_NOTE_BYTES).encode())
        return fits

    def _evict(self, size: int) -> int:
        """Remove partial files of dead processes, then the least recently used shards, until `size` bytes fit.

        Returns the bytes that remain.
        """
        entries = sorted(_entries(self._folder).values(), key=lambda entry: entry.used)
        total = sum(entry.size for entry in entries)
        for entry in entries:
            left_over = entry.path.name.endswith(_PART)
            if (left_over or total + size > self._limit) and _remove_unused(entry.path):
                total -= entry.size
        return total


@once
def _note_lack_of_space() -> None:
    """Say once a process that decoded images are not kept."""
    _log.warning(
        "Files in use leave no space in the cache for decoded images; some are decoded for every crop, which takes "
        "several times as long. Raise cache_limit_gib."
    )


def _entries(folder: Path) -> dict[int, _Entry]:
    """Return the files of the cache by inode."""
    found = {}
    for path in (path for pattern in _PATTERNS for path in folder.rglob(pattern)):
        try:
            status = path.stat()
        except FileNotFoundError:  # renamed or removed since it was listed
            continue
        found[status.st_ino] = _Entry(status.st_mtime, status.st_size, path)
    return found


def _lock_of(path: Path) -> Path:
    """Return the file of the lock of a shard, by its path or that of its partial file."""
    return path.with_name(f".{path.name.removeprefix('.').removesuffix(_PART)}{_LOCK}")


def _remove_unused(path: Path) -> bool:
    """Remove a shard or partial file unless a process reads or downloads it; return whether it was removed."""
    try:
        with file_lock(_lock_of(path), wait=False):
            return remove_unused(path)
    except (BlockingIOError, OutputError):  # the file may be another user's
        return False


def _open_verified(path: Path, shard: Shard) -> int | None:
    """Open a cached shard with a shared lock; None if it is missing or damaged. A damaged file is removed."""
    descriptor = _open_locked(path, os.O_RDONLY)
    if descriptor is None:
        return None
    identity = _identity(descriptor)
    if identity not in _verified:
        if os.fstat(descriptor).st_size != shard.size or sha256_of(path) != shard.sha256:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        _verified.add(identity)
    return descriptor


def _open_locked(path: Path, flags: int) -> int | None:
    """Open a file with a shared lock; None if it is missing."""
    try:
        descriptor = os.open(path, flags | BINARY)
    except FileNotFoundError:
        return None
    try:
        lock_file(descriptor, path, shared=True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _identity(descriptor: int) -> tuple[int, int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size
