"""Two processes and one place for results: one of them writes, the other is told who does; the dead do not count."""

import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from nucleus.errors import OutputError
from nucleus.storage import claims
from nucleus.storage.bucket import Bucket, StoredObject
from nucleus.storage.claims import CLAIM_LOST_SECONDS, claimed_folder, claimed_prefix

KEY = "prediction.claim.json"


@contextmanager
def other_process(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the claim on a folder until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from nucleus.storage.claims import claimed_folder\n"
        "with claimed_folder(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_folder_has_one_holder_who_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with other_process(folder) as process:
        with pytest.raises(OutputError) as caught, claimed_folder(folder):
            pass
        for fact in (str(folder), f"process {process.pid} on {socket.gethostname()}", "--out"):
            assert fact in str(caught.value)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with claimed_folder(folder):  # the claim of a dead process does not count
            (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_one_process_holds_a_folder_once(tmp_path: Path) -> None:
    with claimed_folder(tmp_path):
        with pytest.raises(OutputError, match=f"process {os.getpid()} "), claimed_folder(tmp_path):
            pass
        with pytest.raises(OutputError), claimed_folder(tmp_path):  # the refusal has not ended the claim
            pass
    with claimed_folder(tmp_path):
        pass


def test_folders_that_stay_empty_are_removed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for folder in ("a/b/c", "old"):
        with claimed_folder(tmp_path / folder):
            assert (tmp_path / folder).is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    with pytest.raises(ValueError, match="failed"), claimed_folder(tmp_path / "a/b"):
        raise ValueError("failed")
    assert not (tmp_path / "a").exists()


def test_a_file_that_is_removed_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a file that the previous holder has just removed would keep nobody out."""
    lock, removed = claims._lock, []

    def late(descriptor: int, file: Path) -> None:
        if not removed:
            file.unlink()
            removed.append(file)
        lock(descriptor, file)

    monkeypatch.setattr(claims, "_lock", late)
    with claimed_folder(tmp_path), pytest.raises(OutputError), claimed_folder(tmp_path):
        pass
    assert removed


def contend(folder: Path, number: int) -> int:
    """Take a claim until it was held a number of times, and be alone with a file while it is."""
    held = 0
    while held < number:
        try:
            with claimed_folder(folder):
                alone = os.open(folder / "alone", os.O_CREAT | os.O_EXCL)
                held += 1
                os.close(alone)
                (folder / "alone").unlink()
        except OutputError:
            continue
    return held


def test_many_at_once(tmp_path: Path) -> None:
    """The file of the claim is removed and made again all the time; never do two processes hold it."""
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        held = pool.starmap(contend, [(tmp_path / "out", 100)] * 3)
    assert held == [100] * 3


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_place_of_the_folder(below: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("results of another program")
    with pytest.raises(OutputError, match=r"out; it is a file"), claimed_folder(tmp_path / "out" / below):
        pass
    assert (tmp_path / "out").read_text() == "results of another program"


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OutputError, match="Function not implemented"), claimed_folder(tmp_path / "out"):
        pass


def test_a_prefix_has_one_holder_who_is_named(bucket: Bucket) -> None:
    with claimed_prefix(bucket, KEY):
        with pytest.raises(OutputError) as caught, claimed_prefix(Bucket(bucket.uri), KEY):
            pass
        for fact in (str(bucket.uri), f"process {os.getpid()} on {socket.gethostname()}", "--out"):
            assert fact in str(caught.value)
    with claimed_prefix(Bucket(bucket.uri), KEY) as claim:
        claim.check()


def test_claims_that_are_not_renewed_end(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder may have been killed; if it was only slow, it learns that it has lost its claim, and leaves it so."""
    find = Bucket.find

    def long_ago(self: Bucket, key: str) -> StoredObject | None:
        found = find(self, key)
        age = timedelta(seconds=CLAIM_LOST_SECONDS + 1)
        return found and StoredObject(found.key, found.size, found.modified - age, found.etag)

    with claimed_prefix(bucket, KEY, beat_seconds=3600) as slow:
        monkeypatch.setattr(Bucket, "find", long_ago)
        with claimed_prefix(Bucket(bucket.uri), KEY, beat_seconds=3600) as new:
            monkeypatch.setattr(Bucket, "find", find)
            slow.end()
            with pytest.raises(OutputError, match="found it taken: process"):
                slow.check()
            new.check()
            with pytest.raises(OutputError), claimed_prefix(Bucket(bucket.uri), KEY):
                pass


def test_claims_are_renewed(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed = threading.Semaphore(0)
    put = Bucket.put

    def count(self: Bucket, key: str, *args: object, **options: object) -> str:
        tag = put(self, key, *args, **options)  # type: ignore[arg-type]
        renewed.release()
        return tag

    monkeypatch.setattr(Bucket, "put", count)
    with claimed_prefix(bucket, KEY, beat_seconds=0.01) as claim:
        for _ in range(4):
            assert renewed.acquire(timeout=600)
        claim.check()


def test_damaged_claims_do_not_block(bucket: Bucket) -> None:
    bucket.put(KEY, b"{")
    with claimed_prefix(bucket, KEY) as claim:
        claim.check()
