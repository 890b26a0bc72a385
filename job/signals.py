"""Signals to a running job: stop, or save a checkpoint because a machine will be lost or a checkpoint is due."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

from job.cluster import lost_cluster
from job.events import driver_node_options
from nucleus.errors import RunStoppedError
from nucleus.surroundings import ENDING_SIGNALS
from nucleus.training.callbacks import Callback, Signal, Signals

__all__ = ["Interruptions", "RunSignals", "stop_request", "stops_on_signals"]


_CHECK_SECONDS = 10.0
"""Seconds between two checks. Ray's own watcher checks every 5 s; a reclaimed machine gives 30 s notice or more."""
_SAME_SECONDS = 1.0
"""Signals within this time are one request: a closed terminal sends two, and so may who ends a group of processes."""


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


class Interruptions:
    """The signals that a run's driver has received, and what they do.

    While the workers train, the first one asks them to save and stop. Any other ends the run at once.

    Args:
        callback: Shows that the workers were asked.

    Attributes:
        signal: Number of the last signal; None if there was none.
        resumable: Whether the run exists in the bucket.
    """

    def __init__(self, callback: Callback) -> None:
        self.signal: int | None = None
        self.resumable = False
        self._callback = callback
        self._ask: Callable[[], bool] | None = None
        self._asked = False
        self._last = -_SAME_SECONDS
        self._ignored: set[int] = set()

    @property
    def asked(self) -> bool:
        """Whether the workers were asked to stop."""
        return self._asked

    @contextmanager
    def asking(self, ask: Callable[[], bool]) -> Iterator[None]:
        """Within the block, the first signal calls `ask`, which returns whether there are workers that can save."""
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals of this process within the block; only in the main thread."""
        with ExitStack() as handlers:
            for number in ENDING_SIGNALS:
                before = signal.getsignal(number)
                if before is signal.SIG_IGN:
                    self._ignored.add(number)
                if before is not signal.SIG_IGN or number == signal.SIGINT:  # which a lost cluster sends
                    signal.signal(number, self._handle)
                    handlers.callback(signal.signal, number, before)
            yield

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: The run ends now. No other exception gets out of Ray's waiting.
        """
        if lost_cluster() is not None:
            raise KeyboardInterrupt
        if number in self._ignored:
            return
        now, before = time.monotonic(), self._last
        self._last = now
        if self.signal is not None and now - before < _SAME_SECONDS:
            return
        self.signal = number
        if self._asked or self._ask is None or not self._ask():
            raise KeyboardInterrupt
        self._asked = True
        with suppress(Exception):  # the terminal may be gone
            self._callback.on_warning(
                f"{signal.Signals(number).name}: the workers save and stop after their current step. "
                "A second signal (Ctrl-C) ends the run at once, without saving."
            )


@contextmanager
def stops_on_signals(callback: Callback, how_to_go_on: Callable[[], str]) -> Iterator[Interruptions]:
    """Let SIGINT (Ctrl-C), SIGTERM and SIGHUP, within the block, stop a run as `Interruptions` says.

    Signals that this process was started to ignore (`nohup`, a shell's background job) stay ignored. In a thread other
    than the main one, Python cannot handle signals, and nothing changes.

    Args:
        callback: Shows that the workers were asked.
        how_to_go_on: Returns the sentence that says how to go on with a run that exists in the bucket.

    Raises:
        RunStoppedError: A signal ended the run.
    """
    found = Interruptions(callback)
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    with found.handled():
        try:
            yield found
        except KeyboardInterrupt as error:
            number = signal.Signals(found.signal or signal.SIGINT)
            then = how_to_go_on() if found.resumable else "It had not begun, and nothing of it is in the bucket."
            raise RunStoppedError(
                f"Expected the run to finish; it was ended by {number.name}. {then}", number
            ) from error


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
