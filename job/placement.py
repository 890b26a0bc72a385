"""Whether a cluster has room for a run: the CPUs and GPUs that its recipe names, against those that there are."""

from collections.abc import Mapping
from dataclasses import dataclass

from nucleus.config.recipe import Recipe
from nucleus.errors import JobError

__all__ = ["Room", "check_room", "missing", "needed"]


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
    wanted = needed(recipe)
    short = [
        f"{count} {name}s (found {rooms[name].most:.0f})" for name, count in wanted.items() if rooms[name].most < count
    ]
    if short:
        raise JobError(
            f"Expected a Ray cluster with {' and '.join(short)} for {recipe.workers}. Add nodes, or set "
            "workers, cpus_per_worker or gpus_per_worker lower, such as --set workers=1."
        )


def missing(recipe: Recipe, rooms: Mapping[str, Room]) -> str | None:
    """What a run has to wait for, in words; None if it can begin at once."""
    waits = [
        f"{count} {name}s ({rooms[name].free:.0f} of {rooms[name].total:.0f} are free)"
        for name, count in needed(recipe).items()
        if rooms[name].free < count
    ]
    return " and ".join(waits) or None
