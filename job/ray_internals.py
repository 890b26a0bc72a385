"""Private parts of Ray 2.60, by which clusters are started, joined, watched and left.

No other module calls what Ray does not promise to keep; `ray_errors` reads attributes of its errors.
"""

import atexit
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from nucleus.surroundings import ENDING_SIGNALS

__all__ = [
    "ask_head",
    "autoscaler_limits",
    "connected_addresses",
    "disconnect",
    "end_started_processes",
    "ended_process",
    "free_address",
    "is_submitted_job",
    "job_api_answer",
    "keep_keys_from_trials",
    "local_addresses",
    "pass_to_controller",
    "patient_start",
    "server_ray_version",
    "shielded_start",
    "socket_path_length",
    "temporary_folder",
    "trainer_class",
    "without_state_dumps",
    "worker_paths",
]

_HEAD_SECONDS, _NODE_SECONDS = 30.0, 3.0
"""Seconds for which the head of a cluster, and Ray on this machine, may be silent."""
_NODE_PROCESS, _POLL_SECONDS, _END_SECONDS = "raylet", 0.5, 5.0
_STARTED = ("gcs_server", _NODE_PROCESS)
"""Names of the processes that Ray starts on a machine, beside those that end with them."""
_STATE_DUMP = "Raylet logs"
"""Part of the text with which Ray tells that its process of a node has died."""
_MEMORY = ", often because the machine's memory was full"
_LONGEST_SOCKET = "dash_TaskEventsHead"
"""Longest name of a socket of Ray."""
_INSTALLED = ("site-packages", "dist-packages")
"""Names of the folders that are on the `sys.path` of every Python."""
_GCS_PORT = "RAY_gcs_server_port_wait_time_s"
"""Environment variable with the seconds for which Ray waits for its head process."""
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable by which Ray's job supervisor passes its configuration to the driver of a submitted job."""


@contextmanager
def patient_start(seconds: float) -> Iterator[None]:
    """Within the block, let Ray's processes on this machine take longer to start than its fixed 30 s."""
    from ray._private import services

    before, deadline = services.get_node, time.monotonic() + seconds

    def found_later(*arguments: Any) -> Any:
        while True:
            try:
                return before(*arguments)
            except RuntimeError:  # Ray's head process does not know the node yet
                if time.monotonic() > deadline or not _node_runs():
                    raise
            time.sleep(_POLL_SECONDS)

    services.get_node = found_later
    set_here = _GCS_PORT not in os.environ
    os.environ.setdefault(_GCS_PORT, f"{seconds:.0f}")
    try:
        yield
    finally:
        services.get_node = before
        if set_here:
            del os.environ[_GCS_PORT]


@contextmanager
def shielded_start() -> Iterator[None]:
    """Within the block, start Ray's processes on this machine so that signals to this process's group do not end them.

    They get a session of their own, and SIGTERM, SIGINT and SIGHUP blocked, which their workers inherit: whoever ends a
    job (`scancel`, systemd, a closed terminal) signals all of its processes, and the workers must live to save. They
    still end with this process (the kernel sends them SIGKILL), and `disconnect` ends them.

    Ray would also replace this process's handler of SIGTERM, and leave its own; here the handlers stay.
    """
    from ray._private import services, utils

    before, handler = services.ConsolePopen, utils.set_sigterm_handler
    services.ConsolePopen = _ShieldedProcess
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        services.ConsolePopen, utils.set_sigterm_handler = before, handler
        _restore_handlers()


@contextmanager
def without_state_dumps() -> Iterator[None]:
    """Within the block, do not print the pages of its state that Ray prints if its process of a node dies."""
    from ray._private import worker

    before = worker.print_to_stdstream

    def printed(data: dict[str, Any], **options: Any) -> None:
        if not any(_STATE_DUMP in line for line in data["lines"]):
            before(data, **options)

    worker.print_to_stdstream = printed
    try:
        yield
    finally:
        worker.print_to_stdstream = before


def _restore_handlers() -> None:
    """Install this process's handlers of signals again: Ray's native ones print a stack, and abort it after 3 s."""
    if threading.current_thread() is threading.main_thread():
        for number in ENDING_SIGNALS:
            handler = signal.getsignal(number)
            if handler is not None:
                signal.signal(number, handler)


class _ShieldedProcess(subprocess.Popen[Any]):
    """A process in a session of its own, with `ENDING_SIGNALS` blocked."""

    def __init__(self, command: list[str], *, preexec_fn: Callable[[], None], **settings: Any) -> None:
        def prepare() -> None:
            preexec_fn()
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)

        super().__init__(command, **settings, preexec_fn=prepare, start_new_session=True)


def disconnect(*, lost: bool) -> None:
    """Leave the cluster; end the processes of one that this process has started.

    Args:
        lost: Whether the cluster does not answer. Ray would wait for it for minutes.
    """
    import ray

    node = _node()
    if node is not None:
        node.kill_all_processes = lambda **_: _end(node)  # Ray would send SIGTERM, which they have blocked
    if lost:
        _end(node)
        leaving = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
        leaving.start()
        leaving.join(_END_SECONDS)
        if leaving.is_alive():
            atexit.unregister(ray.shutdown)
    else:
        ray.shutdown()


def _node() -> Any:
    """Return Ray's object for the node that this process has started; None if it has started none."""
    from ray._private import worker

    node = worker._global_node
    return node if node is not None and node.is_head() and node.all_processes else None


def _end(node: Any) -> None:
    """End the daemons of a node that this process has started, and all that they have started."""
    daemons = []
    for _, process in node.live_processes() if node is not None else ():
        with suppress(psutil.NoSuchProcess):
            daemons.append(psutil.Process(process.pid))
            daemons[-1].suspend()  # starts nothing more
    _kill([each for daemon in daemons for each in (daemon, *_children(daemon))])


