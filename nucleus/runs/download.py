"""Download of a run's report, and of the W&B files that were kept offline."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from nucleus.errors import IntegrityError, JobError, UsageError
from nucleus.progress import Advance, no_progress
from nucleus.runs.plan import WANDB_FOLDER, RunFolder
from nucleus.runs.record import REPORT_FOLDER
from nucleus.storage.bucket import Bucket

__all__ = ["download_report", "names_below"]


_AT_ONCE = 8
"""Files that are downloaded in parallel."""


def download_report(bucket: Bucket, run: str, folder: Path, advance: Advance = no_progress) -> list[Path]:
    """Download a run's report into a folder, each file atomically; return the paths of the files.

    W&B's files that were kept offline go to `wandb/` in the folder, ready for `wandb sync`. Files of an earlier
    download are replaced.

    Args:
        bucket: The project's bucket.
        run: Name of the run.
        folder: A folder that does not exist, is empty, or holds only files of this report.
        advance: Called with the number of files downloaded, and their total number.

    Raises:
        JobError: The run has no report.
        UsageError: The folder holds other files; nothing is changed.
        IntegrityError: An object's key would be a file outside the folder.
    """
    home = RunFolder(bucket, run)
    report = f"{home.key(REPORT_FOLDER)}/"
    names = names_below(bucket, report)
    if not names:
        raise JobError(
            f"Expected a report at {bucket.uri / report}; found none: a run writes it at its end. "
            f"Run: nucleus runs show {run}"
        )
    offline = f"{home.key(WANDB_FOLDER)}/"
    keys = {folder / name: report + name for name in names}
    keys |= {folder / WANDB_FOLDER / name: offline + name for name in names_below(bucket, offline)}
    _check_replaceable(folder, keys, run)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        downloads = pool.map(lambda path: bucket.download(keys[path], path), keys)
        for done, _ in enumerate(downloads, start=1):
            advance(done, len(keys))
    return list(keys)


def names_below(bucket: Bucket, prefix: str) -> list[str]:
    """Return the keys below a prefix, relative to it, and safe as relative paths of files on disk.

    Raises:
        IntegrityError: A key would be a file outside the folder.
    """
    return [_checked(bucket, prefix, item.key.removeprefix(prefix)) for item in bucket.objects(prefix)]


def _checked(bucket: Bucket, prefix: str, name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name:
        raise IntegrityError(f"Expected the files of a report below {bucket.uri / prefix}; found the key {name!r}.")
    return name


def _check_replaceable(folder: Path, paths: Iterable[Path], run: str) -> None:
    if not folder.exists():
        return
    expected = set(paths)
    if not folder.is_dir() or any(not path.is_dir() and path not in expected for path in folder.rglob("*")):
        raise UsageError(
            f"Expected {folder} to be new, empty or a copy of the report of {run}; it holds other files. "
            "Choose another folder."
        )
