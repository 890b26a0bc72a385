"""A Dockerfile as its instructions, for a machine without an engine to build it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Instruction", "Stage", "instructions", "read_stages"]

_FLAG = re.compile(r"--([a-z]+)=(\S+)\s+")


@dataclass(frozen=True)
class Instruction:
    """One instruction, such as `RUN`.

    Attributes:
        name: Its name.
        flags: `--name=value` before its value.
        value: The rest, on one line.
    """

    name: str
    flags: dict[str, str]
    value: str

    @property
    def words(self) -> list[str]:
        """The value in JSON (exec) form."""
        return [str(word) for word in json.loads(self.value)]


@dataclass
class Stage:
    """What one `FROM` begins.

    Attributes:
        base: The image that it begins with.
        name: The name given by `AS`, or nothing.
        steps: The instructions after it.
    """

    base: str
    name: str
    steps: list[Instruction] = field(default_factory=list)

    def only(self, name: str) -> Instruction:
        """The one instruction of that name."""
        (found,) = [step for step in self.steps if step.name == name]
        return found


def instructions(text: str) -> list[Instruction]:
    """Instructions in their order, comments dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [_instruction(line) for line in joined.splitlines() if line.strip()]


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().partition(" ")
    rest, flags = rest.lstrip(), {}
    while match := _FLAG.match(rest):
        flags[match[1]] = match[2]
        rest = rest[match.end() :]
    return Instruction(name, flags, rest)


def read_stages(path: Path) -> list[Stage]:
    """The stages of a Dockerfile; what stands before the first `FROM` must be nothing."""
    stages: list[Stage] = []
    for step in instructions(path.read_text()):
        if step.name == "FROM":
            base, _, name = step.value.partition(" AS ")
            stages.append(Stage(base, name))
        else:
            stages[-1].steps.append(step)
    return stages
