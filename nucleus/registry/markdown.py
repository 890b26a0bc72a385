"""Markdown that is also pleasant to read as it stands: wrapped paragraphs, tables whose columns are aligned."""

import textwrap
from collections.abc import Sequence

__all__ = ["FENCE", "bullet", "paragraph", "table", "without_front_matter"]

FENCE = "---"
"""The line before and after front matter."""

_WIDTH = 110
_HELD = "\0"


def paragraph(*sentences: str) -> list[str]:
    """Sentences as the lines of one paragraph."""
    return _wrapped(" ".join(sentences), _WIDTH)


def bullet(*sentences: str) -> list[str]:
    """Sentences as the lines of one item of a list."""
    lines = _wrapped(" ".join(sentences), _WIDTH - 2)
    return [f"{'  ' if number else '- '}{line}" for number, line in enumerate(lines)]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """A table; the columns after the first `text_columns` hold numbers and are aligned right."""
    widths = [max(3, *(len(cells[number]) for cells in (columns, *rows))) for number in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if number < text_columns else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if number < text_columns else f"{'-' * (width - 1)}:" for number, width in enumerate(widths)]
    return [line(columns), line(rule), *(line(cells) for cells in rows)]


def without_front_matter(text: str) -> str:
    """A document as people read it."""
    if not text.startswith(f"{FENCE}\n"):
        return text
    return text.partition(f"\n{FENCE}\n")[2].lstrip("\n")


def _wrapped(text: str, width: int) -> list[str]:
    """Lines; no percent sign begins one."""
    lines = textwrap.wrap(text.replace(" %", f"{_HELD}%"), width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_HELD, " ") for line in lines]
