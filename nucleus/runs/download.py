"""Download of what a run has left for people: its report, and the files that W&B has not been sent."""

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


def download_report(bucket: Bucket, run: str, folder: Path, advance: Advance = no_progress) -> list[Path]:
    """Download a run's report into a folder, each file whole or not at all; return the files, in order.

    Files that W&B has not been sent go to the folder's `wandb/`, ready for `wandb sync`. Those of an earlier download
    are replaced.

    Args:
        bucket: The project's bucket.
        run: Name of the run.
        folder: A folder that is absent, empty, or holds nothing but files of this report.
        advance: Called with how many files are there, of how many.

    Raises:
        JobError: The run has left no report.
        UsageError: The folder holds other files, which are left as they are.
        IntegrityError: An object's key does not name a file in the folder.
    """
    home = RunFolder(bucket, run)
    report = f"{home.key(REPORT_FOLDER)}/"
    names = names_below(bucket, report)
    if not names:
        raise JobError(
            f"Expected a report at {bucket.uri / report}; there is none: a run writes it at its end. "
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
    """Keys of the objects below a folder, relative to it, checked as names of files for a folder on disk.

    Raises:
        IntegrityError: A key does not name a file in it.
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
            f"Expected {folder} to be absent, empty or a copy of the report of {run}; it holds other files. "
            "Name another folder."
        )
