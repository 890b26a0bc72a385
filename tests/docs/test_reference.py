"""The generated reference: up to date, with every key and every command."""

import re
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


def section(page: str, title: str) -> str:
    """What stands under a title of the second level."""
    text = next(text for path, text in PAGES.items() if path.name == page)
    _, found, rest = text.partition(f"\n## {title}\n")
    assert found, f"{page} has no {title}"
    return rest.split("\n## ")[0]


def keys(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation)
        else:
            yield name


def test_every_key_has_a_row_with_its_text() -> None:
    rows = [line.strip("|").split(" | ") for line in section("recipes.md", "Keys").splitlines() if "`" in line[:3]]
    assert sorted(row[0].strip() for row in rows) == sorted(f"`{name}`" for name in keys(Recipe))
    assert all(len(row) == 5 and row[-1].strip() for row in rows)


def test_every_command_is_there_with_its_options() -> None:
    def visit(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command]]:
        yield context.command_path, command
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                yield from visit(inner, click.Context(inner, parent=context, info_name=name))

    for path, command in visit(cli, click.Context(cli, info_name="nucleus")):
        told = section("commands.md", path)
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        for name in (name for option in options for name in option.opts):
            assert re.search(rf"^\| `(-\w, )?{name}\b", told, re.MULTILINE) or f"`{name}, " in told, f"{path} {name}"
