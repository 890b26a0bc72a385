"""Generator of what is derived from the code: `python docs/generate.py`, or `--stubs` for the stubs alone.

The reference of recipes and commands: the recipe's keys come from the models in `nucleus/config/recipe.py` (types and
ranges from their schema, texts from their docstrings), the shipped recipes from `job/recipes/`, the commands from
click's tree.

The stubs of the packages (`__init__.pyi`, from which `lazy_loader` takes what a package exposes): the names in
`__all__` of each module.
"""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import BaseModel

from nucleus.cli.main import cli
from nucleus.config.recipe import Recipe
from nucleus.config.settings import read_recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reference"
RECIPES = ROOT / "job" / "recipes"
NOTICE = "<!-- Made by `python docs/generate.py`. Do not edit. -->"

_RANGES = (
    ("minimum", "≥ {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "≤ {}"),
    ("exclusiveMaximum", "< {}"),
    ("multipleOf", "multiple of {}"),
)


def pages() -> dict[Path, str]:
    """Every generated file, by its path."""
    return {FOLDER / "recipes.md": recipes_page(), FOLDER / "commands.md": commands_page()}


def recipes_page() -> str:
    """Every key of a recipe, and what the shipped recipes set."""
    parts = [
        NOTICE,
        "# Recipes",
        "A recipe is a TOML file; `nucleus train`, `submit` and `sweep` take its path, or the name of a shipped one. "
        "Unknown keys and wrong values are refused before anything is started. `--set KEY=VALUE` changes a key, such "
        "as `--set optimizer.epochs=3`.",
        "## Keys",
    ]
    for path, model in _tables(Recipe):
        parts += _section(path, model)
    parts += ["## Shipped recipes", *_shipped()]
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """Every command with its usage, arguments and options."""
    root = click.Context(cli, info_name="nucleus")
    parts = [NOTICE, "# Commands", "The same as `nucleus COMMAND --help`."]
    for context in _commands(root):
        parts += _command(context)
    return "\n\n".join(parts) + "\n"


def _tables(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and those inside it, by the names of their TOML tables."""
    yield path, model
    for name, inner in _inner(model):
        yield from _tables(inner, f"{path}.{name}".lstrip("."))


def _inner(model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """The tables inside a model, by their keys."""
    found = ((name, _model_in(field.annotation)) for name, field in model.model_fields.items())
    return [(name, inner) for name, inner in found if inner is not None]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    found = [each for each in (annotation, *get_args(annotation)) if inspect.isclass(each)]
    return next((each for each in found if issubclass(each, BaseModel)), None)


def _section(path: str, model: type[BaseModel]) -> list[str]:
    doc = inspect.getdoc(model) or ""
    texts = _attributes(doc)
    tables = dict(_inner(model))
    fields = {name: field for name, field in model.model_fields.items() if name not in tables}
    silent = [name for name in fields if name not in texts]
    if silent:
        raise ValueError(f"Expected each key under Attributes in the docstring of {model.__name__}; not so {silent}.")
    schema = model.model_json_schema(mode="serialization")
    rows = []
    for name, field in fields.items():
        kind, limits = _kind(schema["properties"][name], schema.get("$defs", {}))
        default = "required" if field.is_required() else _code(schema["properties"][name].get("default"))
        rows.append((f"`{name}`", kind, default, limits, _escaped(texts[name])))
    title = f"`[{path}]`" if path else "At the top"
    summary = doc.split("\nAttributes:")[0].strip().replace("\n", " ")
    return [f"### {title}", _escaped(summary), _table(("key", "type", "default", "range", "what it is"), rows)]


def _attributes(doc: str) -> dict[str, str]:
    """The texts of a docstring's section `Attributes`, by name."""
    _, _, section = doc.partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in found}


def _kind(schema: dict[str, Any], defs: dict[str, Any]) -> tuple[str, str]:
    """Type and range of a value, in words, from its JSON schema."""
    if "$ref" in schema:
        schema = {**defs[schema["$ref"].rsplit("/", 1)[-1]], **schema}
    if "anyOf" in schema:
        parts = [_kind(each, defs) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(kind for kind, _ in parts), "; ".join(filter(None, (limits for _, limits in parts)))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return "one of " + ", ".join(f"`{value}`" for value in values), ""
    limits = [text.format(json.dumps(schema[key])) for key, text in _RANGES if key in schema]
    if "minItems" in schema or "maxItems" in schema:
        ends = sorted({schema.get("minItems", 0), schema.get("maxItems", "more")}, key=str)
        limits.append(f"{' to '.join(map(str, ends))} of them")
    kind = "table" if schema.get("type") == "object" else schema.get("type", "any")
    inside = schema.get("items") or schema.get("additionalProperties")
    if isinstance(inside, dict) and inside:
        inner, inner_limits = _kind(inside, defs)
        kind, limits = f"{kind} of {inner}", [*limits, *([f"each {inner_limits}"] if inner_limits else [])]
    return kind, ", ".join(limits)


def _shipped() -> list[str]:
    """What each shipped recipe is for, and one table of all keys that any of them sets otherwise than by default."""
    paths = sorted(RECIPES.glob("*.toml"))
    values = {path.stem: _flat(read_recipe(path).model_dump(mode="json")) for path in paths}
    required = [name for name, field in Recipe.model_fields.items() if field.is_required()]
    least = Recipe.model_validate(dict.fromkeys(required, "x"))
    defaults = {**_flat(least.model_dump(mode="json")), **dict.fromkeys(required)}
    keys = [key for key in defaults if any(value[key] != defaults[key] for value in values.values())]
    rows = [(f"`{key}`", _code(defaults[key]), *(_code(values[name][key]) for name in values)) for key in keys]
    headers = [(f"`{path.stem}`", _escaped(" ".join(_header(path.read_text())))) for path in paths]
    return [
        _table(("recipe", "what it is for"), headers),
        "Keys that at least one of them sets otherwise than by default:",
        _table(("key", "default", *(f"`{name}`" for name in values)), rows),
    ]


def _header(text: str) -> list[str]:
    """The comment that a recipe begins with."""
    return [line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; tables whose keys are the user's own stay values."""
    known = {path for path, _ in _tables(Recipe)}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        key = f"{prefix}{name}"
        flat |= _flat(inner, f"{key}.") if isinstance(inner, dict) and key in known else {key: inner}
    return flat


def _commands(context: click.Context) -> Iterator[click.Context]:
    """A command and those below it, in the order of `--help`."""
    yield context
    command = context.command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from _commands(click.Context(inner, parent=context, info_name=name))


def _command(context: click.Context) -> list[str]:
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"## {context.command_path}", f"```text\n{usage}\n```", *_paragraphs(command.help or "")]
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    if arguments:
        rows = [(f"`{each.make_metavar(context)}`", _needed(each), _type(each)) for each in arguments]
        parts.append(_table(("argument", "how many", "type"), rows))
    options = [each for each in command.params if isinstance(each, click.Option)]
    records = [record for each in options if (record := each.get_help_record(context)) is not None]
    if records:
        rows = [(f"`{names}`", *_help(text)) for names, text in records]
        parts.append(_table(("option", "what it does", "default and range"), rows))
    return parts


def _paragraphs(text: str) -> list[str]:
    return [_escaped(" ".join(part.split())) for part in re.split(r"\n\s*\n", inspect.cleandoc(text)) if part.strip()]


def _needed(argument: click.Argument) -> str:
    if argument.nargs == -1:
        return "one or more" if argument.required else "any number"
    return "one" if argument.required else "one or none"


def _type(argument: click.Argument) -> str:
    kind = argument.type
    if isinstance(kind, click.Choice):
        return "one of " + ", ".join(f"`{choice}`" for choice in kind.choices)
    if isinstance(kind, click.Path):
        return "path that exists" if kind.exists else "path"
    return kind.name


def _help(text: str) -> tuple[str, str]:
    """What an option does, and what stands in brackets behind it."""
    what = text.strip()
    limits: list[str] = []
    while found := re.fullmatch(r"(.*?)\s*\[([^\[\]]*)\]", what, flags=re.DOTALL):
        what = found[1]
        limits.insert(0, found[2].removeprefix("default: "))
    return _escaped(what), _escaped("; ".join(limits))


def _code(value: Any) -> str:
    """A value as it stands in a recipe; a dash for none."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        inside = ", ".join(f"{name} = {json.dumps(inner)}" for name, inner in value.items())
        return f"`{{ {inside} }}`" if inside else "`{}`"
    return f"`{json.dumps(value)}`"


def _escaped(text: str) -> str:
    """Text for Markdown: nothing outside of backticks is taken for markup or HTML."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def stubs() -> dict[Path, str]:
    """Return the stub of each package, by its path.

    Raises:
        ValueError: Two modules of a package have a name in common.
    """
    folders = sorted(path.parent for top in ("nucleus", "job") for path in (ROOT / top).rglob("__init__.pyi"))
    return {folder / "__init__.pyi": _stub(folder) for folder in folders if folder.name != "nucleus"}


def _stub(folder: Path) -> str:
    owners: dict[str, str] = {}
    for path in sorted(folder.glob("[!_]*.py")):
        for name in _public_names(path):
            if name in owners:
                raise ValueError(f"Expected {name} in one module of {folder}; found it in {owners[name]}, {path.stem}.")
            owners[name] = path.stem
    lines = [f"from .{module} import {name} as {name}\n" for name, module in owners.items()]
    return _in_order("".join(lines))


def _in_order(stub: str) -> str:
    """Return the imports of a stub as ruff sorts them."""
    command = [sys.executable, "-m", "ruff", "check", "--select=I", "--fix", "--quiet", "--stdin-filename=x.pyi", "-"]
    done = subprocess.run(command, input=stub, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout


def _public_names(path: Path) -> list[str]:
    """Return what `__all__` of a module lists, in its order; the module is not imported."""
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    lists = [ast.literal_eval(node.value) for node in found if getattr(node.targets[0], "id", "") == "__all__"]
    return lists[0] if lists else []


def main() -> None:
    """Write every page and stub, or the stubs alone."""
    made = stubs() if sys.argv[1:] == ["--stubs"] else {**pages(), **stubs()}
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        sys.stderr.write(f"{path}\n")


if __name__ == "__main__":
    main()
