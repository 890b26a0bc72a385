"""Requests to the bucket over a line that fails: repeated until they succeed, or an error after the storage timeout.

Retries go by a clock that the test drives: waits take no time, and what is asserted is attempts and seconds waited.
"""

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from nucleus.cli.main import cli
from nucleus.config.names import Reference
from nucleus.data.dataset_storage import verify_dataset
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.errors import ObjectExistsError, TransientStorageError, UncertainWriteError
from nucleus.registry.manifest import list_versions
from nucleus.registry.publish import publish
from nucleus.registry.versions import pull
from nucleus.storage.bucket import Bucket
from nucleus.storage.local_server import RunningStore
from nucleus.storage.retries import set_retry_clock, set_storage_timeout
from tests.faults.proxy import PASSING, Fault, Request, proxied, seldom
from tests.small_model import origin

HELD = 3600.0
"""Seconds for which a stalled request is held: whoever waits for its answer does not end before the test's timeout."""


class DrivenClock:
    """A clock that only sleeping advances, in each thread on its own: threads wait beside each other.

    Attributes:
        waits: The seconds of each sleep, in all threads.
    """

    def __init__(self) -> None:
        self.waits: list[float] = []
        self._of_thread = threading.local()

    def monotonic(self) -> float:
        return getattr(self._of_thread, "now", 0.0)

    def sleep(self, seconds: float) -> None:
        self._of_thread.now = self.monotonic() + seconds + 1e-9  # never less than asked, as on a real clock
        self.waits.append(seconds)


@pytest.fixture(autouse=True)
def clock() -> Iterator[DrivenClock]:
    """The clock of this process's retries; silence counts as failure after 20 s of the real one."""
    driven = DrivenClock()
    set_storage_timeout(60.0)
    set_retry_clock(driven)
    yield driven
    set_retry_clock(time)


