"""Work that needs no order, spread over a cluster by Ray Data: actors that each hold what they work with."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from job.capacity import check_resources, shortage
from job.cluster import capacities, connection
from job.worker import limit_devices
from nucleus.errors import JobError, NucleusError
from nucleus.storage.retries import set_storage_timeout, storage_timeout

__all__ = ["spread"]


Item = TypeVar("Item")
Answer = TypeVar("Answer")

_LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
_NUMBER, _ANSWER = "number", "answer"


@dataclass(frozen=True)
class _Crew:
    """The actors.

    Attributes:
        workers: How many.
        gpus: Of each, 0 or 1; each takes one CPU besides.
    """

    workers: int
    gpus: int


class _Worker(Generic[Item, Answer]):
    """An actor. This project's errors are answers too: Ray Data takes what an actor raises for a fault of its own."""

    def __init__(
        self, items: Sequence[Item], make: Callable[[], Callable[[Item], Answer]], timeout: float, gpus: int
    ) -> None:
        set_storage_timeout(timeout)
        self._items = items
        self._make = make
        self._gpus = gpus
        self._work: Callable[[Item], Answer] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        answers = np.empty(len(batch[_NUMBER]), object)
        for place, number in enumerate(batch[_NUMBER]):
            answers[place] = self._answer(self._items[number])
        return {_ANSWER: answers}

    def _answer(self, item: Item) -> Answer | NucleusError:
        try:
            if self._work is None:
                os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
                limit_devices(1, self._gpus)
                self._work = self._make()
            return self._work(item)
        except NucleusError as error:
            return error


def spread(
    items: Sequence[Item],
    make: Callable[[], Callable[[Item], Answer]],
    *,
    workers: int | None,
    waiting: Callable[[str], None],
    verbose: bool = False,
) -> Iterator[Answer]:
    """Work on each item somewhere on the cluster at hand; give the answers as they come.

    An actor that is lost with its machine is replaced and its item done again.

    Args:
        items: What is to be worked on, the longest work first.
        make: Called once in each actor, gives what works on an item.
        workers: How many actors; without it as many as the cluster has GPUs, or else CPUs.
        waiting: Told what has to be waited for, if there is no room at the beginning.
        verbose: Whether to show Ray's logs.

    Raises:
        NucleusError: What `make` or the work raised.
        JobError: There are not so many GPUs or CPUs, or Ray failed.
    """
    with nullcontext() if verbose else _silent_core(), connection(verbose=verbose):
        crew = _crew(workers, len(items), waiting)
        for answer in _answers(items, make, crew, verbose=verbose):
            if isinstance(answer, NucleusError):
                raise answer
            yield answer


@contextmanager
def _silent_core() -> Iterator[None]:
    """Keep Ray's core from warning of how Ray Data makes its actors, unless the user has set how much it tells."""
    if _LOG_LEVEL in os.environ:
        yield
        return
    os.environ[_LOG_LEVEL] = "fatal"
    try:
        yield
    finally:
        del os.environ[_LOG_LEVEL]


def _crew(workers: int | None, items: int, waiting: Callable[[str], None]) -> _Crew:
    """Actors for so many items on the cluster that this process is connected to."""
    found = capacities()
    gpus = 1 if found["GPU"].most else 0
    count = min(items, workers or int(found["GPU" if gpus else "CPU"].most) or 1)
    needed = {"CPU": count, "GPU": gpus * count}
    check_resources(needed, found, f"{count} workers", "say --workers 1")
    wait = shortage({"CPU": 1, "GPU": gpus}, found)
    if wait:
        waiting(f"Waiting for {wait}")
    return _Crew(count, gpus)


def _answers(
    items: Sequence[Item], make: Callable[[], Callable[[Item], Answer]], crew: _Crew, *, verbose: bool
) -> Iterator[Answer | NucleusError]:
    import ray.data
    from ray.exceptions import RayError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    numbers = [{_NUMBER: number} for number in range(len(items))]  # Ray Data warns of columns of any object
    answers = ray.data.from_items(numbers, override_num_blocks=len(items)).map_batches(
        _Worker,
        batch_size=1,
        batch_format="numpy",
        fn_constructor_args=(items, make, storage_timeout(), crew.gpus),
        compute=ray.data.ActorPoolStrategy(size=crew.workers),
        num_cpus=1,
        num_gpus=crew.gpus,
    )
    try:
        for row in answers.iter_rows():
            yield row[_ANSWER]
    except RayError as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise JobError(f"Expected the workers to finish; Ray Data failed: {told} Run it again with --debug.") from error
