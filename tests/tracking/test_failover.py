"""W&B's server that does not answer, refuses or fails: the run goes on, and its files are kept."""

import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import wandb

from nucleus.config.recipe import TrackingOptions
from nucleus.doctor import check_wandb
from nucleus.registry.manifest import tracked_text
from nucleus.tracking import failover
from nucleus.tracking.failover import RunTracking, check_tracking, server_problem, usable_mode
from nucleus.tracking.wandb_run import WandbRun, kept_files, offline_files, sync_command
from tests.tracking.offline_log import rows_of_run
from tests.tracking.wandb_server import WandbServer, wandb_server

KEY = "0123456789" * 4
RUN = "r-1"
HISTORY = [{"epoch": epoch + 1.0, "loss": 1 / (epoch + 3)} for epoch in range(4)]


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that names W&B's server; the key is set, there are no pauses, and a busy machine may be slow."""

    def name_server(url: str) -> None:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        wandb.teardown()  # it reads the environment once

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(failover, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(failover, "_ANSWER_SECONDS", 600.0)
    monkeypatch.setattr("nucleus.tracking.wandb_run._START_SECONDS", 600.0)
    monkeypatch.setattr("nucleus.tracking.wandb_run._UPLOAD_SECONDS", 600.0)
    yield name_server
    monkeypatch.undo()
    wandb.teardown()


@pytest.fixture
def server(connected: Callable[[str], None]) -> Iterator[WandbServer]:
    with wandb_server() as running:
        connected(running.url)
        yield running


@pytest.fixture
def silent() -> Iterator[tuple[str, list[socket.socket]]]:
    """A server that accepts connections and says nothing: its address, and the connections."""
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as stack:

        def accept() -> None:
            while True:
                try:
                    taken.append(stack.enter_context(listening.accept()[0]))
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", taken
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken, so that nobody else gets it, and not listened on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield int(probe.getsockname()[1])


def test_a_server_that_accepts_the_key_is_used(server: WandbServer) -> None:
    assert server_problem() is None
    assert server.queries == ["Viewer"]
    told: list[str] = []
    assert usable_mode("online", told.append, told.append) == "online"
    assert len(told) == 1  # that it asks


@pytest.mark.parametrize(
    ("status", "attempts", "words"),
    [(401, 1, "wandb login"), (403, 1, "wandb login"), (404, 1, "answered 404"), (500, 2, "500"), (503, 2, "503")],
)
def test_a_server_that_refuses_or_fails_is_named(status: int, attempts: int, words: str, server: WandbServer) -> None:
    server.decide = lambda _: status
    problem = server_problem()
    assert problem is not None
    assert "W&B" in problem
    assert server.url in problem
    assert words in problem
    assert KEY not in problem
    assert server.queries == ["Viewer"] * attempts


def test_a_server_that_recovers_is_used(server: WandbServer) -> None:
    server.decide = lambda _: 200 if len(server.queries) > 1 else 502
    assert server_problem() is None


def test_a_key_that_nobody_has_is_refused(server: WandbServer) -> None:
    server.viewer = None
    assert "does not know the API key" in str(server_problem())


def test_without_a_key_nobody_is_asked(server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As of a run that is resumed on another machine."""
    monkeypatch.delenv("WANDB_API_KEY")
    for name in ("NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    wandb.teardown()
    assert "wandb login" in str(server_problem())
    assert server.queries == []


def test_settings_that_w_and_b_cannot_read_are_a_problem(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ANONYMOUS", "perhaps")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")
    wandb.teardown()
    assert "W&B says" in str(server_problem())
    check_tracking("online")
    assert server.queries == []


def test_a_server_that_is_silent_is_asked_twice(
    silent: tuple[str, list[socket.socket]], connected: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, taken = silent
    connected(url)
    monkeypatch.setattr(failover, "_ANSWER_SECONDS", 0.2)
    assert "did not answer" in str(server_problem())
    while len(taken) < 2:  # they are taken when the server's thread gets to it
        time.sleep(0.01)
    assert len(taken) == 2


def test_a_server_that_is_away_makes_the_run_offline(connected: Callable[[str], None], closed_port: int) -> None:
    url = f"http://127.0.0.1:{closed_port}"
    connected(url)
    warnings: list[str] = []
    assert usable_mode("online", lambda _: None, warnings.append) == "offline"
    (warning,) = warnings
    assert "W&B" in warning
    assert url in warning
    assert "refused" in warning
    assert "wandb sync" in warning
    for mode in ("offline", "disabled"):
        assert usable_mode(mode, warnings.append, warnings.append) == mode
    assert len(warnings) == 1


def test_a_host_name_that_is_none_is_no_crash(connected: Callable[[str], None]) -> None:
    connected("http://a..b")
    assert "did not answer" in str(server_problem())


def test_the_proxy_before_the_server_is_named(
    connected: Callable[[str], None], closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@127.0.0.1:{closed_port}")
    connected("http://wandb.example")
    problem = str(server_problem())
    assert "HTTP_PROXY=http://127.0.0.1:" in problem
    assert "NO_PROXY" in problem
    assert "secret" not in problem


@pytest.mark.parametrize("url", ["wandb.example", "ftp://wandb.example", "http://", "http://host:port", "nonsense"])
def test_an_address_that_is_none_makes_the_run_offline(
    url: str, connected: Callable[[str], None], tmp_path: Path
) -> None:
    connected(url)
    check_tracking("online")
    problem = str(server_problem())
    assert "WANDB_BASE_URL" in problem
    assert repr(url) in problem
    run = WandbRun(RUN, TrackingOptions(), "offline", tmp_path)  # W&B itself would refuse
    run.log(HISTORY[0])
    assert run.finish({}) is None
    assert len(rows_of_run(tmp_path, RUN)) == 1


class Failing:
    """A run in W&B whose method `fails` raises an error."""

    def __init__(self, fails: str = "", problem: str | None = None) -> None:
        self.run_path = "nucleus/r-1"
        self.kept_files = {"offline-run-1/a": Path("a")}
        self.calls: list[Any] = []
        self._fails = fails
        self._problem = problem

    def _note(self, name: str, what: Any) -> None:
        if name == self._fails:
            raise RuntimeError("The server is gone\nTraceback (most recent call last):")
        self.calls.append((name, what))

    def log(self, metrics: dict[str, float]) -> None:
        self._note("log", metrics["epoch"])

    def predictions(self, epochs_done: int | None, images: Sequence[Any]) -> None:  # noqa: ARG002
        self._note("predictions", epochs_done)

    def finish(self, summary: dict[str, float]) -> str | None:
        self._note("finish", summary)
        return self._problem

    def abort(self) -> str | None:
        self._note("abort", None)
        return self._problem


def tracking_of(runs: dict[str, Failing | Exception], mode: str) -> tuple[RunTracking, list[str]]:
    warnings: list[str] = []

    def opened(mode: str) -> Any:
        run = runs[mode]
        if isinstance(run, Exception):
            raise run
        return run

    return RunTracking(opened, mode, warnings.append), warnings


def whole_run(tracking: RunTracking) -> None:
    for metrics in HISTORY[:2]:
        tracking.log(metrics)
        tracking.predictions(int(metrics["epoch"]), [])
    tracking.finish({"val_map": 0.5})


@pytest.mark.parametrize("fails", ["open", "log", "predictions", "finish"])
def test_an_online_run_that_fails_goes_on_offline_with_all_metrics(fails: str) -> None:
    online = ValueError("permission denied") if fails == "open" else Failing(fails)
    offline = Failing()
    tracking, warnings = tracking_of({"online": online, "offline": offline}, "online")
    whole_run(tracking)
    assert {call for call in offline.calls if call[0] == "log"} == {("log", 1.0), ("log", 2.0)}
    assert ("finish", {"val_map": 0.5}) in offline.calls
    assert (tracking.mode, tracking.run_path, tracking.kept_files) == ("offline", "nucleus/r-1", offline.kept_files)
    (warning,) = warnings
    assert "W&B" in warning
    assert ("permission denied" if fails == "open" else "The server is gone") in warning
    assert "Traceback" not in warning


@pytest.mark.parametrize("fails", ["open", "log", "predictions", "finish", "abort"])
def test_a_run_goes_on_though_w_and_b_fails_offline_too(fails: str) -> None:
    runs: dict[str, Failing | Exception] = {
        mode: OSError("No space left on device") if fails == "open" else Failing(fails)
        for mode in ("online", "offline")
    }
    tracking, warnings = tracking_of(runs, "online")
    if fails == "abort":
        tracking.log(HISTORY[0])
        tracking.abort()
    else:
        whole_run(tracking)
    assert (tracking.mode, tracking.run_path, tracking.kept_files) == ("disabled", None, {})
    assert len(warnings) == 2


def test_a_run_that_could_not_be_sent_in_full_is_offline() -> None:
    tracking, warnings = tracking_of({"online": Failing(problem="Expected W&B's server to take all.")}, "online")
    whole_run(tracking)
    assert tracking.mode == "offline"
    assert tracking.kept_files
    assert len(warnings) == 1


def test_tracking_that_is_off_opens_nothing() -> None:
    tracking, warnings = tracking_of({}, "disabled")
    whole_run(tracking)
    assert (tracking.mode, tracking.run_path, tracking.kept_files, warnings) == ("disabled", None, {}, [])


def opened(folder: Path, mode: str) -> WandbRun:
    return WandbRun(RUN, TrackingOptions(), mode, folder)


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def sync(*folders: Path) -> None:
    """Send a run by the command that is shown to the user."""
    _, *arguments = shlex.split(sync_command(folders))
    command = [str(Path(sys.executable).parent / "wandb"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr


def test_an_entity_that_refuses_the_run_makes_it_offline(server: WandbServer, tmp_path: Path) -> None:
    """The server accepts the key, so that only the worker finds out; then `wandb sync` sends the run."""
    server.decide = lambda name: 403 if name == "UpsertBucket" else 200
    warnings: list[str] = []
    tracking = RunTracking(partial(opened, tmp_path), "online", warnings.append)
    for metrics in HISTORY:
        tracking.log(metrics)
    tracking.finish({})
    assert (tracking.mode, len(warnings)) == ("offline", 1)
    assert "W&B" in warnings[0]
    assert losses(rows_of_run(tmp_path, RUN)) == [metrics["loss"] for metrics in HISTORY]
    server.decide = lambda _: 200
    sync(*(path.parent for path in offline_files(tmp_path, RUN)))
    assert losses(server.history) == [metrics["loss"] for metrics in HISTORY]


@pytest.mark.parametrize("status", [401, 500])
def test_a_server_that_fails_during_the_run_costs_nothing(
    status: int, server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B gives up at once if it is refused, and otherwise tries until the end of the run."""
    monkeypatch.setattr("nucleus.tracking.wandb_run._UPLOAD_SECONDS", 3.0)
    warnings: list[str] = []
    tracking = RunTracking(partial(opened, tmp_path), "online", warnings.append)
    tracking.log(HISTORY[0])
    server.decide = lambda _: status
    for metrics in HISTORY[1:]:
        tracking.log(metrics)
    tracking.finish({})
    assert (tracking.mode, len(warnings)) == ("offline", 1)
    assert tracking.run_path == f"us/nucleus/{RUN}"
    (main,) = offline_files(tmp_path, RUN)
    assert main in tracking.kept_files.values()
    server.decide = lambda _: 200
    sync(main.parent)
    assert losses(server.history) == [metrics["loss"] for metrics in HISTORY]


def test_of_a_run_that_was_sent_nothing_is_kept(server: WandbServer, tmp_path: Path) -> None:
    tracking = RunTracking(partial(opened, tmp_path), "online", pytest.fail)
    for metrics in HISTORY:
        tracking.log(metrics)
    tracking.finish({})
    assert losses(server.history) == [metrics["loss"] for metrics in HISTORY]
    assert (tracking.mode, tracking.kept_files, kept_files(tmp_path, RUN)) == ("online", {}, {})


def test_the_doctor_asks_the_server(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("nucleus.doctor._WANDB_SECONDS", 600.0)  # for a busy machine
    assert check_wandb().state == "ok"
    server.decide = lambda _: 401
    finding = check_wandb()
    assert (finding.state, server.url in finding.found) == ("warning", True)
    assert "wandb login" in str(finding.fix)


def test_the_mode_is_part_of_what_is_shown() -> None:
    assert tracked_text("team/cells/r", "offline") == "team/cells/r (offline)"
    assert tracked_text("team/cells/r", None) == "team/cells/r"
    assert tracked_text(None, "disabled") is None
