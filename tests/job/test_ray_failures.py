"""Errors of Ray: the last cause reaches the user, in one line; a cluster that does not start is explained."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RaySystemError,
    RayTaskError,
    UserCodeException,
    WorkerCrashedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from job import cluster, ray_internals
from job.cluster import connection
from job.ray_errors import failure_text, is_from_ray, our_error
from job.ray_internals import patient_start
from nucleus.errors import ClusterError, DataError, JobError

ADVICE = ("retr", "RAY_", "max_failures", "Traceback", "ray.exceptions", "\n", "log files")
"""What Ray's own messages have and ours do not: advice on its settings and its logs."""


PORT_WAIT = "RAY_gcs_server_port_wait_time_s"


def task_error(cause: Exception, traceback: str | None = None) -> RayTaskError:
    text = traceback or f'Traceback (most recent call last):\n  File "a.py", line 1\n{type(cause).__name__}: {cause}'
    return RayTaskError("work", text, cause, proctitle="p", pid=1, ip="127.0.0.1")


TWO_TRACEBACKS = """Traceback (most recent call last):
  File "masks.py", line 3, in read
KeyError: 'masks'

The above exception was the direct cause of the following exception:

ray::MapWorker() (pid=1, ip=127.0.0.1)
  File "data.py", line 9, in run
ray.exceptions.UserCodeException: UDF failed to process a data block. Set max_errored_blocks to retry.
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no such\nfile"), "ValueError: no such"),
        (task_error(ValueError("two is too much.")), "ValueError: two is too much"),
        (task_error(ValueError("a")).as_instanceof_cause(), "ValueError: a"),
        (task_error(task_error(OSError(28, "No space left on device"))), "No space left on device"),
        (task_error(WorkerCrashedError(), TWO_TRACEBACKS), "a process died"),
        (
            RayTaskError("work", TWO_TRACEBACKS, RayActorError(error_msg=TWO_TRACEBACKS), "p", 1, "h"),
            "KeyError: 'masks'",
        ),
        (task_error(UserCodeException("UDF failed. Set max_errored_blocks"), TWO_TRACEBACKS), "KeyError: 'masks'"),
        (WorkerGroupError("worker 0", {0: task_error(KeyError("x")), 1: WorkerCrashedError()}), "KeyError: 'x'"),
        (
            WorkerGroupError("worker 0", {0: OutOfMemoryError("retry with RAY_memory_usage_threshold")}),
            "memory was full",
        ),
        (ControllerError(task_error(RuntimeError("the bucket is gone"))), "the bucket is gone"),
        (ActorDiedError(), "a process died"),
        (NodeDiedError("Check the raylet's log files"), "a machine of the cluster was lost"),
        (RaySystemError(OSError("broken pipe")), "broken pipe"),
        (Exception("The current node timed out during startup. This could happen because"), "timed out during startup"),
    ],
)
def test_the_last_cause_is_one_line_without_advice(error: BaseException, words: str) -> None:
    text = failure_text(error)
    assert words in text
    assert not [word for word in ADVICE if word in text]
    assert not text.endswith(".")


def test_an_error_of_this_project_is_found_in_what_wraps_it() -> None:
    ours = DataError("Expected masks; found none.")
    wrapped: list[BaseException] = [
        ours,
        task_error(ours),
        ControllerError(task_error(ours)),
        WorkerGroupError("two workers", {1: task_error(ours)}),
        pickle.loads(pickle.dumps(task_error(ours))),
    ]
    for error in wrapped:
        found = our_error(error)
        assert (type(found), str(found)) == (DataError, str(ours))
    assert our_error(task_error(ValueError("a"))) is None


def test_a_circle_of_causes_ends() -> None:
    error, other = ValueError("a"), ValueError("b")
    error.__cause__, other.__cause__ = other, error
    assert failure_text(error) == "ValueError: b"


def test_errors_of_ray_are_told_from_others() -> None:
    assert is_from_ray(task_error(ValueError("a")).as_instanceof_cause())
    assert is_from_ray(WorkerGroupError("a", {}))
    assert not is_from_ray(ValueError("a"))


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A process without a cluster: what `ray.init` is called with."""
    import ray

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **given: calls.append(given))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.job, "local_addresses", list, raising=False)
    monkeypatch.setattr(cluster, "check_temporary_folder", lambda: None)
    return calls


