"""The check of Ray by `nucleus doctor`: the cluster that a run would use, asked without joining it."""

import os
import platform
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import job
from job.capacity import Room
from job.cluster import address_at_hand
from job.job_api import check_address, cluster_address, job_client, rooms_of
from nucleus.doctor import Finding, call_apart, failed
from nucleus.errors import ClusterError, NucleusError

__all__ = ["RayCheck", "check_ray", "head_tells"]


_RAY = "Ray"
_CLIENT, _OWN = "ray://", "local"
_SECONDS = 20.0


@dataclass(frozen=True)
class RayCheck:
    """What the check of Ray has found.

    Attributes:
        finding: In words.
        gpus: How many the cluster has, if one was reached.
    """

    finding: Finding
    gpus: float = 0.0


def check_ray(given: str | None, *, insecure: bool) -> RayCheck:
    """Look at the cluster that `nucleus submit` or `nucleus train` would use.

    Args:
        given: URL of a cluster's dashboard. Without it the cluster of RAY_ADDRESS is meant, else this machine's.
        insecure: Whether the user takes the risk of plain HTTP to another machine and of a cluster without a token.
    """
    try:
        if given is not None or urlsplit(os.environ.get("RAY_ADDRESS", "")).scheme in {"http", "https"}:
            return _by_dashboard(cluster_address(given), insecure=insecure)
        address = address_at_hand()
        if address in {None, _OWN}:
            return RayCheck(_none())
        if address.startswith(_CLIENT):
            return RayCheck(Finding(_RAY, "ok", f"{address} answers; what it has was not asked"))
        return _by_head(address)
    except NucleusError as error:
        return RayCheck(failed(_RAY, error))


def _none() -> Finding:
    return Finding(
        _RAY,
        "warning",
        f"no cluster; nucleus train starts one on this machine, of {os.cpu_count()} CPUs",
        "To use another: export RAY_ADDRESS=HOST:6379, or nucleus submit --address URL.",
    )


def _by_dashboard(address: str, *, insecure: bool) -> RayCheck:
    check_address(address, insecure=insecure)
    return _reached(address, rooms_of(job_client(address, insecure=insecure)))


def _by_head(address: str) -> RayCheck:
    told = call_apart(head_tells, address, who=f"the Ray cluster at {address}", seconds=_SECONDS)
    return _reached(address, {name: Room(total, free, total) for name, (total, free) in told.items()})


def _reached(address: str, rooms: dict[str, Room]) -> RayCheck:
    text = ", ".join(f"{room.total:g} {name}s ({room.free:g} free)" for name, room in rooms.items())
    return RayCheck(Finding(_RAY, "ok", f"{address}: {text}"), rooms["GPU"].total)


def head_tells(address: str) -> dict[str, tuple[float, float]]:
    """How many CPUs and GPUs the cluster with this head has, and how many are free. Ray may wait 40 s for a silent one.

    Raises:
        ClusterError: It lets nobody in without another token, or runs another Ray or Python.
    """
    from ray.exceptions import AuthenticationError, RpcError

    try:
        metadata, resources = job.ask_head(address)
        _check_versions(address, metadata)
        total, free = resources()
    except AuthenticationError as error:
        raise ClusterError(
            f"Expected the token of the Ray cluster at {address}; it refused this one, or was sent none. Set "
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
            f"{theirs[1]}. Install the same on both sides: ray=={theirs[0]} here, or ray=={ours[0]} there."
        )
