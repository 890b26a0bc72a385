"""Commands in blocks that are not run: the command, its options and the files it names exist."""

import re
import shlex

import click
import pytest

from nucleus.cli.main import cli
from tests.docs.blocks import DOCUMENTS, ROOT, Block, blocks_of

SHELL = [block for document in DOCUMENTS for block in blocks_of(document) if block.language == "sh"]
NUCLEUS = re.compile(r"(?:^|[(\s])nucleus (?=[a-z])")
OURS = re.compile(r"(?:file://)?((?:infra|docs|tests|requirements)/[\w./-]+)")


def lines(block: Block) -> list[str]:
    """Return the commands of a block, one per line, without comments."""
    joined = block.text.replace("\\\n", " ")
    return [shlex.join(words) for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def check(words: list[str]) -> None:
    """Raise `AssertionError` unless the command and its options exist."""
    command: click.Command = cli
    context = click.Context(cli, info_name="nucleus")
    while isinstance(command, click.Group):
        inner = command.get_command(context, words[0])
        assert inner is not None, f"no command {words[0]!r} in {context.command_path}"
        context = click.Context(inner, parent=context, info_name=words.pop(0))
        command = inner
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    options = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert options <= known, f"{context.command_path} has no {', '.join(sorted(options - known))}"


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_nucleus_commands_exist(block: Block) -> None:
    for line in lines(block):
        found = NUCLEUS.search(line)
        if found is None or line.startswith("kubectl"):  # there it is a name
            continue
        check(re.split(r"[|;&)]", line[found.end() :])[0].split())


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_targets_of_make_exist(block: Block) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in lines(block):
        if line.startswith("make "):
            named = {word for word in shlex.split(line)[1:] if "=" not in word}
            assert named <= targets, f"{block}: {named - targets}"


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_files_exist(block: Block) -> None:
    written = {each.value for each in blocks_of(block.document) if each.kind == "file"}
    for line in lines(block):
        for name in OURS.findall(line):
            ignored = name.endswith("/.env")
            assert ignored or name in written or (ROOT / name).exists(), f"{block}: {name}"


def test_wrong_commands_are_found() -> None:
    check(["models", "alias", "cells@2", "production"])
    for wrong in ("model list", "models compares a b", "train demo --epochs 3"):
        with pytest.raises(AssertionError, match="no"):
            check(wrong.split())