def failing(error: Exception) -> Callable[..., None]:
    def init(**_: Any) -> None:
        raise error

    return init


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    "error",
    [
        Exception("The current node timed out during startup. This could happen because some of the raylet failed"),
        RuntimeError("Failed to start GCS.  Last 0 lines of error files:\n.Traceback (most recent call last):\nx"),
        OSError(28, "No space left on device"),
        ValueError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /long"),
    ],
)
@pytest.mark.parametrize(("address", "own_cpus"), [(None, 1), ("local", None)])
def test_a_cluster_that_does_not_start_is_one_error(
    address: str | None, own_cpus: int | None, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    ended: list[bool] = []
    monkeypatch.setattr(ray, "init", failing(error))
    monkeypatch.setattr(cluster.job, "end_started_processes", lambda _: ended.append(True), raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/elsewhere")
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(JobError) as caught, connection(own_cpus=own_cpus):
        pytest.fail("connected")
    message = str(caught.value)
    assert failure_text(error) in message
    for word in ("180 s", "RAY_TMPDIR", "/elsewhere", "RAY_ADDRESS"):
        assert word in message
    assert "Traceback" not in message
    tries = 3 if "timed out during startup" in str(error) else 1
    assert ended == [True] * tries


def test_a_slow_start_is_told_at_once(
    no_ray: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    told: list[str] = []

    def slow(**given: Any) -> None:
        no_ray.append(given)
        deadline = time.monotonic() + 600
        while not any(told) and time.monotonic() < deadline:
            told.append(capfd.readouterr().err)
            time.sleep(0.01)

    monkeypatch.setattr(cluster, "_NOTE_SECONDS", 0.05)
    monkeypatch.setattr(ray, "init", slow)
    with connection(own_cpus=2):
        pass
    assert "up to 180 s" in "".join(told)
    assert no_ray[0]["num_cpus"] >= 2
    assert no_ray[0]["include_dashboard"] is False  # it would take jobs from every user of this machine


@pytest.mark.usefixtures("no_ray")
def test_errors_of_ray_in_the_block_become_ours() -> None:
    with pytest.raises(JobError, match=r"ValueError: boom"), connection(own_cpus=1):
        raise task_error(ValueError("boom"))
    with pytest.raises(DataError, match="no masks"), connection(own_cpus=1):
        raise task_error(DataError("no masks"))
    with pytest.raises(KeyError), connection(own_cpus=1):
        raise KeyError("not from Ray")


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_lost_cluster_ends_the_waiting_of_the_main_thread(ignored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a process that was started to ignore SIGINT, as by a shell in the background."""
    lost = threading.Event()
    monkeypatch.setattr(cluster, "_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(cluster.job, "connected_addresses", dict, raising=False)
    monkeypatch.setattr(
        cluster.job, "ended_process", lambda: "Ray's process raylet was ended" if lost.is_set() else None, raising=False
    )

    def wait() -> None:
        with connection(own_cpus=1):
            os.kill(os.getpid(), signal.SIGINT if ignored else signal.SIGWINCH)
            lost.set()
            threading.Event().wait()

    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(ClusterError, match="is lost: Ray's process raylet"):
            wait()
        assert signal.getsignal(signal.SIGINT) is (signal.SIG_IGN if ignored else before)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_node_is_waited_for_while_its_process_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    asked: list[tuple[str, str]] = []

    def get_node(address: str, node: str) -> dict[str, str]:
        asked.append((address, node))
        if len(asked) < 4:
            raise RuntimeError("not yet")
        return {"node": node}

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(ray_internals, "_POLL_SECONDS", 0.0)
    child = SimpleNamespace(name=lambda: "raylet", status=lambda: "running")
    monkeypatch.setattr(ray_internals.psutil.Process, "children", lambda _: [child])
    with patient_start(60.0):
        assert services.get_node("a", "n") == {"node": "n"}
        assert os.environ[PORT_WAIT] == "60"
    assert services.get_node is get_node
    assert PORT_WAIT not in os.environ
    assert asked == [("a", "n")] * 4
    asked.clear()
    monkeypatch.setattr(ray_internals.psutil.Process, "children", lambda _: [])
    with patient_start(60.0), pytest.raises(RuntimeError, match="not yet"):
        services.get_node("a", "n")
    assert len(asked) == 1


def test_what_a_failed_start_left_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    before = subprocess.Popen(["sleep", "1000"])
    known = psutil.Process().children()
    started = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"])
    while not (below := psutil.Process(started.pid).children()):
        time.sleep(0.01)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    try:
        ray_internals.end_started_processes(known)
        started.wait(600)
        assert psutil.wait_procs(below, 600)[1] == []
        assert before.poll() is None
    finally:
        before.kill()
        before.wait()


OWN_CLUSTER = """
import json, os, sys, time
import psutil
from job.cluster import connection
with connection(own_cpus=1):
    import ray
    @ray.remote
    def answer():
        return os.getpid(), sys.path
    worker, path = ray.get(answer.remote())
    print(json.dumps({"worker": worker, "path": path}), flush=True, file=sys.__stdout__)
    for line in sys.stdin:
        if line == "end\\n":
            break
        print(json.dumps({"worker": ray.get(answer.remote())[0]}), flush=True, file=sys.__stdout__)
print(json.dumps([each.pid for each in psutil.Process().children(recursive=True)]), flush=True)
"""
"""A program with a cluster of its own, which calls a worker for each line of its input, and then ends."""


class OwnCluster:
    """`OWN_CLUSTER` in a process group of its own, and all processes that it has started."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            env={**os.environ, "RAY_ADDRESS": ""},
            start_new_session=True,
        )
        self.first = self.answer()
        self.started = psutil.Process(self.process.pid).children(recursive=True)

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()
        return self.answer()


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[OwnCluster]:
    found = OwnCluster(tmp_path)
    yield found
    found.process.kill()
    found.process.communicate()


@pytest.mark.ray
def test_signals_leave_a_cluster_of_ones_own_alone_and_nothing_is_left_of_it(
    own_cluster: OwnCluster, tmp_path: Path
) -> None:
    names = set()
    for each in own_cluster.started:
        with suppress(psutil.NoSuchProcess):  # Ray ends workers that have nothing to do
            names.add(each.name())
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                each.send_signal(number)
    assert {"raylet", "gcs_server"} <= names
    assert own_cluster.ask("again") == {"worker": own_cluster.first["worker"]}  # the same process
    assert str(tmp_path) not in own_cluster.first["path"]
    assert own_cluster.ask("end") == []
    assert own_cluster.process.wait(600) == 0
    assert psutil.wait_procs(own_cluster.started, 600)[1] == []


@pytest.mark.ray
def test_a_cluster_of_ones_own_ends_with_a_process_that_is_killed(own_cluster: OwnCluster) -> None:
    agents = ("ray::DashboardA", "ray::RuntimeEnv")  # which first wait for the head for a minute
    processes = []
    for each in own_cluster.started:
        with suppress(psutil.NoSuchProcess):
            if not each.name().startswith(agents):
                processes.append(each)
    assert len(processes) >= 5
    own_cluster.process.kill()
    assert psutil.wait_procs(processes, 600)[1] == []


def test_rays_folder_is_checked_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: str, variable: str = "RAY_TMPDIR") -> str:
        monkeypatch.setenv(variable, folder)
        with pytest.raises(JobError) as caught:
            cluster.check_temporary_folder()
        assert f"from {variable}" in str(caught.value)
        assert "export RAY_TMPDIR=" in str(caught.value)
        monkeypatch.delenv(variable)
        return str(caught.value)

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(prefix="n-", dir="/tmp") as folder:
        assert "too long" in refused(f"{folder}/{'long' * 20}")
        assert not (Path(folder) / ("long" * 20)).exists()
        (Path(folder) / "file").touch()
        assert f"{folder}/file" in refused(f"{folder}/file")
        monkeypatch.setattr(cluster, "_FREE_BYTES", 1 << 60)
        assert "found" in refused(folder, "TMPDIR")
        monkeypatch.setattr(cluster, "_FREE_BYTES", 1)
        monkeypatch.setenv("RAY_TMPDIR", folder)
        cluster.check_temporary_folder()
        assert list((Path(folder) / "ray").iterdir()) == []


def test_a_head_is_given_time_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, answers = [0.0], [True]
    monkeypatch.setattr(cluster.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(cluster, "_accepts", lambda _: answers[0])
    patience = cluster._Patience({"the head": ("h", 1, 30.0)})
    for now, answer, lost in (
        (0, True, None),
        (1, False, None),
        (30, False, None),
        (30.5, True, None),
        (31, False, None),
    ):
        clock[0], answers[0] = now, answer
        assert patience.lost() is lost
    clock[0] = 61
    assert "the head" in str(patience.lost())


def test_a_run_starts_no_process_for_ray_data() -> None:
    """All else that Ray Train does around a run stays."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    theirs, ours = (
        {type(callback).__name__ for callback in kind(lambda: None)._create_default_callbacks()}
        for kind in (DataParallelTrainer, ray_internals.trainer_class())
    )
    assert theirs - ours == {"DatasetsCallback"}
    assert ours < theirs
