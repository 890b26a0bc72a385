"""Retries of requests to the bucket: which errors are retried, for how long, and by which clock.

Servers restart, throttle and drop connections. A request that fails for such a reason is retried with random,
exponentially growing waits (tenacity) until the storage timeout has passed. Permanent errors, such as missing
permissions, are raised at once.
"""

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from nucleus.errors import TransientStorageError

__all__ = [
    "DEFAULT_STORAGE_TIMEOUT",
    "Clock",
    "ask_briefly",
    "ask_patiently",
    "seconds_of_silence",
    "set_retry_clock",
    "set_storage_timeout",
    "storage_timeout",
]

DEFAULT_STORAGE_TIMEOUT = 120.0
"""Seconds; longer than a server takes to restart."""
_BRIEF_ATTEMPTS = 5
_BRIEF_WAIT = 0.4
_LONGEST_WAIT = 5.0
_LONGEST_SILENCE = 20.0

Answer = TypeVar("Answer")


class Clock(Protocol):
    """Clock of the retries: the module `time`, or a clock that a test controls."""

    def monotonic(self) -> float:
        """Return the seconds since an arbitrary moment."""

    def sleep(self, seconds: float, /) -> None:
        """Wait for a number of seconds."""


_timeout = DEFAULT_STORAGE_TIMEOUT
_clock: Clock = time


def storage_timeout() -> float:
    """Return for how many seconds this process retries a request."""
    return _timeout


def set_storage_timeout(seconds: float) -> None:
    """Set for how many seconds this process retries a request."""
    global _timeout  # noqa: PLW0603  one setting of the process, like the time zone
    _timeout = seconds


def set_retry_clock(clock: Clock) -> None:
    """Set the clock by which this process waits between retries."""
    global _clock  # noqa: PLW0603  one setting of the process, like the time zone
    _clock = clock


def seconds_of_silence() -> float:
    """Return for how many seconds a server may send nothing before a request fails: few enough for several retries."""
    return min(_LONGEST_SILENCE, _timeout / 3)


def ask_patiently(request: Callable[[], Answer]) -> Answer:
    """Return the answer to a request, which is retried until the storage timeout has passed.

    Raises:
        TransientStorageError: The error of the last attempt, with the time for which the request was retried.
    """
    clock, began, timeout = _clock, _clock.monotonic(), _timeout

    def left() -> float:
        return max(0.0, timeout - (clock.monotonic() - began))

    growing = wait_random_exponential(multiplier=0.2, max=_LONGEST_WAIT)
    try:
        return _repeated(
            request,
            lambda state: min(growing(state), left()),  # the last request is made when the timeout has passed
            lambda _: left() == 0.0,
            clock,
        )
    except TransientStorageError as error:
        raise type(error)(
            f"{error} Retried for {timeout:g} s; to retry for longer: nucleus --storage-timeout SECONDS ..."
        ) from error


def ask_briefly(request: Callable[[], Answer]) -> Answer:
    """Return the answer to a request, which is retried for a few seconds only, so that a wrong address shows soon."""
    wait = wait_random_exponential(multiplier=0.1, max=_BRIEF_WAIT)
    return _repeated(request, wait, stop_after_attempt(_BRIEF_ATTEMPTS), _clock)


def _repeated(
    request: Callable[[], Answer],
    wait: Callable[[RetryCallState], float],
    stop: Callable[[RetryCallState], bool],
    clock: Clock,
) -> Answer:
    retry = retry_if_exception_type(TransientStorageError)
    return Retrying(retry=retry, wait=wait, stop=stop, sleep=clock.sleep, reraise=True)(request)
