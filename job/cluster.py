"""The Ray cluster at hand, or a local one."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from job.placement import Room, check_room
from nucleus.config.recipe import Recipe
from nucleus.errors import JobError

__all__ = ["cluster", "connected", "rooms"]

_ADDRESS = "RAY_ADDRESS"
_ANSWER_SECONDS = 5.0


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

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": verbose, "logging_level": "info" if verbose else "error"}
    if own_cpus is not None:
        ray.init(address="local", num_cpus=max(own_cpus, os.cpu_count() or 1), **quiet)
    elif not _joined(quiet):
        ray.init(address="local", **quiet)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _address_known() -> Iterator[None]:
    """Name this cluster to the actors of Ray Train for the time of the block.

    The one that cleans up after a dead controller asks the cluster of RAY_ADDRESS, else the one that was started last
    on its machine. That may be another, which does not know the controller: it is taken for dead and its run ended.
    """
    import ray
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.add(_ADDRESS)
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

    named = os.environ.get(_ADDRESS)
    found = named if named not in {None, "", "auto"} else next(filter(_answers, _local_addresses()), None)
    if found is None:
        return False
    try:
        if not _answers(found):
            raise ConnectionError(found)
        ray.init(address=found, **settings)
    except ConnectionError as error:
        where = f"as {_ADDRESS} says" if found == named else "on this machine"
        raise JobError(
            f"Expected a Ray cluster at {found}, {where}; none answers, or it refuses the token. Start it, set "
            f"RAY_AUTH_TOKEN, or say {_ADDRESS}=local for a cluster of your own."
        ) from error
    return True


def _local_addresses() -> list[str]:
    """Where Ray looks for a cluster of this machine: one that `ray start` has noted, then what runs."""
    from ray._private import services

    noted = services.find_bootstrap_address(None)
    return [*([noted] if noted else []), *services.find_gcs_addresses()]


def _answers(address: str) -> bool:
    """Whether somebody listens at `host:port`; Ray itself waits for minutes at an address that a dead head has left."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():  # ray://... and the like: Ray says what is wrong
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def rooms() -> dict[str, Room]:
    """The room of the cluster that this process is connected to, for CPUs and GPUs."""
    import ray
    from ray._private.state import state

    total, free = ray.cluster_resources(), ray.available_resources()
    most = state.get_max_resources_from_cluster_config() or {}
    return {
        name: Room(total.get(name, 0), free.get(name, 0), max(total.get(name, 0), most.get(name, 0)))
        for name in ("CPU", "GPU")
    }
