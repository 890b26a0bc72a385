"""Whether there is room for a run."""

from typing import Any

import pytest

from job.capacity import Capacity, _waits_for, check_capacity, resources_needed, shortage
from nucleus.config.recipe import Recipe
from nucleus.config.settings import parse_recipe
from nucleus.errors import JobError


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"model": "m", "dataset": "d", "input": {"batch_size": 12}, **changes}, "test")


def capacities(total: float, free: float, most: float | None = None, gpus: float = 0) -> dict[str, Capacity]:
    return {"CPU": Capacity(total, free, most or total), "GPU": Capacity(gpus, gpus, gpus)}


def test_a_run_needs_what_its_fewest_workers_take() -> None:
    assert resources_needed(recipe(workers=3, cpus_per_worker=2)) == {"CPU": 6, "GPU": 0}
    assert resources_needed(recipe(workers=[1, 4], gpus_per_worker=1)) == {"CPU": 1, "GPU": 1}


def test_what_is_held_by_others_is_waited_for() -> None:
    assert shortage(resources_needed(recipe(workers=2)), capacities(total=2, free=2)) is None
    assert shortage(resources_needed(recipe(workers=2)), capacities(total=4, free=1)) == "2 CPUs (1 of 4 are free)"
    assert shortage(resources_needed(recipe(workers=2, gpus_per_worker=1)), capacities(total=2, free=0, gpus=1)) == (
        "2 CPUs (0 of 2 are free) and 2 GPUs (1 of 1 are free)"
    )


def test_what_never_comes_is_refused() -> None:
    check_capacity(recipe(workers=4), capacities(total=0, free=0, most=4))  # the autoscaler will bring them
    with pytest.raises(JobError, match=r"16 CPUs \(found 2\) for 4 workers.*--set workers=1"):
        check_capacity(recipe(workers=4, cpus_per_worker=4), capacities(total=2, free=2))
    with pytest.raises(JobError, match=r"1 GPU \(found 0\)"):
        check_capacity(recipe(workers=1, gpus_per_worker=1), capacities(total=2, free=2))


def test_what_a_run_holds_itself_is_not_waited_for() -> None:
    two, waiting = recipe(workers=2), "Waiting for 2 CPUs (0 of 2 are free)"
    assert _waits_for(two, capacities(total=2, free=0), ["CREATED"]) == "Starting the workers"
    assert _waits_for(two, capacities(total=2, free=0), ["PENDING"]) == waiting
    assert _waits_for(two, capacities(total=2, free=0), ["REMOVED", "PENDING"]) == waiting
    elastic = recipe(workers=[1, 4])
    assert _waits_for(elastic, capacities(total=2, free=2), []) == f"Waiting until Ray has placed {elastic.workers}"