def test_one_request_in_ten_fails(
    store: RunningStore, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {f"k{number}": hashlib.sha256(str(number).encode()).digest() * 2000 for number in range(40)}
    set_storage_timeout(9.0)
    with proxied(store.port, seldom(0.1, seed=1), stall_seconds=HELD) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        for key, content in contents.items():
            bucket.put(key, content, if_absent=True)
        assert {item.key for item in bucket.objects("")} == set(contents)
        for key, content in contents.items():
            assert bucket.get(key) == content
            bucket.download(key, tmp_path / key, sha256=hashlib.sha256(content).hexdigest())
        assert set(proxy.met) == set(PASSING)


@pytest.mark.parametrize("fault", PASSING)
def test_every_request_fails(
    store: RunningStore,
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    clock: DrivenClock,
) -> None:
    """Each is repeated, once after each wait, until the clock shows that the timeout has passed."""
    seconds = 1.2 if fault is Fault.STALL else 60.0  # a server of low priority may be silent for 20 s of the real clock
    set_storage_timeout(seconds)
    with proxied(store.port, seldom(1.0, 0, (fault,)), stall_seconds=HELD) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        requests = [
            lambda: bucket.get("x"),
            lambda: bucket.download("x", tmp_path / "x"),
            lambda: list(bucket.objects("")),
            lambda: bucket.put("x", b"1"),
        ]
        if fault in {Fault.TRUNCATE, Fault.SHORT}:
            del requests[-1]  # its answer has no body that could break off
        for request in requests:
            clock.waits.clear()
            before = proxy.requests
            with pytest.raises(TransientStorageError, match="nucleus --storage-timeout"):
                request()
            assert sum(clock.waits) == pytest.approx(seconds)
            attempts = len(clock.waits) + 1
            while fault is Fault.STALL and proxy.requests - before < attempts:  # the last may not have been seen yet
                time.sleep(0.01)
            assert 2 < attempts == proxy.requests - before


def test_a_write_whose_answer_was_lost_is_ours(
    store: RunningStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_lost(request: Request) -> Fault | None:
        return Fault.RESET_AFTER if request.number == 0 else None

    with proxied(store.port, first_lost) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        tag = bucket.put("mine", b"my words", if_absent=True)
        assert bucket.get_tagged("mine") == (b"my words", tag)
    with proxied(store.port, first_lost) as proxy:
        other = Bucket(bucket.uri)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with pytest.raises(ObjectExistsError):
            other.put("mine", b"other words", if_absent=True)
        assert other.get("mine") == b"my words"


def test_import_publish_and_pull_over_a_bad_line(
    store: RunningStore, bucket: Bucket, dozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.json").write_text("{}")
    (folder / "model.weights.h5").write_bytes(bytes(range(256)) * 4000)
    set_storage_timeout(9.0)
    with proxied(store.port, seldom(0.1, seed=2), stall_seconds=HELD) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        dataset = import_dataset(dozen, bucket.uri / "datasets" / "d", SplitOptions()).dataset
        for number in range(3):
            publish(bucket, "m", folder, origin(f"run-{number}"))
        pull(bucket, Reference("m"), tmp_path / "pulled")
        assert proxy.met.total() >= 3
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.endpoint)
    assert verify_dataset(dataset) == []
    assert list_versions(Bucket(bucket.uri), "m") == [1, 2, 3]
    assert (tmp_path / "pulled" / "model.weights.h5").read_bytes() == (folder / "model.weights.h5").read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "list"],
        ["models", "pull", "m", "{folder}/m"],
        ["models", "clean"],
        ["data", "list", "d"],
        ["data", "import", "{dozen}", "d"],
        ["weights", "list"],
        ["evaluate", "m", "d"],
        ["predict", "{image}", "--model", "m", "--out", "{folder}/out"],
        ["train", "demo"],
    ],
    ids=" ".join,
)
def test_commands_give_up_in_time(
    store: RunningStore,
    bucket: Bucket,
    dozen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: DrivenClock,
    arguments: list[str],
) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))
    image = next(dozen.rglob("images/*.png"))
    typed = [text.format(folder=tmp_path, dozen=dozen, image=image) for text in arguments]
    with proxied(store.port, seldom(1.0, 0, (Fault.SLOW_DOWN,))) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        run = CliRunner().invoke(cli, ["--storage-timeout", "60", *typed])
    assert run.exit_code == 1, run.output
    assert "SlowDown" in run.stderr
    assert 1 < proxy.requests == len(clock.waits) + 1
    assert sum(clock.waits) <= 60.0 + 1e-9
    assert not list(tmp_path.iterdir())


def test_a_command_that_has_begun_asks_until_the_timeout(
    store: RunningStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, clock: DrivenClock
) -> None:
    monkeypatch.setenv("NUCLEUS_BUCKET", str(bucket.uri))

    def first_looks_pass(request: Request) -> Fault | None:
        return Fault.SLOW_DOWN if request.number else None

    with proxied(store.port, first_looks_pass) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        run = CliRunner().invoke(cli, ["--storage-timeout", "60", "models", "list"])
    assert run.exit_code == 1
    assert "nucleus --storage-timeout" in run.stderr
    assert sum(clock.waits) == pytest.approx(60.0)
    assert proxy.requests == 1 + len(clock.waits) + 1


def test_a_swap_whose_answer_was_lost_before_another_writer_came(
    store: RunningStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = Bucket(bucket.uri)
    tag = direct.put("alias", b"before")

    def first_put_lost(request: Request) -> Fault | None:
        return Fault.RESET_AFTER if request.number == 0 else None

    def another_writer(number: int) -> None:
        if number == 0:
            direct.put("alias", b"another's")

    with proxied(store.port, first_put_lost, done=another_writer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with pytest.raises(UncertainWriteError, match="alias"):
            bucket.put("alias", b"mine", if_match=tag)
    assert direct.get("alias") == b"another's"


def test_a_single_writer_creates_only_what_is_not_there(
    store: RunningStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server ignores the condition, too."""
    with proxied(store.port, dropped=["if-none-match"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        alone = Bucket(bucket.uri, single_writer=True)
        alone.put("a/b", b"1", if_absent=True)
        alone.put("a", b"1", if_absent=True)
        with pytest.raises(ObjectExistsError):
            alone.put("a", b"2", if_absent=True)
        assert alone.get("a") == b"1"
