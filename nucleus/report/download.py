"""A run's report on this machine: the page, its pictures and the record, as they lie in the bucket."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from nucleus.errors import IntegrityError, JobError, UsageError
from nucleus.progress import Advance, no_progress
from nucleus.report.record import REPORT_FOLDER
from nucleus.storage.bucket import Bucket

__all__ = ["download_report"]

_AT_ONCE = 8


def download_report(bucket: Bucket, run: str, folder: Path, advance: Advance = no_progress) -> list[Path]:
    """Bring a run's report into a folder, each file whole or not at all; give the files, in order.

    What an earlier download brought is replaced.

    Args:
        bucket: The project's.
        run: The run.
        folder: Is absent, empty, or holds nothing but files of this report.
        advance: Is told how many files are there.

    Raises:
        JobError: The run has left no report.
        UsageError: The folder holds other files, which are left as they are.
        IntegrityError: An object's key does not name a file in the folder.
    """
    prefix = f"runs/{run}/{REPORT_FOLDER}/"
    names = [_checked(bucket, prefix, item.key.removeprefix(prefix)) for item in bucket.objects(prefix)]
    if not names:
        raise JobError(
            f"Expected a report at {bucket.uri / prefix}; there is none: a run writes it at its end. "
            f"Run: nucleus runs show {run}"
        )
    _check_replaceable(folder, names, run)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done, _ in enumerate(pool.map(lambda name: bucket.download(prefix + name, folder / name), names), start=1):
            advance(done, len(names))
    return [folder / name for name in names]


def _checked(bucket: Bucket, prefix: str, name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name:
        raise IntegrityError(f"Expected the files of a report below {bucket.uri / prefix}; found the key {name!r}.")
    return name


def _check_replaceable(folder: Path, names: Iterable[str], run: str) -> None:
    if not folder.exists():
        return
    expected = {folder / name for name in names}
    if not folder.is_dir() or any(not path.is_dir() and path not in expected for path in folder.rglob("*")):
        raise UsageError(
            f"Expected {folder} to be absent, empty or a copy of the report of {run}; it holds other files. "
            "Name another folder."
        )
