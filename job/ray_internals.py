"""Private parts of Ray 2.60: every name that Ray does not promise to keep is used in this file alone."""

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
"""Attributes in which Ray's errors keep the errors that they wrap."""


def our_error(error: BaseException | None) -> NucleusError | None:
    """The first of this project's errors in a chain of causes."""
    while error is not None:
        if isinstance(error, NucleusError):
            return error
        inner = (getattr(error, name, None) for name in _CAUSES)
        error = next((cause for cause in inner if isinstance(cause, BaseException)), error.__cause__)
    return None


def free_address() -> str:
    """`host:port` of this machine with a port that nobody uses, for the other workers of a run."""
    from ray._common.network_utils import build_address
    from ray.train._internal.utils import get_address_and_port

    return str(build_address(*get_address_and_port()))


_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable in which Ray's job supervisor hands its configuration to the driver of a submitted job."""


def is_submitted_job() -> bool:
    """Whether this process is the driver of a job that was submitted to a cluster's job API."""
    return "job_submission_id" in os.environ.get(_JOB_CONFIG, "")


def trainer_class() -> Any:
    """The trainer of Ray Train v2 that runs one function on every worker."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return DataParallelTrainer


def pass_to_controller(variable: str) -> None:
    """Let Ray Train's controller and workers have an environment variable of the driver."""
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.add(variable)


def local_addresses() -> list[str]:
    """Addresses of clusters on this machine: one that `ray start` has noted, then those whose processes run."""
    from ray._private import services

    noted = services.find_bootstrap_address(None)
    return [*([noted] if noted else []), *services.find_gcs_addresses()]


def autoscaler_limits() -> dict[str, float]:
    """Resources of the connected cluster with every machine that it may start; empty without an autoscaler."""
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}


def ask_head(address: str) -> tuple[dict[str, Any], Callable[[], tuple[dict[str, float], dict[str, float]]]]:
    """Metadata of the cluster with this head, without joining it, and a function for its total and free resources.

    The resources can be asked for only if the head runs this version of Ray.
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
    """Version of Ray on the cluster of a `JobSubmissionClient`, which has asked for it (`get_version` is the API's)."""
    return str(client._server_ray_version)


def job_api_answer(client: Any, path: str) -> Any:
    """Response to a GET request that a `JobSubmissionClient` sends with its token."""
    return client._do_request("GET", path)
