"""How long work tells how far it is."""

from collections.abc import Callable

__all__ = ["Advance", "no_progress"]

Advance = Callable[[int, int], object]
"""Called with how much is done, of how much."""


def no_progress(done: int, total: int) -> None:
    """Nobody watches."""
