"""Progress callbacks: `advance(done, total)`."""

from collections.abc import Callable, Mapping
from functools import partial

__all__ = ["Advance", "no_progress", "split_progress"]

Advance = Callable[[int, int], object]
"""A function that is called with the amount done and the total."""


def no_progress(done: int, total: int) -> None:
    """Do nothing; the default of `advance` arguments."""


def split_progress(sizes: Mapping[str, int], advance: Advance) -> dict[str, Advance]:
    """Return a progress callback for each part of a task; together they report the progress of the whole task.

    Args:
        sizes: Size of each part, by name. Parts may be processed concurrently.
        advance: Called with the amount done of all parts and their total size; once with 0 now.
    """
    if advance is no_progress:
        return dict.fromkeys(sizes, no_progress)
    total, parts = sum(sizes.values()), dict.fromkeys(sizes, 0)
    advance(0, total)

    def advance_part(name: str, done: int, _: int) -> None:
        parts[name] = done
        advance(sum(parts.values()), total)

    return {name: partial(advance_part, name) for name in sizes}
