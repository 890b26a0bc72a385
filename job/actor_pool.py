"""A pool of actors on a Ray cluster that applies a function to independent items, which are dealt as they are found."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, islice
from typing import Any, Generic, TypeVar

from job.capacity import Capacity, capacities, check_resources, shortage
from job.cluster import connection
from job.ray_errors import failure_text, is_from_ray, our_error
from job.worker import limit_devices
from nucleus.errors import JobError, NucleusError
from nucleus.storage.files import disk_errors
from nucleus.storage.retries import set_storage_timeout, storage_timeout

__all__ = ["map_on_cluster", "spread_on_cluster"]


Item = TypeVar("Item")
Answer = TypeVar("Answer")

_AT_ONCE = 2
"""Items that an actor has: one that it works on, and the next."""
_MOST_LOSSES = 3
"""Actors that may be lost with the same item: then the item is what ends them."""


@dataclass(frozen=True)
class _ActorPlan:
    """The actors to start.

    Attributes:
        count: Number of actors.
        gpus: GPUs per actor, 0 or 1; each also takes one CPU.
    """

    count: int
    gpus: int


class _Actor(Generic[Item, Answer]):
    """What an actor does. It returns errors as answers: one that Ray raises says that the actor itself was lost."""

    def __init__(self, make: Callable[[], Callable[[Item], Answer]], timeout: float, gpus: int) -> None:
        set_storage_timeout(timeout)
        self._make = make
        self._gpus = gpus
        self._work: Callable[[Item], Answer] | None = None

    def ready(self) -> None:
        """Answer, which an actor can as soon as it has its resources."""

    def answer(self, item: Item) -> Answer | NucleusError:
        """Return the answer for an item."""
        try:
            with disk_errors():
                if self._work is None:
                    _limit_to_resources(self._gpus)
                    self._work = self._make()
                return self._work(item)
        except NucleusError as error:
            return error
        except Exception as error:
            return JobError(f"Expected a worker to finish its part; it failed: {failure_text(error)}")


def _limit_to_resources(gpus: int) -> None:
    """Limit this process to one CPU and to the GPU that Ray has assigned, if any; without one, import no TensorFlow."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["TF_NUM_INTRAOP_THREADS"] = "1"  # of ONNX Runtime too
    if gpus:
        limit_devices(1, gpus)
    else:
        os.environ["TF_NUM_INTEROP_THREADS"] = "2"  # as `limit_devices`
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray 2.60 leaves all GPUs visible


def map_on_cluster(
    items: Iterable[Item],
    make: Callable[[], Callable[[Item], Answer]],
    *,
    workers: int | None,
    waiting: Callable[[str], None],
    verbose: bool = False,
    with_gpus: bool = True,
) -> Iterator[Answer]:
    """Apply a function to each item on the available Ray cluster; yield the answers in the order of completion.

    Items are taken as actors have room for them, two for each, so there may be any number. An actor that is lost with
    its machine is replaced, and its items go to the others.

    Args:
        items: The items, the slowest first.
        make: Called once in each actor; returns the function.
        workers: Number of actors; by default, one per GPU of the cluster, or one per CPU if it has no GPU.
        waiting: Called with a text that says what the actors wait for, if the cluster is busy at the start.
        verbose: Whether to show Ray's logs.
        with_gpus: Whether each actor takes a GPU if the cluster has any; else it takes a CPU alone.

    Raises:
        NucleusError: An error of `make` or of the function.
        JobError: The cluster has too few GPUs or CPUs, or Ray failed.
    """
    remaining = iter(items)
    first = list(islice(remaining, 1))
    if not first:
        return
    with connection(verbose=verbose):
        found = capacities()
        most = _plan_actors(found, workers, with_gpus=with_gpus)
        first += islice(remaining, most.count - 1)
        plan = replace(most, count=len(first))
        _check_room(plan, found, waiting)
        with _Pool(make, plan) as pool:
            for answer in pool.answers(chain(first, remaining)):
                if isinstance(answer, NucleusError):
                    raise answer
                yield answer


@contextmanager
def spread_on_cluster(
    *, workers: int, waiting: Callable[[str], None], verbose: bool = False
) -> Iterator[Callable[[Iterable[Any], Callable[[], Callable[[Any], Any]]], Iterator[Any]]]:
    """Provide `map_on_cluster` for several calls, by actors without GPUs; the first call connects to the cluster.

    Args:
        workers: Number of actors.
        waiting: As for `map_on_cluster`.
        verbose: Whether to show Ray's logs.

    Raises:
        JobError: As `map_on_cluster`, in the block.
    """
    with ExitStack() as stack:
        connect = cache(lambda: stack.enter_context(connection(verbose=verbose)))

        def spread(items: Iterable[Any], make: Callable[[], Callable[[Any], Any]]) -> Iterator[Any]:
            connect()
            return map_on_cluster(items, make, workers=workers, waiting=waiting, verbose=verbose, with_gpus=False)

        yield spread


