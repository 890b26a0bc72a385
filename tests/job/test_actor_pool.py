"""The number of actors, the devices that each takes, and how items are dealt to them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from job import actor_pool
from job.capacity import Capacity
from nucleus.errors import ImageError, JobError


class PlannedPool:
    """In the place of the pool: keeps the plan, and gives the items back."""

    plans: ClassVar[list[actor_pool._ActorPlan]] = []

    def __init__(self, _make: Any, plan: actor_pool._ActorPlan) -> None:
        self.plans.append(plan)

    def __enter__(self) -> "PlannedPool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answers(self, items: Iterator[int]) -> Iterator[int]:
        return items


def actors(
    monkeypatch: pytest.MonkeyPatch, workers: int | None, items: int, *, with_gpus: bool = True, **free: float
) -> tuple[int, int, list[str]]:
    """Number of actors, GPUs per actor and messages, on a cluster of four CPUs and `gpus` GPUs, some of them free."""
    total = {"CPU": 4.0, "GPU": free.pop("gpus", 0.0)}
    answers = [{name: Capacity(count, free.get(name, count), count) for name, count in total.items()}]
    monkeypatch.setattr(actor_pool, "capacities", answers.pop)  # asked once
    monkeypatch.setattr(actor_pool, "connection", lambda **_: nullcontext())
    monkeypatch.setattr(actor_pool, "_Pool", PlannedPool)
    said: list[str] = []
    done = actor_pool.map_on_cluster(
        range(items), lambda: abs, workers=workers, waiting=said.append, with_gpus=with_gpus
    )
    assert list(done) == list(range(items))
    planned = PlannedPool.plans.pop()
    return planned.count, planned.gpus, said


def test_one_a_gpu_or_else_one_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert actors(monkeypatch, None, 99) == (4, 0, [])
    assert actors(monkeypatch, None, 99, gpus=2) == (2, 1, [])
    assert actors(monkeypatch, None, 3) == (3, 0, [])
    assert actors(monkeypatch, 2, 99) == (2, 0, [])


def test_an_import_takes_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And connects to the cluster once, when it has something to spread."""
    assert actors(monkeypatch, 3, 99, with_gpus=False, gpus=1) == (3, 0, [])
    connected: list[bool] = []

    @contextmanager
    def connection(*, verbose: bool) -> Iterator[None]:
        connected.append(verbose)
        yield
        connected.clear()

    monkeypatch.setattr(actor_pool, "connection", connection)
    monkeypatch.setattr(actor_pool, "map_on_cluster", lambda items, _make, **how: iter([list(items), how]))
    with actor_pool.spread_on_cluster(workers=3, waiting=print) as spread:
        assert connected == []
        for _ in range(2):
            dealt, how = spread("ab", lambda: str.upper)
            assert (dealt, how["workers"], how["with_gpus"]) == (["a", "b"], 3, False)
        assert connected == [False]
    assert connected == []


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
    """An error that Ray raises says that the actor was lost."""

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


class FakeRay:
    """In the place of Ray: actors work when they are waited for, one answer at a time, and die as a test says.

    Args:
        dies: Whether the actor of a number dies of an item.
        pending: Numbers of actors that are never ready.
    """

    class RayError(Exception):
        """Ray's error."""

    def __init__(self, dies: Callable[[int, str], bool] = lambda *_: False, pending: tuple[int, ...] = ()) -> None:
        self.dies, self.pending = dies, pending
        self.exceptions = SimpleNamespace(RayError=self.RayError)
        self.started: list[FakeActor] = []
        self.killed: list[FakeActor] = []

    def remote(self, kind: Any) -> Any:
        def start(*arguments: Any) -> "FakeActor":
            self.started.append(FakeActor(len(self.started), kind(*arguments)))
            return self.started[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, asked: list["FakeCall"], num_returns: int, timeout: float | None = None) -> tuple[Any, Any]:  # noqa: ARG002
        ready = [call for call in asked if call.actor.number not in self.pending]
        assert ready, "it would wait for ever"
        return ready[:1], None

    def get(self, call: "FakeCall") -> Any:
        if call.item is None:
            return None
        if call.actor.dead or self.dies(call.actor.number, call.item):
            call.actor.dead = True
            raise self.RayError("ActorDiedError")
        return call.actor.work.answer(call.item)

    def kill(self, actor: "FakeActor") -> None:
        self.killed.append(actor)


class FakeActor:
    def __init__(self, number: int, work: Any) -> None:
        self.number, self.work, self.dead = number, work, False
        self.ready = SimpleNamespace(remote=lambda: FakeCall(self, None))
        self.answer = SimpleNamespace(remote=lambda item: FakeCall(self, item))


class FakeCall:
    def __init__(self, actor: FakeActor, item: str | None) -> None:
        self.actor, self.item = actor, item


def dealt(monkeypatch: pytest.MonkeyPatch, ray: FakeRay, items: Iterator[str], actors: int) -> list[str]:
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
    monkeypatch.setattr(actor_pool, "_limit_to_resources", lambda _: None)
    monkeypatch.setattr(actor_pool, "is_from_ray", lambda error: isinstance(error, FakeRay.RayError))
    with actor_pool._Pool(lambda: str.upper, actor_pool._ActorPlan(actors, 0)) as pool:
        found = list(pool.answers(items))
    assert ray.killed
    return found


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def test_items_are_taken_as_there_is_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ray, given, done = FakeRay(), 0, list[str]()

    def items() -> Iterator[str]:
        nonlocal given
        for letter in LETTERS:
            given += 1
            assert given - len(done) <= 2 * 3
            yield letter

    answer = actor_pool._Actor.answer
    monkeypatch.setattr(actor_pool._Actor, "answer", lambda self, item: done.append(item) or answer(self, item))
    assert sorted(dealt(monkeypatch, ray, items(), 3)) == list(LETTERS.upper())


def test_what_a_lost_actor_had_is_done_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replacement may find no machine: then those that are left do it all."""
    ray = FakeRay(dies=lambda number, _: number == 1, pending=(3,))
    assert sorted(dealt(monkeypatch, ray, iter(LETTERS), 3)) == list(LETTERS.upper())
    assert [actor.dead for actor in ray.started] == [False, True, False, False]


def test_an_item_that_ends_each_actor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(dies=lambda _, item: item == "k")
    with pytest.raises(JobError, match="one failed"):
        dealt(monkeypatch, ray, iter(LETTERS), 2)
    assert sum(actor.dead for actor in ray.started) == 3


def test_an_error_of_the_items_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def items() -> Iterator[str]:
        yield "a"
        raise ImageError("Expected other names.")

    with pytest.raises(ImageError, match="other names"):
        dealt(monkeypatch, FakeRay(), items(), 2)
    assert dealt(monkeypatch, FakeRay(), iter("a"), 2) == ["A"]
