"""The Ray cluster at hand, or a local one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nucleus.config.recipe import Recipe
from nucleus.errors import JobError

__all__ = ["connected"]


@contextmanager
def connected(recipe: Recipe, *, verbose: bool) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS or this machine offers, or start one for the time of the block.

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
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        wanted = recipe.workers * recipe.cpus_per_worker
        ray.init(address="local", num_cpus=max(wanted, os.cpu_count() or 1), **quiet)
    try:
        _check_resources(recipe)
        yield
    finally:
        ray.shutdown()


def _check_resources(recipe: Recipe) -> None:
    import ray

    has = ray.cluster_resources()
    wanted = {"CPU": recipe.workers * recipe.cpus_per_worker, "GPU": recipe.workers * recipe.gpus_per_worker}
    short = [f"{count} {name}s (found {has.get(name, 0):.0f})" for name, count in wanted.items() if has.get(name, 0) < count]
    if short:
        raise JobError(
            f"Expected a Ray cluster with {' and '.join(short)} for {recipe.workers} workers. Add nodes, or set "
            "workers, cpus_per_worker or gpus_per_worker lower, such as --set workers=1."
        )