def _plan_actors(found: Mapping[str, Capacity], workers: int | None, *, with_gpus: bool) -> _ActorPlan:
    """Plan the actors on a cluster with these CPUs and GPUs, if there are enough items; see `map_on_cluster`."""
    gpus = 1 if with_gpus and found["GPU"].most else 0
    return _ActorPlan(workers or int(found["GPU" if gpus else "CPU"].most) or 1, gpus)


def _check_room(plan: _ActorPlan, found: Mapping[str, Capacity], waiting: Callable[[str], None]) -> None:
    """Say what the first actor waits for, if anything. Raises `JobError` if the cluster can never have all actors."""
    needed = {"CPU": plan.count, "GPU": plan.gpus * plan.count}
    check_resources(needed, found, f"{plan.count} workers", "use --workers 1")
    wait = shortage({"CPU": 1, "GPU": plan.gpus}, found)
    if wait:
        waiting(f"Waiting for {wait}")


class _Pool(Generic[Item, Answer]):
    """Actors on the cluster, and the items that each has.

    Ray Data maps a list that is complete before it starts; here items are dealt while they are found. Ray's own
    `ActorPool` ends with the first actor that is lost.
    """

    def __init__(self, make: Callable[[], Callable[[Item], Answer]], plan: _ActorPlan) -> None:
        import ray

        remote = ray.remote(_Actor).options(num_cpus=1, num_gpus=plan.gpus, max_restarts=0, max_task_retries=0)
        self._start: Callable[[], Any] = partial(remote.remote, make, storage_timeout(), plan.gpus)
        self._most_starts = _MOST_LOSSES * (plan.count + 1)
        self._asked: dict[Any, tuple[Any, _Dealt[Item] | None]] = {}
        """Actor and item (None: whether it is ready) by what Ray will answer."""
        self._room: dict[Any, int] = {}
        """How many more items each actor can have that is ready."""
        self._again: deque[_Dealt[Item]] = deque()
        self._actors: list[Any] = []
        self._starts = 0
        for _ in range(plan.count):
            self._add()

    def __enter__(self) -> "_Pool[Item, Answer]":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._kill(actor)

    def _kill(self, actor: Any) -> None:
        import ray

        with suppress(Exception):  # it, or the cluster, may be gone
            ray.kill(actor)

    def answers(self, items: Iterator[Item]) -> Iterator[Answer | NucleusError]:
        """Yield the answers for items, which are taken from the iterator as there is room for them."""
        try:
            yield from self._answers(items)
        except Exception as error:
            if not is_from_ray(error):
                raise
            raise our_error(error) or _failed(error) from error

    def _answers(self, items: Iterator[Item]) -> Iterator[Answer | NucleusError]:
        more, dealt = True, (_Dealt(item) for item in items)
        while True:
            more = self._deal(dealt) and more
            if not (more or self._again or len(self._asked) > len(self._actors) - len(self._room)):
                return  # what is left of `_asked` is whether actors are ready
            yield from self._answered()

    def _deal(self, dealt: "Iterator[_Dealt[Item]]") -> bool:
        """Give items to the actors that have room; return False if there are no more.

        Nobody gets a second item before everybody has one; while some are not ready yet, nobody gets a second one.
        """
        all_ready = len(self._room) == len(self._actors)
        for room in range(_AT_ONCE, 0 if all_ready else _AT_ONCE - 1, -1):
            for actor in [actor for actor, free in self._room.items() if free == room]:
                following = self._again.popleft() if self._again else next(dealt, None)
                if following is None:
                    return False
                self._room[actor] -= 1
                self._asked[actor.answer.remote(following.item)] = actor, following
        return True

    def _answered(self) -> Iterator[Answer | NucleusError]:
        """Wait for answers to items, and yield them; what a lost actor had is dealt again."""
        import ray
        from ray.exceptions import RayError

        ray.wait(list(self._asked), num_returns=1)
        for answered in ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0]:
            if answered not in self._asked:  # of an actor that was lost meanwhile
                continue
            actor, item = self._asked[answered]
            try:
                answer = ray.get(answered)
            except RayError as error:
                self._lose(actor, error)
                continue
            del self._asked[answered]
            self._room[actor] = _AT_ONCE if item is None else self._room[actor] + 1
            if item is not None:
                yield answer

    def _add(self) -> None:
        self._starts += 1
        actor = self._start()
        self._actors.append(actor)
        self._asked[actor.ready.remote()] = actor, None

    def _lose(self, actor: Any, error: Exception) -> None:
        """Deal the items of an actor again, and replace it. Raises `JobError` if that was tried often enough."""
        for answer, (asked, item) in list(self._asked.items()):
            if asked is actor:
                del self._asked[answer]
                if item is not None:
                    item.losses += 1
                    self._again.append(item)
        self._actors.remove(actor)
        self._room.pop(actor, None)
        self._kill(actor)  # it may only be out of reach
        if self._starts >= self._most_starts or any(item.losses >= _MOST_LOSSES for item in self._again):
            raise _failed(error) from error
        self._add()


@dataclass
class _Dealt(Generic[Item]):
    """An item, and how often an actor was lost that had it."""

    item: Item
    losses: int = 0


def _failed(error: Exception) -> JobError:
    return JobError(f"Expected the workers to finish; one failed: {failure_text(error)}. To see logs, use --debug.")
