"""The settings of a sweep's trials: every combination of the values that keys are to have."""

import re
from collections.abc import Sequence
from itertools import product

from nucleus.errors import RecipeError

__all__ = ["combinations"]

_COMMA = re.compile(r",(?![^\[]*\])")
"""One that is not within brackets."""


def combinations(over: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of `KEY=VALUE,VALUE...`, as settings `KEY=VALUE` of a recipe, the first key changing slowest.

    >>> combinations(["optimizer.epochs=1,2", "workers=[1,2]"])
    [('optimizer.epochs=1', 'workers=[1,2]'), ('optimizer.epochs=2', 'workers=[1,2]')]

    Raises:
        RecipeError: No `=`, no value, or a key or value twice.
    """
    axes: dict[str, list[str]] = {}
    for text in over:
        key, equals, values = (part.strip() for part in text.partition("="))
        found = [value.strip() for value in _COMMA.split(values)]
        if not equals or not key or not all(found):
            raise RecipeError(
                f"Expected KEY=VALUE,VALUE..., such as optimizer.learning_rate=1e-4,1e-3; found {text!r}."
            )
        if key in axes or len(set(found)) < len(found):
            raise RecipeError(f"Expected each key and value once; found {text!r}.")
        axes[key] = [f"{key}={value}" for value in found]
    return list(product(*axes.values()))
