"""What a check has found, and what puts it right."""

from dataclasses import dataclass
from typing import Literal

from nucleus.errors import NucleusError

__all__ = ["Finding", "State", "failed", "skipped"]

State = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        check: Its name.
        state: `ok`; `warning`, where the work goes on but not as one may think; `failed`, where it cannot; `skipped`,
            where another check has to be put right first.
        found: What it found.
        fix: What puts it right; None if nothing has to be.
    """

    check: str
    state: State
    found: str
    fix: str | None = None


def failed(check: str, error: NucleusError) -> Finding:
    """A check that ended in an error: its message's first sentence is what was found, the rest is the fix."""
    found, _, fix = str(error).partition(". ")
    return Finding(check, "failed", found.rstrip("."), fix or None)


def skipped(check: str, first: str) -> Finding:
    """A check that cannot be made before the check `first` is put right."""
    return Finding(check, "skipped", f"not looked at: {first} comes first")
