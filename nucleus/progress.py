"""How long work tells how far it is."""

from collections.abc import Callable, Mapping
from functools import partial

__all__ = ["Advance", "no_progress", "split_progress"]

Advance = Callable[[int, int], object]
"""Called with how much is done, of how much."""


def no_progress(done: int, total: int) -> None:
    """Nobody watches."""


def split_progress(sizes: Mapping[str, int], advance: Advance) -> dict[str, Advance]:
    """For each part of some work that begins now: what its progress tells `advance` of the whole.

    Args:
        sizes: How much each part is. Parts may be done at once.
        advance: Is told how much of all parts is done, of how much.
    """
    if advance is no_progress:
        return dict.fromkeys(sizes, no_progress)
    total, parts = sum(sizes.values()), dict.fromkeys(sizes, 0)
    advance(0, total)

    def tell(name: str, done: int, _: int) -> None:
        parts[name] = done
        advance(sum(parts.values()), total)

    return {name: partial(tell, name) for name in sizes}
