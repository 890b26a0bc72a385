"""Signals to a running job: stop, or save a checkpoint because a machine will be lost or a checkpoint is due."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from job.events import driver_node_options
from nucleus.errors import RunStoppedError
from nucleus.runs.plan import RunPlan
from nucleus.training.callbacks import Signal, Signals

__all__ = ["RunSignals", "stop_request", "stops_on_sigterm"]


_CHECK_SECONDS = 10.0
"""Seconds between two checks. Ray's own watcher checks every 5 s; a reclaimed machine gives 30 s notice or more."""


class _StopRequest:
    """A Ray actor that records whether a stop was requested."""

    def __init__(self) -> None:
        self._asked = False

    def ask(self) -> None:
        self._asked = True

    def asked(self) -> bool:
        return self._asked


def stop_request() -> Any:
    """Start the actor that records whether a stop was requested; return its handle for the driver and the workers."""
    import ray

    return ray.remote(_StopRequest).options(**driver_node_options()).remote()


@contextmanager
def stops_on_sigterm(request: Any, plan: RunPlan) -> Iterator[None]:
    """Make SIGTERM, within the block, ask the run to save and stop instead of ending this process.

    A second SIGTERM ends the process, for a run that cannot save because it waits for machines.

    Raises:
        RunStoppedError: A second SIGTERM arrived.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield
        return

    asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise RunStoppedError(
                f"Expected the run {plan.run} to save and stop; a second SIGTERM arrived before that. "
                f"{plan.how_to_go_on}"
            )
        asked = True
        request.ask.remote()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class RunSignals(Signals):
    """Signals that a worker receives: the first worker checks every few seconds, and broadcasts to the others.

    Args:
        request: The handle from the driver's `stop_request`.
        save_every: Seconds between checkpoints, for a run that Ray may restart at any time; None for no such limit.
        first: Whether this is the first worker.
    """

    def __init__(self, request: Any, save_every: float | None, *, first: bool) -> None:
        self._request = request
        self._save_every = save_every
        self._first = first
        self._saved_at = time.monotonic()
        self._check_seconds = min(_CHECK_SECONDS, save_every or _CHECK_SECONDS)
        self._next_check = time.monotonic() + self._check_seconds
        self._answer: Any = None
        self._stop = False
        self._saved_for: set[str] = set()

    def pending(self) -> bool:
        """Return whether it is time for `read`, on the first worker; False on all others."""
        if not self._first:
            return False
        self._poll()
        return self._stop or time.monotonic() >= self._next_check

    def read(self) -> Signal:
        """Return the signal, which is the same on every worker; every worker must call it."""
        import ray.train.collective

        now = time.monotonic()
        self._next_check = now + self._check_seconds
        due = self._save_every is not None and now - self._saved_at >= self._save_every
        stop, save = ray.train.collective.broadcast_from_rank_zero((self._stop, due))
        if stop:
            return Signal.STOP
        info = ray.train.get_preemption_info()
        leaving = set(info.preempted_node_ids) if info is not None else set()
        if leaving <= self._saved_for:
            return Signal.SAVE if save else Signal.CONTINUE
        self._saved_for = leaving
        return Signal.SAVE_BEFORE_LOSS

    def saved(self) -> None:
        """Record that a checkpoint is saved now; the next one is due `save_every` seconds later."""
        self._saved_at = time.monotonic()

    def _poll(self) -> None:
        """Query the driver's stop request without waiting for the answer."""
        import ray

        if self._answer is None:
            self._answer = self._request.asked.remote()
        elif ray.wait([self._answer], timeout=0)[0]:
            self._stop = bool(ray.get(self._answer))
            self._answer = None
