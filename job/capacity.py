"""CPUs and GPUs of a Ray cluster: how many there are, what a run needs of them, and what it waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import job
from nucleus.errors import JobError
from nucleus.text import plural

if TYPE_CHECKING:
    from nucleus.config.recipe import Recipe
    from nucleus.training.callbacks import Callback

__all__ = [
    "Capacity",
    "WaitingReport",
    "capacities",
    "check_capacity",
    "check_resources",
    "resources_needed",
    "shortage",
]

_CALLS_PER_MINUTE = 6
"""Calls of `WaitingReport.tell` in a minute."""


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


def capacities() -> dict[str, Capacity]:
    """Return the CPUs and GPUs of the cluster that this process is connected to, by Ray's names: `CPU` and `GPU`."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    most = job.autoscaler_limits()
    return {
        name: Capacity(total.get(name, 0), free.get(name, 0), max(total.get(name, 0), most.get(name, 0)))
        for name in ("CPU", "GPU")
    }


def resources_needed(recipe: Recipe) -> dict[str, int]:
    """Return the CPUs and GPUs that a run needs for its smallest number of workers, by Ray's names."""
    fewest = recipe.workers.fewest
    return {"CPU": fewest * recipe.cpus_per_worker, "GPU": fewest * recipe.gpus_per_worker}


def check_capacity(recipe: Recipe, capacities: Mapping[str, Capacity]) -> None:
    """Raise `JobError` if a cluster can never have the CPUs and GPUs that a run needs.

    Args:
        recipe: The run's recipe.
        capacities: CPUs and GPUs of the cluster, by Ray's names.
    """
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
    """Return which of the wanted CPUs and GPUs are not free, such as `2 CPUs (1 of 4 are free)`; None if all are.

    Args:
        wanted: Number of CPUs and GPUs, by Ray's names.
        capacities: CPUs and GPUs of the cluster, by Ray's names.
    """
    waits = [
        f"{plural(count, name)} ({capacities[name].free:.0f} of {capacities[name].total:.0f} are free)"
        for name, count in wanted.items()
        if capacities[name].free < count
    ]
    return " and ".join(waits) or None


class WaitingReport:
    """Says, until the workers report something, what a run waits for: each new reason, and the same one every minute.

    Args:
        recipe: The run's recipe.
        callback: Shows the text.
    """

    def __init__(self, recipe: Recipe, callback: Callback) -> None:
        self._recipe = recipe
        self._callback = callback
        self._others = set(_reservations())
        self._shown = ""
        self._calls = 0

    def tell(self) -> None:
        """Show the reason if it is new or was shown a minute ago. Called every ten seconds."""
        with suppress(Exception):  # an error here must not end the thread that forwards events
            ours = [state for group, state in _reservations().items() if group not in self._others]
            text = _waits_for(self._recipe, capacities(), ours)
            if text != self._shown:
                self._shown, self._calls = text, 0
                self._callback.on_stage(text)
            elif self._calls % _CALLS_PER_MINUTE == 0:
                self._callback.on_stage(f"{text}, for {plural(self._calls // _CALLS_PER_MINUTE, 'minute')} now")
        self._calls += 1


def _reservations() -> dict[str, str]:
    """Return the state of each placement group of the cluster, by its id."""
    from ray.util import placement_group_table

    return {group: found["state"] for group, found in placement_group_table().items()}


def _waits_for(recipe: Recipe, capacity: Mapping[str, Capacity], reservations: Sequence[str]) -> str:
    """Return a sentence that says what a run without workers waits for.

    Args:
        recipe: The run's recipe.
        capacity: CPUs and GPUs of the cluster, by Ray's names.
        reservations: States of the placement groups created since the run started. What its own group holds is not
            free, but the run does not wait for it.
    """
    if "CREATED" in reservations and "PENDING" not in reservations:
        return "Starting the workers"
    waits = shortage(resources_needed(recipe), capacity)
    return f"Waiting for {waits}" if waits else f"Waiting until Ray has placed {recipe.workers}"
