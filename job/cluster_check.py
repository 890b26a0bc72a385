"""Checks of `nucleus doctor`: the cluster that a run would use, without joining it, and the GPUs of this machine."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import job
from job.capacity import Capacity
from job.cluster import address_at_hand, check_temporary_folder
from job.job_api import capacities_of, check_address, cluster_address, job_client
from nucleus.doctor import Finding, call_in_subprocess, failed
from nucleus.errors import ClusterError, NucleusError
from nucleus.lazy import tf

__all__ = ["Gpus", "RayCheck", "check_gpus", "check_ray", "gpus_here", "query_head", "tensorflow_gpus"]


_RAY, _GPU = "Ray", "GPU"
_HIDING = "CUDA_VISIBLE_DEVICES"
_NVIDIA_SECONDS, _TENSORFLOW_SECONDS = 10.0, 60.0
_CLIENT = "ray://"
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
        if address is None:
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


@dataclass(frozen=True)
class Gpus:
    """NVIDIA GPUs of this machine.

    Attributes:
        names: Names of the GPUs, as the driver lists them.
        seen: Number of GPUs that TensorFlow can use.
        cuda: Whether this TensorFlow is built with CUDA.
    """

    names: tuple[str, ...]
    seen: int = 0
    cuda: bool = True


def gpus_here() -> Gpus:
    """Return the GPUs that the driver lists and, if there are any, how many TensorFlow can use (takes seconds).

    Raises:
        NucleusError: The driver or TensorFlow fails.
    """
    names = _names_from_driver()
    if not names:
        return Gpus(names)
    found = call_in_subprocess(tensorflow_gpus, who="TensorFlow", seconds=_TENSORFLOW_SECONDS)
    return Gpus(names, found["seen"], found["cuda"])


def tensorflow_gpus() -> dict[str, Any]:
    """Return the number of GPUs that TensorFlow sees (`seen`), and whether it is built with CUDA (`cuda`)."""
    return {"seen": len(tf.config.list_physical_devices("GPU")), "cuda": tf.test.is_built_with_cuda()}


def check_gpus(here: Gpus | NucleusError, of_cluster: float) -> Finding:
    """Check whether training can use the GPUs.

    Args:
        here: GPUs of this machine, or the error that `gpus_here` raised.
        of_cluster: Number of GPUs of the Ray cluster.
    """
    if isinstance(here, NucleusError):
        return failed(_GPU, here)
    if not here.names and of_cluster:
        return Finding(_GPU, "ok", f"none on this machine; the Ray cluster has {of_cluster:g}")
    if not here.names:
        return Finding(_GPU, "warning", "none; training runs on CPUs", "Use a recipe for CPUs, such as dsb2018-cpu.")
    text = f"{len(here.names)} of this machine ({here.names[0]}), of which TensorFlow sees {here.seen}"
    if here.seen == len(here.names):
        return Finding(_GPU, "ok", text)
    return Finding(_GPU, "warning" if here.seen else "failed", text, _fix_for_gpus(here))


def _fix_for_gpus(here: Gpus) -> str:
    hidden = os.environ.get(_HIDING)
    if not here.cuda:
        return "This TensorFlow is built for CPUs only. Run: make install EXTRA=train-gpu."
    if hidden is not None:
        return f"{_HIDING}={hidden!r} hides them. Run: unset {_HIDING}."
    return "CUDA's libraries are missing or the driver is too old. Run: make install EXTRA=train-gpu; check nvidia-smi."


def _names_from_driver() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise NucleusError(
            f"Expected nvidia-smi to answer within {_NVIDIA_SECONDS:.0f} s; it did not. Restart the machine, or "
            "reinstall the driver."
        ) from None
    lines = tuple(line.strip() for line in done.stdout.splitlines() if line.strip())
    if done.returncode == 0:
        return lines
    if any("no devices" in line.lower() for line in lines):
        return ()
    message = (*lines, *done.stderr.splitlines(), f"exit status {done.returncode}")[0].rstrip(".")
    raise NucleusError(f"Expected nvidia-smi to list GPUs; found {message!r}. Reinstall the GPU's driver.")
