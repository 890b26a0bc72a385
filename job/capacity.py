"""Whether a cluster has room for a run: the CPUs and GPUs that its recipe names, against those that there are."""

from collections.abc import Mapping
from dataclasses import dataclass

from nucleus.config.recipe import Recipe
from nucleus.errors import JobError
from nucleus.text import plural

__all__ = ["Room", "check_room", "check_total", "missing", "needed"]


@dataclass(frozen=True)
class Room:
    """How many CPUs or GPUs a cluster has.

    Attributes:
        total: On its machines as they are.
        free: Of these, not held by others.
        most: With all machines that it may still start.
    """

    total: float
    free: float
    most: float


def needed(recipe: Recipe) -> dict[str, int]:
    """What the fewest workers of a run take, by Ray's names."""
    fewest = recipe.workers.fewest
    return {"CPU": fewest * recipe.cpus_per_worker, "GPU": fewest * recipe.gpus_per_worker}


def check_room(recipe: Recipe, rooms: Mapping[str, Room]) -> None:
    """Raise `JobError` if a cluster will never have what a run needs."""
    lower = "set workers, cpus_per_worker or gpus_per_worker lower, such as --set workers=1"
    check_total(needed(recipe), rooms, str(recipe.workers), lower)


def check_total(wanted: Mapping[str, int], rooms: Mapping[str, Room], who: str, instead: str) -> None:
    """Raise `JobError` if a cluster will never have so many CPUs and GPUs.

    Args:
        wanted: By Ray's names.
        rooms: The cluster's.
        who: Who needs them.
        instead: What the user may do besides adding nodes.
    """
    short = [
        f"{plural(count, name)} (found {rooms[name].most:.0f})"
        for name, count in wanted.items()
        if rooms[name].most < count
    ]
    if short:
        raise JobError(f"Expected a Ray cluster with {' and '.join(short)} for {who}. Add nodes, or {instead}.")


def missing(wanted: Mapping[str, int], rooms: Mapping[str, Room]) -> str | None:
    """What must be waited for, in words, by those who need so many CPUs and GPUs; None if they can begin at once."""
    waits = [
        f"{plural(count, name)} ({rooms[name].free:.0f} of {rooms[name].total:.0f} are free)"
        for name, count in wanted.items()
        if rooms[name].free < count
    ]
    return " and ".join(waits) or None
