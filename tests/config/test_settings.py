"""What trials a sweep has."""

import pytest

from nucleus.config.settings import combinations
from nucleus.errors import RecipeError


def test_every_combination_once() -> None:
    assert combinations(["a.b=1, 2", "workers=[1,2],[2,4],3", "c=x"]) == [
        (f"a.b={b}", f"workers={workers}", "c=x") for b in (1, 2) for workers in ("[1,2]", "[2,4]", "3")
    ]
    assert combinations([]) == [()]


@pytest.mark.parametrize("over", [["a"], ["=1"], ["a="], ["a=1,,2"], ["a=1,1"], ["a=1", "a=2"]])
def test_what_means_nothing(over: list[str]) -> None:
    with pytest.raises(RecipeError, match="found"):
        combinations(over)
