"""Access to private parts of Ray 2.60: the only module with names that Ray does not promise to keep."""

import os
from collections.abc import Callable
from typing import Any

from nucleus.errors import NucleusError

__all__ = [
    "ask_head",
    "autoscaler_limits",
    "free_address",
    "is_submitted_job",
    "job_api_answer",
    "local_addresses",
    "our_error",
    "pass_to_controller",
    "server_ray_version",
    "trainer_class",
]


_CAUSES = ("cause", "controller_failure", "health_check_failure")
"""Attributes of Ray's errors with the errors that they wrap."""
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable by which Ray's job supervisor passes its configuration to the driver of a submitted job."""


def our_error(error: BaseException | None) -> NucleusError | None:
    """Return the first error of this project in a chain of causes; None if there is none."""
    while error is not None:
        if isinstance(error, NucleusError):
            return error
        inner = (getattr(error, name, None) for name in _CAUSES)
        error = next((cause for cause in inner if isinstance(cause, BaseException)), error.__cause__)
    return None


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
