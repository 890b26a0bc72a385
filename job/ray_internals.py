"""Access to private parts of Ray 2.60: the only module with names that Ray does not promise to keep."""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

from nucleus.errors import NucleusError
from nucleus.text import first_line

__all__ = [
    "ask_head",
    "autoscaler_limits",
    "end_started_processes",
    "failure_text",
    "free_address",
    "is_from_ray",
    "is_submitted_job",
    "job_api_answer",
    "local_addresses",
    "our_error",
    "pass_to_controller",
    "patient_start",
    "server_ray_version",
    "trainer_class",
]


_CAUSES = ("cause", "controller_failure", "health_check_failure", "base_exc", "_base_exc", "client_exc")
"""Attributes of Ray's errors with the error that they wrap."""
_WORKERS = "worker_failures"
"""Attribute of an error of Ray Train with the errors of the workers, by rank."""
_DIED = "a process died: it was killed, often because the machine's memory was full, or it crashed"
_EXPLAINED = {
    "ActorDiedError": _DIED,
    "ActorUnavailableError": _DIED,
    "LocalRayletDiedError": "Ray's process on a machine died, often because the machine's memory was full",
    "NodeDiedError": "a machine of the cluster was lost",
    "ObjectStoreFullError": "Ray's memory for objects is full",
    "OutOfDiskError": "a disk of the cluster is full",
    "OutOfMemoryError": "a machine's memory was full, so Ray ended a process; use fewer workers or smaller batches",
    "WorkerCrashedError": _DIED,
    "WorkerGroupStartupTimeoutError": "the workers did not start in time",
    "WorkerHealthCheckTimeoutError": "a worker did not answer for stall_timeout seconds",
}
"""What Ray's own errors mean; their messages are advice on Ray's settings."""
_RAISED = re.compile(r"^(?!ray\.)[\w.]*(?:Error|Exception|Exit|Interrupt)(?::|$)")
"""A line of a traceback that names an exception, and not one of Ray."""
_TRACEBACK = "Traceback (most recent call last)"
_PLAIN = (Exception, RuntimeError)
"""Classes that say nothing beside the message; Ray's own code and its job API raise them."""
_NODE_PROCESS, _POLL_SECONDS, _END_SECONDS = "raylet", 0.5, 5.0
_STARTED = ("gcs_server", _NODE_PROCESS)
"""Names of the processes that Ray starts on a machine, beside those that end with them."""
_GCS_PORT = "RAY_gcs_server_port_wait_time_s"
"""Environment variable with the seconds for which Ray waits for its head process."""
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable by which Ray's job supervisor passes its configuration to the driver of a submitted job."""


def our_error(error: BaseException | None) -> NucleusError | None:
    """Return the first error of this project in a chain of causes; None if there is none."""
    return next((cause for cause in _chain(error) if isinstance(cause, NucleusError)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that it wraps, the innermost last; of several workers, the first that failed."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        workers = getattr(error, _WORKERS, None) or {}
        inner = [*workers.values(), *(getattr(error, name, None) for name in _CAUSES)]
        error = next((cause for cause in inner if isinstance(cause, BaseException)), error.__cause__)


def is_from_ray(error: BaseException) -> bool:
    """Return whether Ray raised an error, or wraps one that was raised in one of its processes."""
    from ray.exceptions import RayError

    return isinstance(error, RayError) or type(error).__module__.partition(".")[0] == "ray"


def failure_text(error: BaseException) -> str:
    """Return the last cause of an error of Ray in one line: the user's own exception, else what Ray's error means."""
    chain = list(_chain(error))
    cause, name = chain[-1], type(chain[-1]).__name__
    raised = None if name in _EXPLAINED else _raised_line(chain)
    if raised is not None:
        text = first_line(raised)
    elif is_from_ray(cause) or type(cause) in _PLAIN:
        text = _EXPLAINED.get(name) or first_line(cause) or name
    else:
        text = f"{name}: {first_line(cause)}".removesuffix(": ")
    return text.rstrip(".")


def _raised_line(chain: Sequence[BaseException]) -> str | None:
    """Return the line of the innermost exception, the first, in the tracebacks that errors have as text, or None."""
    cause = chain[-1]
    texts = [str(cause)] if _TRACEBACK in str(cause) else []
    if is_from_ray(cause):
        texts += [str(getattr(each, "traceback_str", "")) for each in reversed(chain)]
    lines = (line.strip() for text in texts for line in text.splitlines())
    return next((line for line in lines if _RAISED.match(line)), None)


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


def end_started_processes() -> None:
    """End what a failed start of Ray on this machine has left running: children of this process."""
    import ray

    ray.shutdown()
    left = [child for child in psutil.Process().children() if _name(child) in _STARTED]
    for child in left:
        child.kill()
    psutil.wait_procs(left, _END_SECONDS)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""


def _node_runs() -> bool:
    """Return whether Ray's process of a node, started by this process, is alive."""
    return any(_name(child) == _NODE_PROCESS and _lives(child) for child in psutil.Process().children())


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def free_address() -> str:
    """Return `host:port` of this machine, with an unused port, for the other workers of a run."""
    from ray._common.network_utils import build_address
    from ray.train._internal.utils import get_address_and_port

    return str(build_address(*get_address_and_port()))


def is_submitted_job() -> bool:
    """Return whether this process is the driver of a job that was submitted to a cluster's job API."""
    return "job_submission_id" in os.environ.get(_JOB_CONFIG, "")


def trainer_class() -> Any:
    """Return the trainer class of Ray Train v2 that runs a function on every worker."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return DataParallelTrainer


def pass_to_controller(variable: str) -> None:
    """Pass an environment variable of the driver to Ray Train's controller and workers."""
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.add(variable)


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
