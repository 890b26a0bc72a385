"""Fenced code blocks of the documents, their markers, and a `Reader` that runs them.

A block's marker is a comment on the line above it, which is not rendered:

- `<!-- run -->`: the block is run. A shell block by bash, a Python block by Python, a `diff` on the files it names.
- `<!-- file: NAME -->`: the block is saved under this name, for the blocks after it.
- `<!-- output -->`: the block before it prints this, possibly among other lines; `...` stands for any text.
- `<!-- not run: REASON -->`: the block is not run. `run by tests/x/test_y.py::test_z` names a test that does the same.

A block that shows what a program prints, or a drawing (no language, or `text`), needs no marker.
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
_MARKER = re.compile(r"^\s*<!-- (?P<kind>run|output|file|not run)(?:: (?P<value>.+))? -->\s*$")
_SECONDS = 1800
_ENVIRONMENT, _FOLDER = "environment", "folder"


@dataclass(frozen=True)
class Block:
    """One block of a document.

    Attributes:
        document: Path of the document.
        line: Line of the opening fence, from 1.
        language: Language that the fence names; empty if it names none.
        kind: `run`, `file`, `output`, `not run`, or None without a marker.
        value: Text after the colon of the marker: a file's name or a reason.
        text: Text between the fences.
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
    """Return the blocks of a document in order. Raise `ValueError` if one has no end."""
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
        marker = _MARKER.match(lines[number - 1]) if number else None
        inside = [line.removeprefix(fence["indent"]) for line in lines[number + 1 : end]]
        kind, value = (marker["kind"], marker["value"]) if marker else (None, None)
        found.append(Block(document, number + 1, fence["language"], kind, value, "\n".join(inside) + "\n"))
        number = end + 1
    return found


class Reader:
    """Runs the blocks of a document; changes of folder and environment hold for the blocks after them.

    Args:
        folder: Folder to begin in.
        environment: Environment variables to begin with.
        notes: Folder for the reader's own files.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], notes: Path) -> None:
        self._folder = folder
        self._environment = dict(environment)
        self._notes = notes
        self._printed = ""

    def follow(self, block: Block) -> None:
        """Do what a block's marker says. Raise `AssertionError`, with what was printed, if that fails."""
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
        """Apply a diff. The lines of each hunk must occur exactly once in the file; line numbers are not used."""
        for name, old, new in _hunks(block):
            path = self._folder / name
            text = path.read_text()
            assert text.count(old) == 1, f"{block}: expected once in {name}, found {text.count(old)} times:\n{old}"
            path.write_text(text.replace(old, new))


def _hunks(block: Block) -> Iterator[tuple[str, str, str]]:
    """Yield the file, the old lines and the new lines of each hunk of a diff."""
    name = ""
    for part in re.split(r"^(?=\+\+\+ |@@)", block.text, flags=re.MULTILINE):
        first, _, rest = part.partition("\n")
        if first.startswith("+++ "):
            name = first.removeprefix("+++ ").removeprefix("b/")
        elif first.startswith("@@"):
            lines = [line for line in rest.splitlines() if not line.startswith("--- ")]
            old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != sign) for sign in "+-")
            yield name, old, new
