"""Numbers, times and names as text, for the terminal, the report and the model card."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, overload

__all__ = [
    "KINDS",
    "MISSING",
    "NOT_STATED",
    "SPLIT_NAMES",
    "UNDEFINED",
    "aligned",
    "commit_text",
    "count",
    "epochs_text",
    "first_line",
    "moment_text",
    "number_or_text",
    "percent",
    "plain",
    "plural",
    "score_text",
    "seconds_between",
    "short",
    "time_text",
    "value_text",
]

MISSING = "–"
"""Stands for an unknown value."""
NOT_STATED = "not stated"
"""Stands for what nobody stated, such as a licence."""
UNDEFINED = "undefined"
"""Stands for a score of images among which none has a nucleus."""

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}

KINDS = {
    "all": "all kinds",
    "dark-field": "dark-field (fluorescence)",
    "bright-field": "bright-field",
    "stain": "stain (H&E and others)",
}
"""Titles of the kinds of images."""


def value_text(value: Any) -> str:
    """Return any value as text: None as a dash, a bool as in a recipe."""
    if value is None:
        return MISSING
    return str(value).lower() if isinstance(value, bool) else str(value)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines: columns two blanks apart, the first to the left, the others to the right.

    >>> print(aligned([["", "images"], ["all", "12"]]))
         images
    all      12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def count(value: float) -> str:
    """Return a number, rounded, with thousands separators.

    >>> count(12345.0)
    '12,345'
    """
    return f"{value:,.0f}"


def first_line(text: object, longest: int = 300) -> str:
    """Return the first line that is not blank, of a text or an error, cut to a number of characters.

    >>> first_line(ValueError("\\n  no such host  \\nTraceback"))
    'no such host'
    """
    lines = (line.strip() for line in str(text).splitlines())
    found = next((line for line in lines if line), "")
    return found if len(found) <= longest else f"{found[: longest - 1]}…"


def plural(number: float, one: str, more: str | None = None) -> str:
    """Return a number with its noun.

    >>> plural(1, "image"), plural(2, "nucleus", "nuclei")
    ('1 image', '2 nuclei')
    """
    return f"{count(number)} {one if number == 1 else more or one + 's'}"


def score_text(value: float | None, sign: str = "", digits: int = 4) -> str:
    """Return a score or, with `sign="+"`, a difference of scores.

    >>> score_text(0.61), score_text(0.0234, "+"), score_text(-0.00001, "+")
    ('0.6100', '+0.0234', '0.0000')
    """
    if value is None:
        return MISSING
    text = f"{value:{sign}.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"


def percent(part: float, whole: float, digits: int = 1) -> str:
    """Return a part as a percentage of the whole; a dash if the whole is 0.

    >>> percent(1, 8), percent(1, 8, digits=0), percent(0, 0)
    ('12.5 %', '12 %', '–')
    """
    return f"{100 * part / whole:.{digits}f} %" if whole else MISSING


@overload
def time_text(seconds: float) -> str: ...
@overload
def time_text(seconds: float | None) -> str | None: ...
def time_text(seconds: float | None) -> str | None:
    """Return a duration in its two largest units; None if it is unknown.

    >>> time_text(7.25), time_text(75), time_text(5554)
    ('7.2 s', '1 min 15 s', '1 h 32 min')
    """
    if seconds is None:
        return None
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:,} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def moment_text(moment: datetime | str) -> str:
    """Return a time in UTC, to the minute; text that is not ISO 8601 is returned unchanged.

    >>> moment_text("2026-11-23T18:58:06+01:00")
    '2026-11-23 17:58'
    """
    parsed = _parsed(moment) if isinstance(moment, str) else moment.astimezone(UTC)
    return str(moment) if parsed is None else f"{parsed:%Y-%m-%d %H:%M}"


def seconds_between(start: str, end: str) -> float | None:
    """Return the seconds between two ISO 8601 times, at least 0; None if either cannot be parsed."""
    first, last = _parsed(start), _parsed(end)
    return None if first is None or last is None else max(0.0, (last - first).total_seconds())


def _parsed(moment: str) -> datetime | None:
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)


def epochs_text(done: int, total: int | None) -> str:
    """Return the epochs done and the epochs in the recipe; a dash for 0 done or an unknown number.

    >>> epochs_text(12, 74)
    '12/74'
    """
    return f"{done or MISSING}/{MISSING if total is None else total}"


def commit_text(commit: str | None) -> str | None:
    """Return a commit shortened to 12 digits, with its `-dirty` suffix.

    >>> commit_text("0123456789abcdef0123456789abcdef01234567-dirty")
    '0123456789ab-dirty'
    """
    if commit is None:
        return None
    name, dash, remark = commit.partition("-")
    return f"{name[:12]}{dash}{remark}"


def number_or_text(text: str) -> int | str:
    """Return the number that an option gives in digits, or its text."""
    return int(text) if text.isascii() and text.isdigit() else text


def short(text: str, most: int = 40) -> str:
    """Return text on one line, its middle replaced by an ellipsis if it has more than `most` characters.

    >>> short("cells-sweep-0123456789-trial-7", 20)
    'cells-swee…9-trial-7'
    """
    text = plain(text)
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"


def plain(text: str) -> str:
    """Return text on one line; unprintable characters become the replacement character."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
