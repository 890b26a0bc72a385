"""JSON documents with a format number: checked when read, and refused when a newer version wrote them."""

import json
from typing import TypeVar

from pydantic import BaseModel

from nucleus import __version__
from nucleus.errors import NucleusError

__all__ = ["read_document"]

Document = TypeVar("Document", bound=BaseModel)


def read_document(
    kind: type[Document],
    data: bytes,
    *,
    what: str,
    where: str,
    newest: int,
    error: type[NucleusError],
    oldest: int = 1,
) -> Document:
    """Parse and check a document.

    Args:
        kind: What it must be; has a field `format`, and may have `needs`, the version of this package that reads it.
        data: The JSON.
        what: What the user calls it, such as `a dataset manifest`.
        where: Its file or URI.
        newest: The newest format that this version of the package reads.
        error: Raised if the document is damaged, newer or too old.
        oldest: The oldest format that it reads.
    """
    try:
        found = json.loads(data)
        stored = found.get("format") if isinstance(found, dict) else None
        if not isinstance(stored, int) or oldest <= stored <= newest:
            return kind.model_validate(found)
    except (ValueError, RecursionError) as problem:  # also what pydantic and the decoder of UTF-8 raise
        raise error(f"Expected {what} at {where}; it is damaged: {problem}") from problem
    if stored < oldest:
        raise error(
            f"Expected {what} of format {oldest} or newer at {where}; found format {stored}, which this version "
            f"({__version__}) no longer reads. Make it again, or install the version that wrote it."
        )
    needs = found.get("needs")
    raise error(
        f"Expected {what} of format {newest} or older at {where}; found format {stored}. "
        + (f"It needs nucleus {needs} or newer" if needs else "A newer version of this package wrote it")
        + f", and this is {__version__}: upgrade."
    )
