"""Recipe files: TOML and `KEY=VALUE` settings read into a `Recipe`, with errors that name the wrong key."""

import difflib
import re
import tomllib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from nucleus.config.recipe import Recipe
from nucleus.errors import RecipeError

__all__ = ["combinations", "parse_recipe", "read_recipe", "recipe_path"]

_RECIPES = Path(__file__).parents[2] / "job" / "recipes"
_MOST_NAMED = 3
"""Recipes that an error message names, at most."""
_COMMA = re.compile(r",(?![^\[]*\])")
"""Matches a comma outside brackets."""


def read_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `KEY=VALUE` settings.

    Args:
        path: A TOML file.
        settings: Changes such as `optimizer.epochs=3`. Values are TOML; bare words are strings.

    Raises:
        RecipeError: The file does not exist or is not TOML, a key is unknown, or a value has the wrong type or range.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        shipped = sorted(recipe.stem for recipe in _RECIPES.glob("*.toml"))
        raise RecipeError(
            f"Expected a recipe file at {path}; found none{_meant(path, shipped)}. Give a path, or the name of a "
            f"shipped recipe: {', '.join(shipped)}."
        ) from error
    except IsADirectoryError as error:
        inside = ", ".join(sorted(str(recipe) for recipe in path.glob("*.toml"))[:_MOST_NAMED])
        raise RecipeError(
            f"Expected a recipe file at {path}; found a folder. Name a file"
            f"{f' in it: {inside}' if inside else ', or a shipped recipe'}."
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"Expected TOML in the recipe {path}; {error}.") from error
    for setting in settings:
        _apply(content, setting)
    return parse_recipe(content, str(path))


def _meant(path: Path, shipped: Sequence[str]) -> str:
    """Return a remark with the recipes whose names are like that of a missing file; empty if there are none."""
    beside = {recipe.stem: str(recipe) for recipe in path.parent.glob("*.toml")}
    known = {**dict.fromkeys(shipped, ""), **beside}
    near = difflib.get_close_matches(path.stem, known, n=_MOST_NAMED)
    return f" (did you mean {' or '.join(known[name] or name for name in near)}?)" if near else ""


def parse_recipe(content: dict[str, Any], where: str) -> Recipe:
    """Check the content of a recipe. Raises `RecipeError`, which names every wrong key.

    Args:
        content: The tables and keys of the file.
        where: Name of the recipe in error messages.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = [_explain(dict(problem)) for problem in error.errors()]
        raise RecipeError(f"The recipe {where} is wrong: {'; '.join(problems)}.") from None


def _apply(content: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"Expected a setting KEY=VALUE, such as optimizer.epochs=3; found {setting!r}.")
    *tables, last = key.strip().split(".")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise RecipeError(f"Expected a table {table!r} in the setting {setting!r}; it is a single value.")
    try:
        content[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        content[last] = text.strip()


def _explain(problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        return f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known)})")
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return str(message)
    return f"{key}: {message[:1].lower()}{message[1:]}, found {problem['input']!r}"


def _known_keys(path: list[str]) -> list[str]:
    table: type[BaseModel] = Recipe
    for part in path:
        table = table.model_fields[part].annotation  # type: ignore[assignment]
    return sorted(table.model_fields)


def recipe_path(text: str) -> Path:
    """Return the path of a recipe that is given by its path or by the name of a shipped recipe."""
    shipped = _RECIPES / f"{text}.toml"
    return shipped if shipped.is_file() and not Path(text).is_file() else Path(text)


def combinations(over: Sequence[str]) -> list[tuple[str, ...]]:
    """Return every combination of `KEY=VALUE,VALUE...` as settings `KEY=VALUE`; the first key changes slowest.

    >>> combinations(["optimizer.epochs=1,2", "workers=[1,2]"])
    [('optimizer.epochs=1', 'workers=[1,2]'), ('optimizer.epochs=2', 'workers=[1,2]')]

    Raises:
        RecipeError: The `=` or a value is missing, or a key or value appears twice.
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
