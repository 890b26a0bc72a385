"""What a run is asked from outside while it trains: to stop, or to save as a machine will be lost or it is time."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from job.events import beside_driver
from nucleus.errors import RunStoppedError
from nucleus.runs.plan import RunPlan
from nucleus.training.callbacks import Demand

__all__ = ["Demands", "stop_request", "stops_on_sigterm"]


_LOOK_SECONDS = 10.0
"""Ray's own watcher looks every 5 s, and a reclaimed machine has 30 s and more."""


class _Request:
    """A Ray actor: whether a stop was asked for."""

    def __init__(self) -> None:
        self._asked = False

    def ask(self) -> None:
        self._asked = True

    def asked(self) -> bool:
        return self._asked


def stop_request() -> Any:
    """A new request, which nobody has asked for yet; workers get its handle."""
    import ray

    return ray.remote(_Request).options(**beside_driver()).remote()


@contextmanager
def stops_on_sigterm(request: Any, plan: RunPlan) -> Iterator[None]:
    """Within the block SIGTERM asks the run to save and stop instead of ending this process; a second one ends it.

    The second is for a run that cannot hear, because it waits for machines.
    """
    if threading.current_thread() is not threading.main_thread():  # Python takes signals in that one alone
        yield
        return

    asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise RunStoppedError(f"The run {plan.run} was told twice to stop. {plan.how_to_go_on}")
        asked = True
        request.ask.remote()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Demands:
    """One worker's ear for demands. The first worker looks from time to time; then all of them learn what is asked.

    Args:
        request: The driver's `stop_request`.
        save_every: Seconds after which to save again, for a run that Ray may start again at any time; or None.
        first: Whether this is the first worker.
    """

    def __init__(self, request: Any, save_every: float | None, *, first: bool) -> None:
        self._request = request
        self._save_every = save_every
        self._first = first
        self._saved_at = time.monotonic()
        self._look_seconds = min(_LOOK_SECONDS, save_every or _LOOK_SECONDS)
        self._next_look = time.monotonic() + self._look_seconds
        self._asking: Any = None
        self._stop = False
        self._saved_for: set[str] = set()

    def attention(self) -> bool:
        """Whether it is time for `demand`; costs next to nothing."""
        if not self._first:
            return False
        self._hear()
        return self._stop or time.monotonic() >= self._next_look

    def demand(self) -> Demand:
        """What is asked, the same on every worker; each must call it."""
        import ray.train.collective

        now = time.monotonic()
        self._next_look = now + self._look_seconds
        late = self._save_every is not None and now - self._saved_at >= self._save_every
        stop, save = ray.train.collective.broadcast_from_rank_zero((self._stop, late))
        if stop:
            return Demand.STOP
        info = ray.train.get_preemption_info()
        going = set(info.preempted_node_ids) if info is not None else set()
        if going <= self._saved_for:
            return Demand.SAVE if save else Demand.GO_ON
        self._saved_for = going
        return Demand.SAVE_FROM_LOSS

    def saved(self) -> None:
        """A checkpoint was kept."""
        self._saved_at = time.monotonic()

    def _hear(self) -> None:
        """Ask the driver's request without waiting for its answer."""
        import ray

        if self._asking is None:
            self._asking = self._request.asked.remote()
        elif ray.wait([self._asking], timeout=0)[0]:
            self._stop = bool(ray.get(self._asking))
            self._asking = None
