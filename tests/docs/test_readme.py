"""The README: short, with commands that exist, and numbers that the documents explain."""

import itertools
import re
import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

from nucleus.cli.main import cli
from tests.docs.blocks import DOCUMENTS, ROOT, blocks_of

README = (ROOT / "README.md").read_text()
MOST_LINES, MOST_BYTES = 160, 12 * 1024
COMMANDS = sorted(
    {
        match
        for block in blocks_of("README.md")
        for match in re.findall(r"^nucleus ((?:[a-z]+)(?: [a-z]+)?)", block.text, flags=re.MULTILINE)
    }
)
NUMBER = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.])")


def section(document: Path, title: str) -> str:
    """The text under a heading of any level, up to the next heading of that level or above."""
    text = document.read_text()
    found = re.search(rf"^(#+) {re.escape(title)}\n", text, flags=re.MULTILINE)
    assert found, f"{document.name} has no {title}"
    return re.split(rf"^#{{1,{len(found[1])}}} ", text[found.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[str]:
    """The rows of the tables in a text, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {number for number, line in enumerate(lines) if set(line) <= set("|-: ")}
    return [line for number, line in enumerate(lines) if number not in heads and number + 1 not in heads]


def figures(text: str) -> set[str]:
    """The fractions in a text, each with the stars that make it bold."""
    plain = re.sub(r"`[^`]*`|\bv?\d+\.\d+\.\d+\b", "", text)  # without code and versions
    return {
        f"**{match[0]}**" if plain[: match.start()].endswith("**") else match[0] for match in NUMBER.finditer(plain)
    }


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES
    assert len(README.encode()) <= MOST_BYTES


def test_the_first_screen_has_a_picture_two_commands_and_what_they_take() -> None:
    """From nothing to a table of nuclei of one's own image."""
    first = README.partition("\n## ")[0]
    assert len(first.splitlines()) <= 35
    assert "![" in first
    commands = re.search(r"^```sh\n(.*?)```", first, flags=re.DOTALL | re.MULTILINE)
    assert commands
    assert [" ".join(line.split()[:2]) for line in commands[1].splitlines()] == ["pip install", "nucleus predict"]
    assert "make demo" in first
    assert re.search(r"GB of disk.*GB of memory", first)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line: str) -> None:
    first, *rest = line.split()
    groups = {"data", "weights", "models", "runs", "store"}
    words = [first, *rest] if first in groups else [first]
    run = CliRunner().invoke(cli, [*words, "--help"])
    assert run.exit_code == 0, run.output


@pytest.mark.parametrize(
    ("title", "sources"),
    [
        ("Scores", {"docs/segmentation.md": "Scores", "docs/models.md": "Scores"}),
        ("Speed", {"docs/performance.md": "Performance"}),
    ],
    ids=["scores", "speed"],
)
def test_every_figure_stands_in_the_document_that_explains_it(title: str, sources: dict[str, str]) -> None:
    """All figures of a row in one line there, with machine, data and command, and bold in both or in neither."""
    told = section(ROOT / "README.md", title)
    assert all(f"]({document}" in told for document in sources)
    here = [figures(row) for row in rows(told)]
    lines = (section(ROOT / document, heading).splitlines() for document, heading in sources.items())
    there = [figures(line) for line in itertools.chain.from_iterable(lines)]
    assert len(here) >= 8
    assert [row for row in here if not any(row <= line for line in there)] == []


@pytest.mark.parametrize("figure", ["0.90", "1 min 35 s", "32 s"])
def test_what_the_commands_take_is_measured(figure: str) -> None:
    performance = (ROOT / "docs/performance.md").read_text()
    assert figure in README
    assert figure in performance


def test_every_benchmark_has_its_number() -> None:
    names = runpy.run_path(str(ROOT / "tests/benchmarks/__main__.py"), run_name="benchmarks")["BENCHMARKS"]
    assert len(names) == 25
    table = rows(section(ROOT / "docs/performance.md", "Benchmarks"))
    measured = {row.split("`")[1] for row in table if re.search(r"\d", row.split("|")[-2])}
    assert measured == {*names}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_measured_number_is_filled_in(document: str) -> None:
    assert not re.search(r"@[A-Z_]+@", (ROOT / document).read_text())


def test_every_package_has_a_paragraph() -> None:
    architecture = ROOT / "docs/architecture.md"
    packages = [path.parent.relative_to(ROOT) for path in (ROOT / "nucleus").glob("*/__init__.py")]
    for name in [*map(str, packages), "nucleus", "job", "infra", "tests"]:
        assert len(section(architecture, name).split()) >= 10, name


def test_modules_that_are_named_exist() -> None:
    """A path in a document leads to a file, unless the document itself makes the file."""
    for document in DOCUMENTS:
        made = {block.value for block in blocks_of(document) if block.kind == "file"}
        text = (ROOT / document).read_text()
        for name in set(re.findall(r"\b((?:nucleus|job|tests|docs|infra)/[\w/-]+\.(?:py|toml|md|yaml|json))\b", text)):
            there = (ROOT / name, (ROOT / document).parent / name)
            assert name in made or any(path.exists() for path in there), f"{document}: {name}"
