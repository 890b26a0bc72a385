"""Events of a run: callback calls that a worker puts into a Ray queue, and the driver makes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from nucleus.text import first_line
from nucleus.training.callbacks import Callback

if TYPE_CHECKING:
    from nucleus.training.checkpoint import History

__all__ = ["EventCallback", "driver_node_options", "event_queue"]

_POLL_SECONDS = 0.5
_FIRST_SECONDS = 10.0
"""Seconds between two calls of `on_silence`."""
_JOIN_SECONDS = 30.0
"""Seconds to wait for the calls that are left at the end."""


class EventCallback(Callback):
    """Sends stages, warnings, steps and epochs to the driver.

    Args:
        queue: A queue from `event_queue`.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def on_stage(self, text: str) -> None:
        self._queue.put(("on_stage", (text,)))

    def on_warning(self, text: str) -> None:
        self._queue.put(("on_warning", (text,)))

    def on_resume(self, history: History, where: str) -> None:  # noqa: ARG002
        self.on_stage(f"Resuming after {where}")

    def on_steps_end(
        self, epoch: int, epochs: int, done: int, total: int, loss: float, images_per_second: float
    ) -> None:
        self._queue.put(("on_steps_end", (epoch, epochs, done, total, loss, images_per_second)))

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        self._queue.put(("on_epoch_end", (metrics,)))


@contextmanager
def event_queue(
    callback: Callback, on_silence: Callable[[], None], begun: threading.Event | None = None
) -> Iterator[Any]:
    """Yield a Ray queue; a thread takes calls `(method, arguments)` from it and makes them on `callback`.

    A call that raises is left out, with one warning: a display that fails must not end the display of the run.

    Args:
        callback: The driver's callback.
        on_silence: Called every ten seconds until the first call arrives.
        begun: Set when the first call arrives.
    """
    from ray.exceptions import RayError
    from ray.util.queue import Empty, Queue

    queue = Queue(actor_options=driver_node_options())
    over, begun, calls = threading.Event(), begun or threading.Event(), _Calls(callback)

    def forward() -> None:
        silent_until = time.monotonic() + _FIRST_SECONDS
        while True:
            try:
                method, arguments = queue.get(timeout=_POLL_SECONDS)
            except Empty:
                if over.is_set():
                    return
                if not begun.is_set() and time.monotonic() > silent_until:
                    silent_until += _FIRST_SECONDS
                    on_silence()
                continue
            except RayError:  # the queue is lost with its machine or cluster; the run itself says why
                return
            begun.set()
            calls.make(method, arguments)

    thread = threading.Thread(target=forward, name="run-events", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        over.set()
        thread.join(_JOIN_SECONDS)  # a queue of a lost cluster may not answer
        if not thread.is_alive():
            with suppress(RayError):
                queue.shutdown()


class _Calls:
    """Makes calls on a callback; the first one that fails is told in a warning.

    Args:
        callback: The callback.
    """

    def __init__(self, callback: Callback) -> None:
        self._callback = callback
        self._failed = False

    def make(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Make a call; `method` is the name of a method of `Callback`."""
        try:
            getattr(self._callback, method)(*arguments)
        except Exception as error:
            if not self._failed:
                self._failed = True
                with suppress(Exception):  # what shows warnings may be what fails
                    self._callback.on_warning(
                        f"The run continues, but its display failed in {method}: {type(error).__name__}: "
                        f"{first_line(error)}. Further failures are not shown."
                    )


def driver_node_options() -> dict[str, Any]:
    """Return the options of a Ray actor that must run on the driver's node, because other nodes may be lost earlier."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
