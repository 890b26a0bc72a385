"""Values with rules of their own: names, formats, kinds, engines, versions such as `dsb2018@7`, numbers of workers."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import PlainSerializer, PlainValidator

from nucleus.errors import UriError
from nucleus.text import plural

__all__ = [
    "DEFAULT_FORMATS",
    "EngineChoice",
    "ExportFormat",
    "FormatName",
    "Kind",
    "Reference",
    "WorkerCount",
    "WorkerRange",
    "check_alias",
    "check_name",
    "clean_name",
    "parse_reference",
    "unique_names",
]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_UNWANTED = re.compile(r"[^a-z0-9._-]+")
_MOST_WORKERS = 1024

FormatName = Literal[
    "labels", "zarr", "geojson", "geojson.gz", "roi", "coco", "overlay", "csv", "parquet", "h5ad"
]  # fmt: skip
"""Formats of the results of a prediction; the last three are those of its tables."""
DEFAULT_FORMATS: tuple[FormatName, ...] = ("labels", "overlay")
"""What is written of an image without a choice."""
EngineChoice = Literal["auto", "onnx", "tensorflow"]
"""What computes the network; see `nucleus.model.engines`."""
ExportFormat = Literal["h5", "keras", "savedmodel", "onnx", "bioimageio"]
"""Formats of an exported model; see `nucleus.model.export`."""


class Kind(StrEnum):
    """Kind of microscope image."""

    DARK_FIELD = "dark-field"
    """Bright nuclei on a dark background: fluorescence."""
    BRIGHT_FIELD = "bright-field"
    """Grey nuclei on a bright background."""
    STAIN = "stain"
    """Coloured nuclei on a bright background: H&E and other stains."""


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
            f"a letter or digit); found {name!r}. Try {clean_name(name, fallback=what.replace(' ', '-'))!r}."
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


class WorkerRange(NamedTuple):
    """The smallest and largest number of workers of a run; an elastic run has a range, any other a single number.

    Attributes:
        fewest: The run waits while the cluster has room for fewer workers than this.
        most: Upper limit, used when the cluster has room.
    """

    fewest: int
    most: int

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return self.fewest < self.most

    @property
    def counts(self) -> range:
        """Every number of workers that the run may have."""
        return range(self.fewest, self.most + 1)

    def __str__(self) -> str:
        if self.elastic:
            return f"{self.fewest} to {self.most} workers"
        return plural(self.most, "worker")


def _parse_workers(value: Any) -> WorkerRange:
    ends = [value, value] if isinstance(value, int) else value
    valid = (
        isinstance(ends, list | tuple)
        and len(ends) == 2
        and all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
        and 1 <= ends[0] <= ends[1] <= _MOST_WORKERS
    )
    if not valid:
        raise ValueError(f"expected a number from 1 to {_MOST_WORKERS}, or [fewest, most]")
    return WorkerRange(*ends)


def _serialize_workers(value: WorkerRange) -> int | list[int]:
    return list(value) if value.elastic else value.most


WorkerCount = Annotated[WorkerRange, PlainValidator(_parse_workers), PlainSerializer(_serialize_workers)]
"""A recipe's `workers`: a number, or `[fewest, most]`."""
