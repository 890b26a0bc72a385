"""Names of datasets, models, runs and aliases, and references to a version of them."""

import re
from dataclasses import dataclass

from nucleus.errors import UriError

__all__ = ["Reference", "check_alias", "check_name", "clean_name", "parse_reference"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_UNWANTED = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True)
class Reference:
    """A name and which version of it: `dsb2018@latest`, `dsb2018@7`, `dsb2018@production`.

    Attributes:
        name: The dataset's or model's name.
        ref: A version, an alias or `latest`.
    """

    name: str
    ref: str = "latest"

    def __str__(self) -> str:
        return f"{self.name}@{self.ref}"


def check_name(name: str, what: str) -> str:
    """Return `name` if it may name a `what` in the bucket, else raise `UriError`.

    Names are 1 to 63 characters of `a-z 0-9 . _ -`, the first a letter or digit: what every S3 server, file
    system and URL takes as it is.
    """
    if not _NAME.fullmatch(name):
        raise UriError(
            f"Expected a {what} name of lower-case letters, digits and . _ - (at most 63, the first a letter "
            f"or digit); found {name!r}. Try {clean_name(name, fallback=what)!r}."
        )
    return name


def check_alias(alias: str) -> str:
    """Return `alias` if it may be one: a name that is neither a number nor `latest`. Raises `UriError`."""
    check_name(alias, "alias")
    if alias == "latest" or alias.isdecimal():
        raise UriError(f"Expected an alias that is neither a number nor 'latest'; found {alias!r}.")
    return alias


def clean_name(text: str, *, fallback: str = "image") -> str:
    """Turn any text into a name: lower case, every run of other characters a single `-`.

    >>> clean_name("Plate 3/Well A01.PNG")
    'plate-3-well-a01.png'
    """
    cleaned = _UNWANTED.sub("-", text.lower()).strip("-._")[:63].rstrip("-._")
    return cleaned or fallback


def parse_reference(text: str, what: str) -> Reference:
    """Read `NAME` or `NAME@REF`; without `@REF` the newest version is meant.

    Raises:
        UriError: The name or the reference has other characters than a name may have.
    """
    name, at, ref = text.partition("@")
    if at and not ref:
        raise UriError(f"Expected NAME@REF with a version or alias after the @; found {text!r}.")
    check_name(name, what)
    return Reference(name, check_name(ref, "version or alias")) if at else Reference(name)
