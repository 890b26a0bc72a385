"""A local cache of dataset shards, shared by the processes of one machine."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from nucleus.data.datasets import Dataset
from nucleus.data.manifest import Shard
from nucleus.errors import IntegrityError, ObjectNotFoundError
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import sha256_of

__all__ = ["default_cache_dir", "fetch_shards"]

_CONNECTIONS = 8


def default_cache_dir() -> Path:
    """The user's cache folder for this program."""
    return Path(user_cache_path("nucleus"))


def fetch_shards(dataset: Dataset, shards: list[Shard], cache_dir: Path) -> list[Path]:
    """Bring shards to local disk, each once a machine; return their paths in the same order.

    A shard that is there already is used if its SHA-256 is right, and fetched anew if not.

    Raises:
        IntegrityError: A shard in the bucket is missing or damaged.
    """
    folder = cache_dir / "datasets" / dataset.uri.bucket / dataset.uri.key / dataset.manifest.version
    bucket = Bucket(dataset.version_uri)
    folder.mkdir(parents=True, exist_ok=True)

    def fetch(shard: Shard) -> Path:
        path = folder / shard.file
        with FileLock(folder / f".{shard.file}.lock"):
            if not (path.exists() and path.stat().st_size == shard.size and sha256_of(path) == shard.sha256):
                try:
                    bucket.download(shard.file, path, sha256=shard.sha256)
                except ObjectNotFoundError as error:
                    raise IntegrityError(f"{dataset} has lost {shard.file}. Import it again.") from error
        return path

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(fetch, shards))
