"""Connection to a Ray cluster: that of RAY_ADDRESS, one on this machine, or a new one on this machine."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import job
from job.capacity import Capacity, check_capacity
from nucleus.config.recipe import Recipe
from nucleus.errors import JobError
from nucleus.lazy import stderr_without

__all__ = ["address_at_hand", "capacities", "connected", "connection"]


_ADDRESS = "RAY_ADDRESS"
_ANSWER_SECONDS = 5.0
"""Seconds to wait for a server to accept a connection."""
_REMARK = rb"Set ray log level from environment variable"
"""Beginning of a line of Ray that is not shown."""


@contextmanager
def connected(recipe: Recipe, *, own: bool, verbose: bool) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, else to one on this machine, else to a new one, within the block.

    With `own`, a new cluster that is large enough for the recipe is started, unless this process is already connected.

    Raises:
        JobError: The recipe needs more than the cluster has.
    """
    wanted = recipe.workers.most * recipe.cpus_per_worker if own else None
    with connection(own_cpus=wanted, verbose=verbose):
        check_capacity(recipe, capacities())
        with _address_known():
            yield


@contextmanager
def connection(*, own_cpus: int | None = None, verbose: bool = False) -> Iterator[None]:
    """Use the existing connection of this process; else connect to RAY_ADDRESS, this machine's cluster or a new one.

    Args:
        own_cpus: Start a new cluster on this machine even if another one is available, with at least this number of
            CPUs, even if the machine has fewer.
        verbose: Whether to show Ray's logs.
    """
    import ray

    with redirect_stdout(sys.stderr):  # Ray prints warnings of the machines to stdout, which is for results
        if ray.is_initialized():
            yield
            return
        with stderr_without(_REMARK):
            _connect(own_cpus, verbose=verbose)
        try:
            yield
        finally:
            ray.shutdown()


def _connect(own_cpus: int | None, *, verbose: bool) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": verbose, "logging_level": "info" if verbose else "error"}
    if own_cpus is not None:
        ray.init(address="local", num_cpus=max(own_cpus, os.cpu_count() or 1), **quiet)
    elif not _joined(quiet):
        ray.init(address="local", **quiet)


@contextmanager
def _address_known() -> Iterator[None]:
    """Set RAY_ADDRESS to this cluster for the actors of Ray Train, for the duration of the block.

    The actor that cleans up after a dead controller queries the cluster of RAY_ADDRESS, else the last one started on
    its machine. A different cluster does not know the controller, so the actor would end the run.
    """
    import ray

    job.pass_to_controller(_ADDRESS)
    if ray.util.client.ray.is_connected():  # by ray://, the value that RAY_ADDRESS already has
        yield
        return
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADDRESS]
        else:
            os.environ[_ADDRESS] = before


def _joined(settings: dict[str, Any]) -> bool:
    """Connect to the cluster of RAY_ADDRESS, or to one on this machine; return whether there is one."""
    import ray

    address = address_at_hand()
    if address is None:
        return False
    try:
        ray.init(address=address, **settings)
    except ConnectionError as error:
        raise JobError(
            f"Expected to connect to the Ray cluster at {address}; that failed, perhaps because of its token. To find "
            f"the cause, run: nucleus doctor. For a cluster on this machine, set {_ADDRESS}=local."
        ) from error
    return True


def address_at_hand() -> str | None:
    """Return the address of the cluster of RAY_ADDRESS, or of one on this machine, or None, without connecting.

    Raises:
        JobError: No cluster answers at RAY_ADDRESS.
    """
    address = os.environ.get(_ADDRESS)
    if address in {None, "", "auto"}:
        return next(filter(_answers, job.local_addresses()), None)
    if not _answers(address):
        raise JobError(
            f"Expected a Ray cluster at RAY_ADDRESS={address}; none answers. Start it, or unset RAY_ADDRESS to use "
            "this machine."
        )
    return address


def _answers(address: str) -> bool:
    """Whether a server listens at `[ray://]host:port`. Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # such as "local"; Ray itself reports a wrong one
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def capacities() -> dict[str, Capacity]:
    """Return the CPUs and GPUs of the cluster that this process is connected to, by Ray's names."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    most = job.autoscaler_limits()
    return {
        name: Capacity(total.get(name, 0), free.get(name, 0), max(total.get(name, 0), most.get(name, 0)))
        for name in ("CPU", "GPU")
    }
