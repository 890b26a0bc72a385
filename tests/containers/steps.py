"""The steps of the container check: each is timed, printed and kept; a failed one ends its part."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Line", "Protocol", "Shell", "StepError"]

_TAIL = 25


class StepError(Exception):
    """A step did not do what it should."""


@dataclass(frozen=True)
class Line:
    """One step.

    Attributes:
        part: What it belongs to, such as the name of an S3 server.
        name: What was done.
        seconds: How long it took.
        result: What was seen, or why it failed.
        ok: Whether it did what it should.
    """

    part: str
    name: str
    seconds: float
    result: str
    ok: bool

    def __str__(self) -> str:
        return f"{'ok    ' if self.ok else 'FAILED'} {self.seconds:7.1f} s  {self.part}: {self.name}: {self.result}"


@dataclass
class Protocol:
    """All steps so far.

    Attributes:
        lines: The steps in their order.
        facts: Versions and sizes that were found.
    """

    lines: list[Line] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def step(self, part: str, name: str, act: Callable[[], str]) -> None:
        """Do a step and print its line.

        Args:
            part: What the step belongs to.
            name: What it does.
            act: Does it and returns what it saw.

        Raises:
            StepError: What `act` raised; its line is printed.
        """
        started = time.monotonic()
        try:
            result, ok = act(), True
        except (StepError, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            result, ok = str(error) or type(error).__name__, False
        line = Line(part, name, time.monotonic() - started, result.strip().splitlines()[-1] if result else "", ok)
        self.lines.append(line)
        print(line, flush=True)
        if not ok:
            raise StepError(result)

    @contextmanager
    def part(self) -> Iterator[None]:
        """Steps that need each other: after a failed one the rest is left out, and what comes after this goes on."""
        try:
            yield
        except StepError as error:
            print(f"       {error}", file=sys.stderr, flush=True)

    @property
    def ok(self) -> bool:
        """Whether every step did what it should."""
        return all(line.ok for line in self.lines)


@dataclass
class Shell:
    """Runs programs, and keeps everything that they print in a file.

    Attributes:
        log: The file.
        environment: Variables beside those of this process.
        folder: Current folder of the programs.
    """

    log: Path
    environment: dict[str, str]
    folder: Path

    def run(self, *words: str | Path, status: int = 0, timeout: float = 1800, text: str | None = None) -> str:
        """Run a program to its end.

        Args:
            words: The program and its arguments.
            status: The exit status that it should have.
            timeout: After this many seconds it is killed.
            text: Its standard input.

        Returns:
            Its standard output.

        Raises:
            StepError: Another exit status; the message has the end of what it printed.
        """
        command = [str(word) for word in words]
        done = subprocess.run(
            command, input=text or "", env=self.variables, cwd=self.folder,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        self.keep(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}(exit status {done.returncode})\n")
        if done.returncode != status:
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_TAIL:])
            raise StepError(f"{tail}\n{' '.join(command)[:200]}: exit status {done.returncode} instead of {status}")
        return done.stdout

    def json(self, *words: str | Path) -> Any:
        """What a program prints, as JSON."""
        return json.loads(self.run(*words))

    def keep(self, text: str) -> None:
        """Append to the log."""
        with self.log.open("a") as file:
            file.write(text)

    @property
    def variables(self) -> dict[str, str]:
        """The environment of the programs."""
        return {**os.environ, **self.environment}
