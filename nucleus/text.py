"""The curves of a run: each metric over the epochs, on the training and on the validation split."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

__all__ = [
    "KINDS",
    "MISSING",
    "NONE",
    "SPLIT_NAMES",
    "commit_text",
    "count",
    "date_of",
    "duration",
    "epochs_text",
    "moment_text",
    "plain",
    "plural",
    "score",
    "score_text",
    "seconds_between",
    "short",
    "time_text",
    "value_text",
]


SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


MISSING = "–"
"""In the place of a number that is not there."""

KINDS = {
    "all": "all kinds",
    "dark-field": "dark-field (fluorescence)",
    "bright-field": "bright-field",
    "stain": "stain (H&E and others)",
}
"""Kinds of images, in words."""


def score(scores: Mapping[str, float], key: str, digits: int = 3) -> str:
    """A score from 0 to 1, or `MISSING`."""
    return f"{scores[key]:.{digits}f}" if key in scores else MISSING


def count(value: float) -> str:
    """A whole number.

    >>> count(12345.0)
    '12,345'
    """
    return f"{value:,.0f}"


def plural(number: float, one: str, more: str | None = None) -> str:
    """A number with its noun.

    >>> plural(1, "image"), plural(2, "nucleus", "nuclei")
    ('1 image', '2 nuclei')
    """
    return f"{count(number)} {one if number == 1 else more or one + 's'}"


def duration(seconds: float) -> str:
    """A time in its two largest units.

    >>> duration(7.25), duration(75), duration(3700)
    ('7.2 s', '1 min 15 s', '1 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def date_of(moment: str) -> str:
    """A moment as date and time, UTC; the text itself if it is no ISO 8601.

    >>> date_of("2026-11-23T17:58:06+00:00")
    '23 November 2026, 17:58 UTC'
    """
    parsed = _parsed(moment)
    if parsed is None:
        return moment
    return f"{parsed.day} {parsed:%B %Y, %H:%M} UTC"


def seconds_between(begun: str, ended: str) -> float | None:
    """Seconds from one moment to a later one; None if either cannot be read."""
    first, last = _parsed(begun), _parsed(ended)
    return None if first is None or last is None else max(0.0, (last - first).total_seconds())


def short(text: str, most: int = 40) -> str:
    """The text, its middle left out if it is longer than that."""
    text = plain(text)
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"


def plain(text: str) -> str:
    """The text in one line, for figures: other characters than printable ones become a sign for them."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _parsed(moment: str) -> datetime | None:
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)


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
