"""What trials a sweep has, and what a missing recipe says."""

from pathlib import Path

import pytest

from nucleus.config.settings import combinations, read_recipe
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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("trail.toml", r"trail.toml; found none \(did you mean .*trial.toml\?\).*demo, dsb2018-cpu"),
        ("dsb2018", r"did you mean dsb2018-"),
        ("zzz", r"zzz; found none\. Give a path, or the name of a shipped recipe: demo"),
        (".", r"found a folder. Name a file in it: .*trial.toml"),
    ],
)
def test_a_missing_recipe_names_those_near(
    given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.toml").write_text("")
    with pytest.raises(RecipeError, match=said):
        read_recipe(Path(given))
