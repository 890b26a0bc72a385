"""Names of datasets, models, runs and aliases, and references to a version such as `dsb2018@7`."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from nucleus.errors import UriError

__all__ = ["Reference", "check_alias", "check_name", "clean_name", "parse_reference", "unique_names"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_UNWANTED = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True)
class Reference:
    """A name with a version: `dsb2018@latest`, `dsb2018@7`, `dsb2018@production`.

    Attributes:
        name: Name of the dataset or model.
        ref: A version, an alias or `latest`.
    """

    name: str
    ref: str = "latest"

    def __str__(self) -> str:
        return f"{self.name}@{self.ref}"


def check_name(name: str, what: str) -> str:
    """Return `name` if it is a valid name, else raise `UriError`.

    Names have 1 to 63 characters of `a-z 0-9 . _ -` and begin with a letter or digit, so that every S3 server, file
    system and URL accepts them unchanged.

    Args:
        name: The name.
        what: Kind of thing that it names, such as `dataset`; for the error message.
    """
    if not _NAME.fullmatch(name):
        article = "an" if what[0] in "aeiou" else "a"
        raise UriError(
            f"Expected {article} {what} name of lower-case letters, digits and . _ - (at most 63 characters, the first "
            f"a letter or digit); found {name!r}. Try {clean_name(name, fallback=what)!r}."
        )
    return name


def check_alias(alias: str) -> str:
    """Return `alias` if it is a valid alias: a name that is neither a number nor `latest`. Raises `UriError`."""
    check_name(alias, "alias")
    if alias == "latest" or alias.isdecimal():
        raise UriError(f"Expected an alias that is neither a number nor 'latest'; found {alias!r}.")
    return alias


def clean_name(text: str, *, fallback: str = "image") -> str:
    """Turn any text into a valid name: lower case, other characters replaced by `-`.

    >>> clean_name("Plate 3/Well A01.PNG")
    'plate-3-well-a01.png'
    """
    cleaned = _UNWANTED.sub("-", text.lower()).strip("-._")[:63].rstrip("-._")
    return cleaned or fallback


def unique_names(texts: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Turn texts into valid names that differ from each other and from those that are taken, by a number at their end.

    >>> unique_names(["A 1", "a-1", "b"], taken={"b"})
    ['a-1', 'a-1-2', 'b-2']
    """
    used = set(taken)
    names = []
    for text in texts:
        cleaned = name = clean_name(text)
        number = 2
        while name in used:
            name = f"{cleaned}-{number}"
            number += 1
        used.add(name)
        names.append(name)
    return names


def _with_at(text: str) -> str:
    name, _, ref = text.partition(":")
    return f"{clean_name(name, fallback='name')}@{clean_name(ref, fallback='latest')}"


def parse_reference(text: str, what: str) -> Reference:
    """Parse `NAME` or `NAME@REF`; without `@REF` the reference is `latest`.

    Raises:
        UriError: The name or the reference contains invalid characters.
    """
    name, at, ref = text.partition("@")
    if at and not ref:
        raise UriError(f"Expected NAME@REF with a version or alias after the @; found {text!r}.")
    if ":" in name and "/" not in name and not at:
        raise UriError(f"Expected NAME@REF, with an @ before the version; found {text!r}. Try {_with_at(text)!r}.")
    check_name(name, what)
    return Reference(name, check_name(ref, "version or alias")) if at else Reference(name)
