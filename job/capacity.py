"""CPUs and GPUs: those that a run needs, those that a cluster has, and the difference."""

from collections.abc import Mapping
from dataclasses import dataclass

from nucleus.config.recipe import Recipe
from nucleus.errors import JobError
from nucleus.text import plural

__all__ = ["Capacity", "check_capacity", "check_resources", "resources_needed", "shortage"]


@dataclass(frozen=True)
class Capacity:
    """Number of CPUs or of GPUs in a cluster.

    Attributes:
        total: Number on the running machines.
        free: Number of these that are not in use.
        most: Number if the autoscaler starts all machines that it may.
    """

    total: float
    free: float
    most: float


def resources_needed(recipe: Recipe) -> dict[str, int]:
    """Return the CPUs and GPUs that a run needs for its smallest number of workers, by Ray's names."""
    fewest = recipe.workers.fewest
    return {"CPU": fewest * recipe.cpus_per_worker, "GPU": fewest * recipe.gpus_per_worker}


def check_capacity(recipe: Recipe, capacities: Mapping[str, Capacity]) -> None:
    """Raise `JobError` if a cluster can never have the CPUs and GPUs of a run."""
    lower = "lower workers, cpus_per_worker or gpus_per_worker, such as --set workers=1"
    check_resources(resources_needed(recipe), capacities, str(recipe.workers), lower)


def check_resources(wanted: Mapping[str, int], capacities: Mapping[str, Capacity], who: str, instead: str) -> None:
    """Raise `JobError` if a cluster can never have the wanted CPUs and GPUs.

    Args:
        wanted: Number of CPUs and GPUs, by Ray's names.
        capacities: CPUs and GPUs of the cluster, by Ray's names.
        who: The part of the error message that says what needs them.
        instead: The part of the error message with the alternative to adding nodes.
    """
    short = [
        f"{plural(count, name)} (found {capacities[name].most:.0f})"
        for name, count in wanted.items()
        if capacities[name].most < count
    ]
    if short:
        raise JobError(f"Expected a Ray cluster with {' and '.join(short)} for {who}. Add nodes, or {instead}.")


def shortage(wanted: Mapping[str, int], capacities: Mapping[str, Capacity]) -> str | None:
    """Return a text with the CPUs and GPUs that are not free, such as `2 CPUs (1 of 4 are free)`; None if all are."""
    waits = [
        f"{plural(count, name)} ({capacities[name].free:.0f} of {capacities[name].total:.0f} are free)"
        for name, count in wanted.items()
        if capacities[name].free < count
    ]
    return " and ".join(waits) or None
