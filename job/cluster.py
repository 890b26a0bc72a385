"""The Ray cluster at hand, or a local one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nucleus.config.recipe import Recipe
from nucleus.errors import JobError

__all__ = ["connected"]


@contextmanager
def connected(recipe: Recipe, *, own: bool, verbose: bool) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS or this machine offers, or start one for the time of the block.

    With `own`, one with room for the recipe is started on this machine, unless this process is connected already.

    Raises:
        JobError: The recipe asks for more than the cluster has.
    """
    import ray

    if ray.is_initialized():
        _check_resources(recipe)
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": verbose, "logging_level": "info" if verbose else "error"}
    if own:  # the demo runs on any machine, if slower
        wanted = recipe.workers * recipe.cpus_per_worker
        ray.init(address="local", num_cpus=max(wanted, os.cpu_count() or 1), **quiet)
    elif not _joined(quiet):
        ray.init(address="local", **quiet)
    try:
        _check_resources(recipe)
        yield
    finally:
        ray.shutdown()


def _joined(settings: dict[str, Any]) -> bool:
    import ray

    try:
        ray.init(address="auto", **settings)
    except ConnectionError as error:
        address = os.environ.get("RAY_ADDRESS")
        if address:
            raise JobError(
                f"Expected a Ray cluster at RAY_ADDRESS={address}; none answers. Start it, or unset the variable to "
                "use this machine."
            ) from error
        return False
    return True


def _check_resources(recipe: Recipe) -> None:
    import ray

    has = ray.cluster_resources()
    wanted = {"CPU": recipe.workers * recipe.cpus_per_worker, "GPU": recipe.workers * recipe.gpus_per_worker}
    short = [
        f"{count} {name}s (found {has.get(name, 0):.0f})" for name, count in wanted.items() if has.get(name, 0) < count
    ]
    if short:
        raise JobError(
            f"Expected a Ray cluster with {' and '.join(short)} for {recipe.workers} workers. Add nodes, or set "
            "workers, cpus_per_worker or gpus_per_worker lower, such as --set workers=1."
        )
