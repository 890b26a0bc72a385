"""The reference is what the code says now, and says it of every key and command."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from nucleus.cli.main import cli
from nucleus.config.recipe import Recipe
from tests.docs.blocks import ROOT

GENERATOR = runpy.run_path(str(ROOT / "docs" / "generate.py"))
PAGES: dict[Path, str] = GENERATOR["pages"]()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_those_of_the_code(path: Path) -> None:
    assert path.read_text() == PAGES[path], f"{path.name} is not what the code says. Run: python docs/generate.py"


def test_no_page_is_left_over() -> None:
    assert set((ROOT / "docs" / "reference").iterdir()) == set(PAGES)


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from models(field.annotation)


def test_every_key_has_its_text() -> None:
    rows = {line.split(" | ")[0].removeprefix("| ") for line in PAGES_OF["recipes.md"] if line.startswith("| `")}
    keys = {name for model in models(Recipe) for name in model.model_fields}
    tables = {name for name in keys if f"`[{name}]`" in "".join(PAGES_OF["recipes.md"])} | {"normalization"}
    assert {f"`{name}`" for name in keys - tables} <= rows
    assert not [line for line in PAGES_OF["recipes.md"] if line.startswith("| `") and line.endswith("|  |\n")]


def test_every_command_is_there_with_its_options() -> None:
    def visit(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command]]:
        yield context.command_path, command
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                yield from visit(inner, click.Context(inner, parent=context, info_name=name))

    text = "".join(PAGES_OF["commands.md"])
    for path, command in visit(cli, click.Context(cli, info_name="nucleus")):
        _, found, section = text.partition(f"\n## {path}\n")
        assert found, path
        section = section.split("\n## ")[0]
        for parameter in command.params:
            names = parameter.opts if isinstance(parameter, click.Option) else []
            assert all(f"{name} " in section or f"{name}`" in section or f"{name}," in section for name in names)


PAGES_OF = {path.name: text.splitlines(keepends=True) for path, text in PAGES.items()}
