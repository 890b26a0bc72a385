"""The number of actors, and the devices that each takes."""

from collections.abc import Callable

import pytest

from job import actor_pool
from job.cluster import Capacity
from nucleus.errors import ImageError, JobError


def actors(
    monkeypatch: pytest.MonkeyPatch, workers: int | None, items: int, **free: float
) -> tuple[int, int, list[str]]:
    """Number of actors, GPUs per actor and messages, on a cluster of four CPUs and `GPU` GPUs, some of them free."""
    total = {"CPU": 4.0, "GPU": free.pop("gpus", 0.0)}
    found = {name: Capacity(count, free.get(name, count), count) for name, count in total.items()}
    monkeypatch.setattr(actor_pool, "capacities", lambda: found)
    said: list[str] = []
    planned = actor_pool._plan_actors(workers, items, said.append)
    return planned.count, planned.gpus, said


def test_one_a_gpu_or_else_one_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert actors(monkeypatch, None, 99) == (4, 0, [])
    assert actors(monkeypatch, None, 99, gpus=2) == (2, 1, [])
    assert actors(monkeypatch, None, 3) == (3, 0, [])
    assert actors(monkeypatch, 2, 99) == (2, 0, [])


def test_too_many_and_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match=r"5 CPUs \(found 4\) for 5 workers.*--workers 1"):
        actors(monkeypatch, 5, 99)
    with pytest.raises(JobError, match=r"3 GPUs \(found 2\)"):
        actors(monkeypatch, 3, 99, gpus=2)
    assert actors(monkeypatch, None, 99, CPU=0.0) == (4, 0, ["Waiting for 1 CPU (0 of 4 are free)"])
    assert actors(monkeypatch, None, 99, gpus=1, GPU=0.0) == (1, 1, ["Waiting for 1 GPU (0 of 1 are free)"])


def answer(monkeypatch: pytest.MonkeyPatch, work: Callable[[str], str], item: str) -> object:
    monkeypatch.setattr(actor_pool, "limit_devices", lambda *_: None)
    return actor_pool._Actor(lambda: work, 1.0, 0).answer(item)


def test_what_a_worker_raises_is_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data would repeat the item, then end everything with advice on its retries."""

    def work(item: str) -> str:
        if item == "bad":
            raise ValueError("no such key\nTraceback (most recent call last):")
        if item == "ours":
            raise ImageError("Expected an image.")
        return item.upper()

    assert answer(monkeypatch, work, "a") == "A"
    ours, other = answer(monkeypatch, work, "ours"), answer(monkeypatch, work, "bad")
    assert (type(ours), str(ours)) == (ImageError, "Expected an image.")
    assert isinstance(other, JobError)
    assert str(other).endswith("ValueError: no such key")
