"""Values as tables for people show them."""

from datetime import UTC, datetime
from typing import Any

__all__ = ["NONE", "commit_text", "epochs_text", "moment_text", "score_text", "time_text", "value_text"]

NONE = "\u2013"
"""Stands for what is not known."""


def value_text(value: Any) -> str:
    """Any value: None is a dash, and a truth value is written as in a recipe."""
    if value is None:
        return NONE
    return str(value).lower() if isinstance(value, bool) else str(value)


def score_text(value: float | None, sign: str = "") -> str:
    """A score or, with the sign `+`, a difference of two.

    >>> score_text(-0.00001, "+")
    '0.0000'
    """
    if value is None:
        return NONE
    text = f"{value:{sign}.4f}"
    return text if float(text) else f"{0:.4f}"


def time_text(seconds: float | None) -> str | None:
    """Seconds as people say them.

    >>> time_text(5554)
    '1 h 32 min'
    """
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def epochs_text(done: int, asked: int | None) -> str:
    """Epochs that are done, of those that the recipe asks for; where no epoch is known, nobody knows whether one is.

    >>> epochs_text(12, 74)
    '12/74'
    """
    return f"{done or NONE}/{NONE if asked is None else asked}"


def moment_text(moment: datetime) -> str:
    """A moment in UTC, to the minute."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"


def commit_text(commit: str | None) -> str | None:
    """A commit, short enough for a table.

    >>> commit_text("0123456789abcdef0123456789abcdef01234567-dirty")
    '0123456789ab-dirty'
    """
    if commit is None:
        return None
    name, dash, remark = commit.partition("-")
    return f"{name[:12]}{dash}{remark}"
