"""What to type to repeat a run and to use its model."""

import shlex
from collections.abc import Mapping
from typing import Any

import tomli_w

from nucleus.config.recipe import parse_recipe
from nucleus.data.manifest import DatasetManifest
from nucleus.errors import RecipeError
from nucleus.report.record import RunRecord

__all__ = ["commands_to_repeat", "commands_to_use", "differing_settings", "recipe_toml"]

_RECIPE_FILE = "recipe.toml"


def commands_to_use(record: RunRecord) -> str:
    """How to fetch the model and to find nuclei with it."""
    model = _model(record)
    return "\n".join(
        [
            *_bucket(record),
            f"nucleus models pull {model} model/",
            f"nucleus predict IMAGES --model {model} --out results/",
        ]
    )


def commands_to_repeat(record: RunRecord, dataset: DatasetManifest) -> str:
    """How to import the same data, train by the same recipe and score the result."""
    name = record.dataset.rpartition("@")[0].rpartition("/")[2] or dataset.name
    lines = [] if record.commit is None else [f"git checkout {_word(record.commit.removesuffix('-dirty'))}"]
    lines += [
        *_bucket(record),
        f"nucleus data import {_word(dataset.source)} {_word(name)} --seed {dataset.seed}",
        f"nucleus train {_RECIPE_FILE}",
    ]
    lines.append(f"nucleus evaluate {_model(record)} {_word(record.dataset)} --split test --gallery worst.png")
    return "\n".join(lines)


def recipe_toml(record: RunRecord) -> str:
    """The whole recipe, on the dataset version that was trained on."""
    return tomli_w.dumps(_without_none({**record.recipe, "dataset": record.dataset}))


def differing_settings(record: RunRecord) -> str:
    """The recipe's keys whose values are not the defaults, as TOML."""
    recipe = {**record.recipe, "dataset": record.dataset}
    required = {"model": record.recipe.get("model", record.model), "dataset": record.dataset}
    try:
        defaults = parse_recipe(required, "the report").model_dump(mode="json")
    except RecipeError:  # of another version of this package: all of it
        return recipe_toml(record)
    return tomli_w.dumps(_without_none({**required, **_difference(recipe, defaults)}))


def _difference(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    differing: dict[str, Any] = {}
    for key, value in given.items():
        before = usual.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            if part := _difference(value, before):
                differing[key] = part
        elif value != before:
            differing[key] = value
    return differing


def _without_none(value: Any) -> Any:
    """TOML has no null: a key without a value is left out."""
    if isinstance(value, Mapping):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value if item is not None]
    return value


def _bucket(record: RunRecord) -> list[str]:
    return [f"export NUCLEUS_BUCKET={_word(record.bucket)}"]


def _model(record: RunRecord) -> str:
    return _word(record.model if record.version is None else f"{record.model}@{record.version}")


def _word(text: str) -> str:
    """The text as one word of a shell, whatever it holds."""
    return shlex.quote(text)
