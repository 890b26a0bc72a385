"""How long a request to the bucket is repeated before its error is the answer.

Servers restart, throttle and lose connections; what fails for such a reason is asked again, with growing random waits
(tenacity), until the storage timeout is over. What fails for good, such as missing rights, fails at once.
"""

from collections.abc import Callable
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)
from tenacity.stop import stop_base
from tenacity.wait import WaitBaseT

from nucleus.errors import TransientStorageError

__all__ = [
    "DEFAULT_STORAGE_TIMEOUT",
    "ask_briefly",
    "ask_patiently",
    "seconds_of_silence",
    "set_storage_timeout",
    "storage_timeout",
]

DEFAULT_STORAGE_TIMEOUT = 120.0
"""Seconds: longer than a server takes to restart."""
_BRIEF_ATTEMPTS = 5
_BRIEF_WAIT = 0.4
_LONGEST_WAIT = 5.0
_LONGEST_SILENCE = 20.0

Answer = TypeVar("Answer")

_timeout = DEFAULT_STORAGE_TIMEOUT


def storage_timeout() -> float:
    """Seconds for which this process repeats a request."""
    return _timeout


def set_storage_timeout(seconds: float) -> None:
    """Let this process repeat requests for so long."""
    global _timeout  # noqa: PLW0603  one setting of the process, as a time zone is
    _timeout = seconds


def seconds_of_silence() -> float:
    """How long a server may say nothing before a request counts as failed: often enough to ask a few times more."""
    return min(_LONGEST_SILENCE, _timeout / 3)


def ask_patiently(request: Callable[[], Answer]) -> Answer:
    """The answer to a request, repeated until the storage timeout is over.

    Raises:
        TransientStorageError: The last one, with how long it was tried.
    """
    try:
        return _repeated(request, _wait_within(_timeout), stop_after_delay(_timeout))
    except TransientStorageError as error:
        raise type(error)(
            f"{error} Asked again for {_timeout:g} s; for longer: nucleus --storage-timeout SECONDS ..."
        ) from error


def ask_briefly(request: Callable[[], Answer]) -> Answer:
    """The answer to a first request: repeated a few times within seconds, for a wrong address should show at once."""
    return _repeated(
        request, wait_random_exponential(multiplier=0.1, max=_BRIEF_WAIT), stop_after_attempt(_BRIEF_ATTEMPTS)
    )


def _wait_within(timeout: float) -> Callable[[RetryCallState], float]:
    """Growing random waits, the last of them cut so that the last request is made when the timeout is over."""
    growing = wait_random_exponential(multiplier=0.2, max=_LONGEST_WAIT)
    return lambda state: min(growing(state), max(0.0, timeout - (state.seconds_since_start or 0.0)))


def _repeated(request: Callable[[], Answer], wait: WaitBaseT, stop: stop_base) -> Answer:
    return Retrying(retry=retry_if_exception_type(TransientStorageError), wait=wait, stop=stop, reraise=True)(request)
