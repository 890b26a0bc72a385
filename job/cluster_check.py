"""Ray check of `nucleus doctor`: a query of the cluster that a run would use, without joining it."""

import os
import platform
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import job
from job.cluster import Capacity, address_at_hand, check_temporary_folder
from job.job_api import capacities_of, check_address, cluster_address, job_client
from nucleus.doctor import Finding, call_in_subprocess, failed
from nucleus.errors import ClusterError, NucleusError

__all__ = ["RayCheck", "check_ray", "query_head"]


_RAY = "Ray"
_CLIENT, _OWN = "ray://", "local"
_SECONDS = 20.0


@dataclass(frozen=True)
class RayCheck:
    """Result of the Ray check.

    Attributes:
        finding: The finding to show.
        gpus: Number of GPUs of the cluster; 0 if no cluster was reached.
    """

    finding: Finding
    gpus: float = 0.0


def check_ray(given: str | None, *, insecure: bool) -> RayCheck:
    """Check the cluster that `nucleus submit` or `nucleus train` would use.

    Args:
        given: URL of a cluster's dashboard; if None, the cluster of RAY_ADDRESS, else one on this machine.
        insecure: Whether the user accepts plain HTTP to another machine and a cluster without a token.
    """
    try:
        if given is not None or urlsplit(os.environ.get("RAY_ADDRESS", "")).scheme in {"http", "https"}:
            return _by_dashboard(cluster_address(given), insecure=insecure)
        address = address_at_hand()
        if address in {None, _OWN}:
            return RayCheck(_none())
        if address.startswith(_CLIENT):
            return RayCheck(Finding(_RAY, "ok", f"{address} answers; its CPUs and GPUs were not checked"))
        return _by_head(address)
    except NucleusError as error:
        return RayCheck(failed(_RAY, error))


def _none() -> Finding:
    """Return the finding if a run starts a cluster. Raises `JobError` if Ray's files have no place on this machine."""
    check_temporary_folder()
    return Finding(
        _RAY,
        "warning",
        f"no cluster; nucleus train starts one on this machine with {os.cpu_count()} CPUs",
        "To use a cluster: export RAY_ADDRESS=HOST:6379, or nucleus submit --address URL.",
    )


def _by_dashboard(address: str, *, insecure: bool) -> RayCheck:
    check_address(address, insecure=insecure)
    return _reached(address, capacities_of(job_client(address, insecure=insecure)))


def _by_head(address: str) -> RayCheck:
    found = call_in_subprocess(query_head, address, who=f"the Ray cluster at {address}", seconds=_SECONDS)
    return _reached(address, {name: Capacity(total, free, total) for name, (total, free) in found.items()})


def _reached(address: str, capacities: dict[str, Capacity]) -> RayCheck:
    text = ", ".join(f"{found.total:g} {name}s ({found.free:g} free)" for name, found in capacities.items())
    return RayCheck(Finding(_RAY, "ok", f"{address}: {text}"), capacities["GPU"].total)


def query_head(address: str) -> dict[str, tuple[float, float]]:
    """Return the total and free numbers of CPUs and GPUs of the cluster with this head.

    May take 40 s if the head does not answer, so it is called in a subprocess with a time limit.

    Raises:
        ClusterError: The cluster refuses the token, or runs another version of Ray or Python.
    """
    from ray.exceptions import AuthenticationError, RpcError

    try:
        metadata, resources = job.ask_head(address)
        _check_versions(address, metadata)
        total, free = resources()
    except AuthenticationError as error:
        raise ClusterError(
            f"Expected the token of the Ray cluster at {address}; it was refused, or there is none. Set "
            "RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."
        ) from error
    except RpcError as error:
        raise ClusterError(f"Expected the head of a Ray cluster at {address}; {error}") from error
    return {name: (total.get(name, 0.0), free.get(name, 0.0)) for name in ("CPU", "GPU")}


def _check_versions(address: str, cluster: dict[str, Any]) -> None:
    import ray

    theirs = (cluster["ray_version"], cluster["python_version"])
    ours = (ray.__version__, platform.python_version())
    if theirs != ours:
        raise ClusterError(
            f"Expected Ray {ours[0]} and Python {ours[1]} at {address}, as here; found Ray {theirs[0]} and Python "
            f"{theirs[1]}. Install the same version on both sides: ray=={theirs[0]} here, or ray=={ours[0]} there."
        )
