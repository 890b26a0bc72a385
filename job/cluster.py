"""Connection to the Ray cluster at hand, or to a new one on this machine."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import job
from job.capacity import Room, check_room
from nucleus.config.recipe import Recipe
from nucleus.errors import JobError
from nucleus.lazy import stderr_without

__all__ = ["address_at_hand", "cluster", "connected", "rooms"]


_ADDRESS = "RAY_ADDRESS"
_ANSWER_SECONDS = 5.0
_REMARK = rb"Set ray log level from environment variable"


@contextmanager
def connected(recipe: Recipe, *, own: bool, verbose: bool) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS or this machine offers, or start one for the time of the block.

    With `own`, one with room for the recipe is started on this machine, unless this process is connected already.

    Raises:
        JobError: The recipe asks for more than the cluster has.
    """
    wanted = recipe.workers.most * recipe.cpus_per_worker if own else None
    with cluster(own_cpus=wanted, verbose=verbose):
        check_room(recipe, rooms())
        with _address_known():
            yield


@contextmanager
def cluster(*, own_cpus: int | None = None, verbose: bool = False) -> Iterator[None]:
    """The cluster that this process is connected to; else that of RAY_ADDRESS or this machine, or a new one.

    Args:
        own_cpus: Start one on this machine with at least so many CPUs, though it has fewer, even if another is at hand.
        verbose: Whether to show Ray's logs.
    """
    import ray

    with redirect_stdout(sys.stderr):  # where Ray says what its machines complain of; results alone go to stdout
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
    """Name this cluster to the actors of Ray Train for the time of the block.

    The one that cleans up after a dead controller asks the cluster of RAY_ADDRESS, else the one that was started last
    on its machine. That may be another, which does not know the controller: it is taken for dead and its run ended.
    """
    import ray

    job.pass_to_controller(_ADDRESS)
    if ray.util.client.ray.is_connected():  # by ray://, which RAY_ADDRESS has named already
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
    """Join the cluster of RAY_ADDRESS, or else one on this machine, if there is any."""
    import ray

    address = address_at_hand()
    if address is None:
        return False
    try:
        ray.init(address=address, **settings)
    except ConnectionError as error:
        raise JobError(
            f"Expected to join the Ray cluster at {address}; that failed, perhaps for its token. Run nucleus doctor to "
            f"see why, or say {_ADDRESS}=local for a cluster of your own."
        ) from error
    return True


def address_at_hand() -> str | None:
    """Where the cluster of RAY_ADDRESS is, or else one on this machine, if there is any. Joins none.

    Raises:
        JobError: Nobody answers at RAY_ADDRESS.
    """
    address = os.environ.get(_ADDRESS)
    if address in {None, "", "auto"}:
        return next(filter(_answers, job.local_addresses()), None)
    if not _answers(address):
        raise JobError(
            f"Expected a Ray cluster at RAY_ADDRESS={address}; none answers. Start it, or unset the variable to "
            "use this machine."
        )
    return address


def _answers(address: str) -> bool:
    """Whether somebody listens at `[ray://]host:port`; Ray itself waits for minutes where a dead head was."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # "local" and the like: Ray says what is wrong
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def rooms() -> dict[str, Room]:
    """The room of the cluster that this process is connected to, for CPUs and GPUs."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    most = job.autoscaler_limits()
    return {
        name: Room(total.get(name, 0), free.get(name, 0), max(total.get(name, 0), most.get(name, 0)))
        for name in ("CPU", "GPU")
    }