def _kill(processes: Sequence[psutil.Process]) -> None:
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(list(processes), _END_SECONDS)


def end_started_processes(before: Sequence[psutil.Process]) -> None:
    """End what a failed start of Ray on this machine has left running.

    Args:
        before: Children of this process before the start, which stay.
    """
    import ray

    children = [child for child in psutil.Process().children() if child not in before]
    left = [each for child in children for each in (child, *_children(child))]
    _kill(left)  # first: Ray would wait a second for each
    ray.shutdown()


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _node_runs() -> bool:
    """Return whether Ray's process of a node, started by this process, is alive."""
    return any(_name(child) == _NODE_PROCESS and _lives(child) for child in psutil.Process().children())


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def ended_process() -> str | None:
    """Return which process of the cluster that this process has started has ended, in words; None if none has."""
    node = _node()
    for name, process in node.dead_processes() if node is not None else ():
        if name in _STARTED:
            code = process.returncode
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
            return f"Ray's process {name} on this machine was ended {how}" + (
                _MEMORY if -code == signal.SIGKILL else ""
            )
    return None


def connected_addresses() -> dict[str, tuple[str, int, float]]:
    """Return the servers of the cluster that this process has joined, by what they are in words.

    Returns:
        Host, port, and the seconds for which each may be silent: a head may be started again, and Ray ends a driver
        that has not reached it for 60 s. Empty if this process has started the cluster, or is connected by `ray://`.
    """
    from ray._private import worker

    node = worker._global_node
    if node is None or _node() is not None:
        return {}
    host, _, port = node.gcs_address.rpartition(":")
    return {
        f"the head of the cluster at {node.gcs_address}": (host.strip("[]"), int(port), _HEAD_SECONDS),
        "Ray on this machine": (node.node_ip_address, int(node.node_manager_port), _NODE_SECONDS),
    }


def temporary_folder() -> Path:
    """Return the folder in which Ray keeps its sockets and logs on this machine."""
    from ray._common.utils import get_default_ray_temp_dir

    return Path(get_default_ray_temp_dir())


def socket_path_length(folder: Path) -> int:
    """Return the length, bytes, of the longest path of a socket that Ray makes below `temporary_folder`."""
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    return len(os.fsencode(folder / session / "sockets" / _LONGEST_SOCKET))


def worker_paths() -> Any:
    """Return the job configuration for `ray.init` by which workers find this project's packages, and nothing else.

    Ray would put the current folder, and that of the running script, in front of the workers' `sys.path`: a `random.py`
    there would be imported instead of Python's.
    """
    from ray.job_config import JobConfig

    root = str(Path(__file__).resolve().parents[1])
    installed = any(Path(root).name == name for name in _INSTALLED)

    class OwnPaths(JobConfig):
        def _serialize(self) -> Any:
            self._py_driver_sys_path = [] if installed or self._runtime_env_has_working_dir() else [root]
            return super()._serialize()

    return OwnPaths()


def free_address() -> str:
    """Return `host:port` of this machine, with an unused port, for the other workers of a run."""
    from ray._common.network_utils import build_address
    from ray.train._internal.utils import get_address_and_port

    return str(build_address(*get_address_and_port()))


def is_submitted_job() -> bool:
    """Return whether this process is the driver of a job that was submitted to a cluster's job API."""
    return "job_submission_id" in os.environ.get(_JOB_CONFIG, "")


def trainer_class() -> Any:
    """Return Ray Train v2's trainer that runs a function on every worker, without what no run here uses."""
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Trainer(DataParallelTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Leave Ctrl-C to `job.signals`: Ray's handler aborts the run without a checkpoint."""

        def _create_default_callbacks(self) -> list[Any]:
            """Leave out the one for Ray Data, which starts a process that imports pandas and all of Ray Data."""
            return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]

    return Trainer


def pass_to_controller(variable: str) -> None:
    """Pass an environment variable of the driver to Ray Train's controller and workers."""
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.add(variable)


def keep_keys_from_trials() -> None:
    """Leave AWS's keys out of what Ray Tune passes to trials from the driver's environment, which Ray logs."""
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.difference_update([name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")])


def local_addresses() -> list[str]:
    """Return the addresses of clusters on this machine: the one recorded by `ray start`, then running ones."""
    from ray._private import services

    recorded = services.find_bootstrap_address(None)
    return [*([recorded] if recorded else []), *services.find_gcs_addresses()]


def autoscaler_limits() -> dict[str, float]:
    """Return the resources of the connected cluster with all machines that it may start; empty without autoscaler."""
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}


def ask_head(address: str) -> tuple[dict[str, Any], Callable[[], tuple[dict[str, float], dict[str, float]]]]:
    """Return metadata of the cluster with this head, and a function that returns its total and free resources.

    Does not join the cluster. The function may be called only if the head runs this version of Ray.
    """
    import ray
    from ray._common.usage.usage_lib import get_cluster_metadata
    from ray._private.state import GlobalState

    def resources() -> tuple[dict[str, float], dict[str, float]]:
        state = GlobalState()
        state._initialize_global_state(ray._raylet.GcsClientOptions.create(address, None, True, False))
        return state.cluster_resources(), state.available_resources()

    return get_cluster_metadata(ray._raylet.GcsClient(address=address)), resources


def server_ray_version(client: Any) -> str:
    """Return the version of Ray on the cluster of a `JobSubmissionClient` (`get_version` is that of the API)."""
    return str(client._server_ray_version)


def job_api_answer(client: Any, path: str) -> Any:
    """Return the response to a GET request that a `JobSubmissionClient` sends with its token."""
    return client._do_request("GET", path)
