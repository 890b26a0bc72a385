"""The rules for every message of an error: it begins with what was expected, and the commands that it names exist.

The messages are read from the source, where an error is made from a literal. Other tests assert facts that a message
gives (a path, a number, a command), not its wording.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from nucleus import errors
from nucleus.cli.main import cli

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("nucleus", "job") for path in (ROOT / package).rglob("*.py"))
HOLE = "{}"
"""What stands for a value in an f-string."""

OTHERWISE = {
    "The run {} was": "a run that was asked to stop: nothing is wrong",
    "{} of {} images could not be read": "a sum; each image has its own message before",
    "Cannot read {}": "the library's words follow",
    "{}: {}": "the library's or the server's words follow",
    "The recipe {} is wrong": "a list of keys follows, each with what was expected",
}
"""How messages may begin besides "Expected", and why."""


class Message(NamedTuple):
    """The literal that an error is made from.

    Attributes:
        place: File and line.
        error: The class's name.
        text: The message, with `HOLE` for each value.
    """

    place: str
    error: str
    text: str

    def __str__(self) -> str:
        return f"{self.place} {self.text}"


def literal(node: ast.expr) -> str | None:
    """The text of a string, an f-string or a sum of them; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp):
        left, right = literal(node.left), literal(node.right)
        return None if left is None and right is None else (left or HOLE) + (right or HOLE)
    return None


def messages() -> Iterator[Message]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors.__all__:
                text = literal(node.args[0]) if node.args else None
                if text is not None and text.strip(HOLE):
                    yield Message(f"{path.relative_to(ROOT)}:{node.lineno}", node.func.id, text)


MESSAGES = list(messages())


def test_messages_are_found() -> None:
    assert len(MESSAGES) > 100
    assert len({message.error for message in MESSAGES}) > 15


def test_each_begins_with_what_was_expected() -> None:
    assert [str(each) for each in MESSAGES if not each.text.startswith(("Expected ", *OTHERWISE))] == []


def test_each_says_what_was_found() -> None:
    """After a semicolon or a colon, in words or as a value; or in a sentence of its own."""
    expected = [message for message in MESSAGES if message.text.startswith("Expected ")]
    assert [str(each) for each in expected if not re.search(r"[;:.(] *\S", each.text)] == []


def test_each_is_one_or_more_sentences() -> None:
    """It ends with a full stop, a command to copy, or a value that may be either."""
    ends = re.compile(rf"([.!)]|{re.escape(HOLE)}|(Run|run|use|or|Add): [^.]+|\.\.\.)$")
    assert [str(each) for each in MESSAGES if not ends.search(each.text)] == []


def commands(text: str) -> set[str]:
    """Commands of this program that a message names after a colon, such as `models list`."""
    found = re.findall(r"\bnucleus ((?:--[\w-]+ [A-Z]+ )?[a-z]+(?: [a-z]+)?)", text)
    return {re.sub(r"^--[\w-]+ [A-Z]+ ", "", each) for each in found}


def test_commands_that_are_named_exist() -> None:
    """In every message and other text of the program that has `Run: nucleus ...`."""
    assert isinstance(cli, click.Group)
    named: set[str] = set()
    for path in SOURCES:
        texts = [literal(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.expr)]
        named |= {command for text in texts if text and "un: nucleus " in text for command in commands(text)}
    assert len(named) > 10
    for first, *rest in map(str.split, named):
        known = cli.get_command(click.Context(cli), first)
        assert known is not None, first
        if isinstance(known, click.Group) and rest:
            assert rest[0] in known.list_commands(click.Context(known)), (first, rest)
