"""Whether a server honours conditional writes, found out by trying: some servers ignore the condition and overwrite."""

import secrets
from typing import Any

from nucleus.errors import ConditionalWritesError, ObjectExistsError
from nucleus.storage.bucket import Bucket

__all__ = ["check_conditional_writes"]

_KEY = "models/.conditional-writes"
_TEXT = "Written by nucleus to find out whether the server honours If-None-Match and If-Match."
_NO_TAG = '"00000000000000000000000000000000"'

_honoured: set[str] = set()


def check_conditional_writes(bucket: Bucket) -> None:
    """Raise `ConditionalWritesError` if the server ignores conditions and others may write too.

    One object below `models/` is made for it, once; a server is asked once a process.
    """
    where = str(bucket.uri)
    if bucket.single_writer or where in _honoured:
        return
    _writes(bucket, if_absent=True)  # now it is there
    conditions: dict[str, dict[str, Any]] = {"If-None-Match": {"if_absent": True}, "If-Match": {"if_match": _NO_TAG}}
    for header, condition in conditions.items():
        if _writes(bucket, **condition):
            raise ConditionalWritesError(
                f"Expected a server that honours conditional writes, as AWS and MinIO do; the one behind {bucket.uri} "
                f"ignores {header}, so two publishers at once would overwrite each other. If nobody else publishes to "
                "this bucket meanwhile, say so with --single-writer."
            )
    _honoured.add(where)


def _writes(bucket: Bucket, *, if_absent: bool = False, if_match: str | None = None) -> bool:
    """Whether a conditional write of bytes that were never written before is done."""
    try:
        bucket.put(_KEY, f"{_TEXT} {secrets.token_hex(8)}\n".encode(), if_absent=if_absent, if_match=if_match)
    except ObjectExistsError:
        return False
    return True
