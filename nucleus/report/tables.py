"""Tables of the page: text in rows and columns."""

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Table", "thinned"]

_MOST_ROWS = 200


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows.

    Attributes:
        caption: What it holds.
        columns: Their titles.
        rows: Cells as text.
        words: Numbers of the columns, besides the first, that hold words and not numbers.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = field(default_factory=frozenset)


def thinned(rows: Sequence[Sequence[str]], most: int = _MOST_ROWS) -> list[Sequence[str]]:
    """At most so many of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
