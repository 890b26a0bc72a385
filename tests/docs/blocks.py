"""The fenced blocks of the documents, what is written above each, and a reader who follows them.

A block's marking is a comment on the line above it, which nobody sees when the document is shown:

- `<!-- run -->`: it is carried out. A shell block by bash, a Python block by Python, a `diff` on the files it names.
- `<!-- file: NAME -->`: it is saved under this name, for the blocks after it.
- `<!-- output -->`: the block before it prints this, perhaps among other lines; `...` stands for anything.
- `<!-- not run: REASON -->`: it is not. `run by tests/x/test_y.py::test_z` names a test that does the same.

What a program prints or what only draws something (no language, or `text`) needs none.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path

__all__ = ["DOCUMENTS", "ROOT", "Block", "Reader", "blocks_of"]

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if path.is_file()
)
"""Every document, from the root of the repository."""

_FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,})(?P<language>\w*)\s*$")
_MARKING = re.compile(r"^\s*<!-- (?P<kind>run|output|file|not run)(?:: (?P<value>.+))? -->\s*$")
_SECONDS = 600
_ENVIRONMENT, _FOLDER = "environment", "folder"


@dataclass(frozen=True)
class Block:
    """One block of a document.

    Attributes:
        document: Its path.
        line: Where the block's fence is, from 1.
        language: As the fence says; empty without.
        kind: `run`, `file`, `output`, `not run`, or None without a marking.
        value: What stands behind the marking's colon: a file's name or a reason.
        text: What is between the fences.
    """

    document: str
    line: int
    language: str
    kind: str | None
    value: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks_of(document: str) -> list[Block]:
    """The blocks of a document in order. Raises `ValueError` for one that has no end."""
    lines = (ROOT / document).read_text().splitlines()
    found, number = [], 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        closing = f"{fence['indent']}{fence['fence']}"
        try:
            end = lines.index(closing, number + 1)
        except ValueError:
            raise ValueError(f"Expected an end of the block at {document}:{number + 1}; found none.") from None
        marking = _MARKING.match(lines[number - 1]) if number else None
        inside = [line.removeprefix(fence["indent"]) for line in lines[number + 1 : end]]
        kind, value = (marking["kind"], marking["value"]) if marking else (None, None)
        found.append(Block(document, number + 1, fence["language"], kind, value, "\n".join(inside) + "\n"))
        number = end + 1
    return found


class Reader:
    """Follows a document: what a block does to folder and environment holds for the blocks after it.

    Args:
        folder: Where it begins.
        environment: Its variables.
        notes: Folder for what the reader itself has to remember.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], notes: Path) -> None:
        self._folder = folder
        self._environment = dict(environment)
        self._notes = notes
        self._printed = ""

    def follow(self, block: Block) -> None:
        """Do what a block's marking says. Raises `AssertionError` if that fails, with what was printed."""
        if block.kind == "file":
            assert block.value
            path = self._folder / block.value
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.kind == "output":
            wanted, printed = f"BEGIN...{block.text.strip()}...END", f"BEGIN {self._printed} END"
            found = OutputChecker().check_output(wanted, printed, ELLIPSIS | NORMALIZE_WHITESPACE)
            assert found, f"{block}: expected\n{block.text}\nprinted:\n{self._printed}"
        elif block.kind == "run" and block.language == "diff":
            self._change(block)
        elif block.kind == "run":
            self._run(block)

    def _run(self, block: Block) -> None:
        commands = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
        text = block.text
        if block.language == "sh":
            text += f"env -0 > '{self._notes / _ENVIRONMENT}'; pwd > '{self._notes / _FOLDER}'\n"
        log = self._notes / "printed"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*commands[block.language], text],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | str = process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = f"none after {_SECONDS} s"
        self._printed = log.read_text(errors="replace")
        assert status == 0, f"{block}: exit status {status}\n{block.text}\nprinted:\n{self._printed}"
        if block.language == "sh":
            pairs = (self._notes / _ENVIRONMENT).read_text().rstrip("\0").split("\0")
            self._environment = dict(pair.split("=", 1) for pair in pairs)
            self._folder = Path((self._notes / _FOLDER).read_text().rstrip("\n"))

    def _change(self, block: Block) -> None:
        """Make the changes of a diff. Its places are found by their lines, which must occur once, not by numbers."""
        for name, old, new in _hunks(block):
            path = self._folder / name
            text = path.read_text()
            assert text.count(old) == 1, f"{block}: expected once in {name}, found {text.count(old)} times:\n{old}"
            path.write_text(text.replace(old, new))


def _hunks(block: Block) -> Iterator[tuple[str, str, str]]:
    """File, old lines and new lines of each part of a diff."""
    name = ""
    for part in re.split(r"^(?=\+\+\+ |@@)", block.text, flags=re.MULTILINE):
        first, _, rest = part.partition("\n")
        if first.startswith("+++ "):
            name = first.removeprefix("+++ ").removeprefix("b/")
        elif first.startswith("@@"):
            lines = [line for line in rest.splitlines() if not line.startswith("--- ")]
            old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != sign) for sign in "+-")
            yield name, old, new
