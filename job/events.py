"""What a run tells while it goes on, from the first worker to whoever started it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol

from nucleus.progress import Advance, no_progress

__all__ = ["Listener", "SilentListener", "beside_driver", "forwarded"]

_POLL_SECONDS = 0.5
_FIRST_SECONDS = 10.0


class Listener(Protocol):
    """Whoever shows a run's progress."""

    def stage(self, text: str) -> None:
        """A new part of the work begins."""

    def warn(self, text: str) -> None:
        """Something that a person should know."""

    def watch(self, title: str, unit: Literal["items", "bytes"] = "items") -> AbstractContextManager[Advance]:
        """Give a function that is told how far some work of the driver is."""

    def steps(self, epoch: int, epochs: int, done: int, total: int, loss: float, images_per_second: float) -> None:
        """Steps of an epoch are done, with this mean loss at this speed."""

    def epoch(self, metrics: dict[str, float]) -> None:
        """An epoch is done."""


class SilentListener:
    """Shows nothing."""

    def stage(self, text: str) -> None:
        """Do nothing."""

    def warn(self, text: str) -> None:
        """Do nothing."""

    def watch(
        self,
        title: str,  # noqa: ARG002
        unit: Literal["items", "bytes"] = "items",  # noqa: ARG002
    ) -> AbstractContextManager[Advance]:
        """Do nothing."""
        return nullcontext(no_progress)

    def steps(self, epoch: int, epochs: int, done: int, total: int, loss: float, images_per_second: float) -> None:
        """Do nothing."""

    def epoch(self, metrics: dict[str, float]) -> None:
        """Do nothing."""


def beside_driver() -> dict[str, Any]:
    """Options of a Ray actor that lives on the driver's machine, and not on one that may be lost before it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


@contextmanager
def forwarded(listener: object, silence: Callable[[], None]) -> Iterator[Any]:
    """Give a Ray queue; events `(method, arguments)` put there by a worker reach the listener meanwhile.

    Args:
        listener: Who hears them: a `Listener`, or whatever has the methods.
        silence: Called every ten seconds from the beginning until there is one.
    """
    from ray.util.queue import Empty, Queue

    queue = Queue(actor_options=beside_driver())
    over = threading.Event()

    def forward() -> None:
        silent_until: float | None = time.monotonic() + _FIRST_SECONDS
        while True:
            try:
                method, arguments = queue.get(timeout=_POLL_SECONDS)
            except Empty:
                if over.is_set():
                    return
                if silent_until is not None and time.monotonic() > silent_until:
                    silent_until += _FIRST_SECONDS
                    silence()
                continue
            silent_until = None
            getattr(listener, method)(*arguments)

    thread = threading.Thread(target=forward, name="run-events", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        over.set()
        thread.join()
        queue.shutdown()
