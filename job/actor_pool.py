"""A pool of actors on a Ray cluster that applies a function to independent items, by Ray Data."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from job.cluster import capacities, check_resources, connection, shortage
from job.ray_internals import failure_text, is_from_ray, our_error
from job.worker import limit_devices
from nucleus.errors import JobError, NucleusError
from nucleus.storage.files import disk_errors
from nucleus.storage.retries import set_storage_timeout, storage_timeout

__all__ = ["map_on_cluster"]


Item = TypeVar("Item")
Answer = TypeVar("Answer")

_LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
_NUMBER, _ANSWER = "number", "answer"


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
    """An actor. It returns errors as answers: Ray Data would treat a raised error as its own failure, and repeat it."""

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
    items: Sequence[Item],
    make: Callable[[], Callable[[Item], Answer]],
    *,
    workers: int | None,
    waiting: Callable[[str], None],
    verbose: bool = False,
) -> Iterator[Answer]:
    """Apply a function to each item on the available Ray cluster; yield the answers in the order of completion.

    An actor that is lost with its machine is replaced, and its item is repeated.

    Args:
        items: The items, the slowest first.
        make: Called once in each actor; returns the function.
        workers: Number of actors; by default, one per GPU of the cluster, or one per CPU if it has no GPU.
        waiting: Called with a text that says what the actors wait for, if the cluster is busy at the start.
        verbose: Whether to show Ray's logs.

    Raises:
        NucleusError: An error of `make` or of the function.
        JobError: The cluster has too few GPUs or CPUs, or Ray failed.
    """
    with nullcontext() if verbose else _silent_core(), connection(verbose=verbose):
        actors = _plan_actors(workers, len(items), waiting)
        for answer in _answers(items, make, actors, verbose=verbose):
            if isinstance(answer, NucleusError):
                raise answer
            yield answer


@contextmanager
def _silent_core() -> Iterator[None]:
    """Suppress warnings of Ray's core about how Ray Data creates actors, unless the user has set a log level."""
    if _LOG_LEVEL in os.environ:
        yield
        return
    os.environ[_LOG_LEVEL] = "fatal"
    try:
        yield
    finally:
        del os.environ[_LOG_LEVEL]


def _plan_actors(workers: int | None, items: int, waiting: Callable[[str], None]) -> _ActorPlan:
    """Plan the actors for a number of items on the cluster that this process is connected to."""
    found = capacities()
    gpus = 1 if found["GPU"].most else 0
    count = min(items, workers or int(found["GPU" if gpus else "CPU"].most) or 1)
    needed = {"CPU": count, "GPU": gpus * count}
    check_resources(needed, found, f"{count} workers", "use --workers 1")
    wait = shortage({"CPU": 1, "GPU": gpus}, found)
    if wait:
        waiting(f"Waiting for {wait}")
    return _ActorPlan(count, gpus)


def _answers(
    items: Sequence[Item], make: Callable[[], Callable[[Item], Answer]], actors: _ActorPlan, *, verbose: bool
) -> Iterator[Answer | NucleusError]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    numbers = [{_NUMBER: number} for number in range(len(items))]  # Ray Data warns about columns of arbitrary objects
    answers = ray.data.from_items(numbers, override_num_blocks=len(items)).map_batches(
        _Actor,
        batch_size=1,
        batch_format="numpy",
        fn_constructor_args=(items, make, storage_timeout(), actors.gpus),
        compute=ray.data.ActorPoolStrategy(size=actors.count),
        num_cpus=1,
        num_gpus=actors.gpus,
    )
    try:
        for row in answers.iter_rows():
            yield row[_ANSWER]
    except Exception as error:
        if not is_from_ray(error):
            raise
        raise our_error(error) or JobError(
            f"Expected the workers to finish; one failed: {failure_text(error)}. To see logs, use --debug."
        ) from error
