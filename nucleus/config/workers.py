"""How many workers a run may have."""

from typing import Annotated, Any, NamedTuple

from pydantic import PlainSerializer, PlainValidator

__all__ = ["WorkerCount", "WorkerRange"]

_LARGEST = 1024


class WorkerRange(NamedTuple):
    """From how many workers on a run goes on, and how many it takes at most; an elastic run has several counts.

    Attributes:
        fewest: Workers without which nothing goes on.
        most: Workers that are taken when the cluster has room.
    """

    fewest: int
    most: int

    @property
    def elastic(self) -> bool:
        """Whether the number may change while the run goes on."""
        return self.fewest < self.most

    @property
    def counts(self) -> range:
        """Every number that may occur."""
        return range(self.fewest, self.most + 1)

    def __str__(self) -> str:
        if self.elastic:
            return f"{self.fewest} to {self.most} workers"
        return f"{self.most} worker{'s' if self.most > 1 else ''}"


def _read(value: Any) -> WorkerRange:
    ends = [value, value] if isinstance(value, int) else value
    right = (
        isinstance(ends, list | tuple)
        and len(ends) == 2
        and all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
        and 1 <= ends[0] <= ends[1] <= _LARGEST
    )
    if not right:
        raise ValueError(f"expected a number from 1 to {_LARGEST}, or [fewest, most]")
    return WorkerRange(*ends)


def _written(value: WorkerRange) -> int | list[int]:
    return list(value) if value.elastic else value.most


WorkerCount = Annotated[WorkerRange, PlainValidator(_read), PlainSerializer(_written)]
"""A recipe's `workers`: a number, or `[fewest, most]`."""
