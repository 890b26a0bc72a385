"""What lies behind the errors that Ray raises."""

from nucleus.errors import NucleusError

__all__ = ["our_error"]

_CAUSES = ("cause", "controller_failure", "health_check_failure")
"""Where Ray's errors keep those that they wrap."""


def our_error(error: BaseException | None) -> NucleusError | None:
    """The first of this project's errors in a chain of causes."""
    while error is not None:
        if isinstance(error, NucleusError):
            return error
        inner = (getattr(error, name, None) for name in _CAUSES)
        error = next((cause for cause in inner if isinstance(cause, BaseException)), error.__cause__)
    return None
