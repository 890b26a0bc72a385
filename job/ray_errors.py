"""Errors of Ray 2.60 in words of this project: the error of ours that one wraps, or its last cause in one line.

Ray does not promise to keep the attributes in which its errors have their causes.
"""

import re
from collections.abc import Iterator, Sequence

from nucleus.errors import NucleusError
from nucleus.text import first_line

__all__ = ["failure_text", "is_from_ray", "our_error"]

_CAUSES = ("cause", "controller_failure", "health_check_failure", "base_exc", "_base_exc", "client_exc")
"""Attributes of Ray's errors with the error that they wrap."""
_WORKERS = "worker_failures"
"""Attribute of an error of Ray Train with the errors of the workers, by rank."""
_DIED = "a process died: it was killed, often because the machine's memory was full, or it crashed"
_EXPLAINED = {
    "ActorDiedError": _DIED,
    "ActorUnavailableError": _DIED,
    "LocalRayletDiedError": "Ray's process on a machine died, often because the machine's memory was full",
    "NodeDiedError": "a machine of the cluster was lost",
    "ObjectStoreFullError": "Ray's memory for objects is full",
    "OutOfDiskError": "a disk of the cluster is full",
    "OutOfMemoryError": "a machine's memory was full, so Ray ended a process; use fewer workers or smaller batches",
    "WorkerCrashedError": _DIED,
    "WorkerGroupStartupTimeoutError": "the workers did not start in time",
    "WorkerHealthCheckTimeoutError": "a worker did not answer for stall_timeout seconds",
}
"""What Ray's own errors mean; their messages are advice on Ray's settings."""
_RAISED = re.compile(r"^(?!ray\.)[\w.]*(?:Error|Exception|Exit|Interrupt)(?::|$)")
"""A line of a traceback that names an exception, and not one of Ray."""
_TRACEBACK = "Traceback (most recent call last)"
_PLAIN = (Exception, RuntimeError)
"""Classes that say nothing beside the message; Ray's own code and its job API raise them."""


def our_error(error: BaseException | None) -> NucleusError | None:
    """Return the first error of this project in a chain of causes; None if there is none."""
    return next((cause for cause in _chain(error) if isinstance(cause, NucleusError)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that it wraps, the innermost last; of several workers, the first that failed."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        workers = getattr(error, _WORKERS, None) or {}
        inner = [*workers.values(), *(getattr(error, name, None) for name in _CAUSES)]
        error = next((cause for cause in inner if isinstance(cause, BaseException)), error.__cause__)


def is_from_ray(error: BaseException) -> bool:
    """Return whether Ray raised an error, or wraps one that was raised in one of its processes."""
    from ray.exceptions import RayError

    return isinstance(error, RayError) or type(error).__module__.partition(".")[0] == "ray"


def failure_text(error: BaseException) -> str:
    """Return the last cause of an error of Ray in one line: the user's own exception, else what Ray's error means."""
    chain = list(_chain(error))
    cause, name = chain[-1], type(chain[-1]).__name__
    raised = None if name in _EXPLAINED else _raised_line(chain)
    if raised is not None:
        text = first_line(raised)
    elif is_from_ray(cause) or type(cause) in _PLAIN:
        text = _EXPLAINED.get(name) or first_line(cause) or name
    else:
        text = f"{name}: {first_line(cause)}".removesuffix(": ")
    return text.rstrip(".")


def _raised_line(chain: Sequence[BaseException]) -> str | None:
    """Return the line of the innermost exception, the first, in the tracebacks that errors have as text, or None."""
    cause = chain[-1]
    texts = [str(cause)] if _TRACEBACK in str(cause) else []
    if is_from_ray(cause):
        texts += [str(getattr(each, "traceback_str", "")) for each in reversed(chain)]
    lines = (line.strip() for text in texts for line in text.splitlines())
    return next((line for line in lines if _RAISED.match(line)), None)
