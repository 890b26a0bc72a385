"""Bulk reading of large or many objects with obstore, which is limited by the network rather than by Python.

obstore is written in Rust (MIT licence, by Development Seed, on Apache Arrow's `object_store`). Measured on one server
with 3,000 objects of 20 kB and 8 of 64 MiB, SHA-256 included: obstore 2.5 s and 1.4 s, boto3 in threads 5.4 s and
1.6 s; boto3's CRT transfer failed with closed sockets. Endpoint, region and credentials are taken from boto3, so they
are configured in one place.
"""

import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nucleus.storage.retries import storage_timeout

if TYPE_CHECKING:
    import boto3.session
    from mypy_boto3_s3 import S3Client

__all__ = ["UNREACHABLE", "BulkReader", "Refusal", "obstore_error"]

UNREACHABLE = "Unreachable"
"""Code for a request without an answer, or with an incomplete one."""
_BROKEN = ("error sending request", "error decoding response body", "request or response body error", "timed out")

_CHUNK = 1 << 20
_RETRIES = 4
"""Retries by obstore of a request, or of the rest of a body; after these, the whole object is requested again."""


class Refusal(NamedTuple):
    """A server's answer that refuses a request.

    Attributes:
        code: Error code of S3, or a substitute.
        status: HTTP status, or 0 if it is unknown.
    """

    code: str
    status: int


class BulkReader:
    """Reader that streams the objects of one bucket.

    Args:
        session: Session with the credentials.
        client: Client with the endpoint and region.
        bucket: Name of the bucket.
        silence: Seconds without data after which a request has failed.
    """

    def __init__(self, session: "boto3.session.Session", client: "S3Client", bucket: str, silence: float) -> None:
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415  only downloads need obstore
        from obstore.store import S3Store  # noqa: PLC0415

        options: dict[str, Any] = {
            "allow_http": client.meta.endpoint_url.startswith("http://"),
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=silence),
            "timeout": timedelta(hours=6),  # for a whole object; read_timeout ends a stalled one
        }
        bundle = os.environ.get("AWS_CA_BUNDLE")
        if bundle:
            options["root_certificate"] = Path(bundle).read_bytes()
        self._store = S3Store(
            bucket,
            endpoint=client.meta.endpoint_url,
            region=client.meta.region_name,
            credential_provider=Boto3CredentialProvider(session),
            client_options=options,  # type: ignore[arg-type]
            retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=storage_timeout())},
        )

    def open(self, key: str) -> tuple[int, Iterator[memoryview]]:
        """Return the size of an object and an iterator over its bytes. Both raise the errors of obstore."""
        found = self._store.get(key)
        return found.meta["size"], map(memoryview, found.stream(min_chunk_size=_CHUNK))


def obstore_error(error: Exception) -> Refusal | None:
    """Return the refusal that an exception of obstore describes; None for any other exception."""
    import obstore.exceptions as obs  # noqa: PLC0415  only downloads need obstore

    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    if isinstance(error, FileNotFoundError) and "Error performing" in text:
        return Refusal(code[1] if code else "NoSuchKey", 404)
    if isinstance(error, (obs.PermissionDeniedError, obs.UnauthenticatedError)):
        return Refusal(code[1] if code else "AccessDenied", 403)
    if not isinstance(error, obs.BaseError):
        return None
    if any(words in text for words in _BROKEN):
        return Refusal(UNREACHABLE, 0)
    status = re.search(r"status: (429|5\d\d)|Server returned error.*?(429|5\d\d)", text)
    number = (status[1] or status[2]) if status else "0"
    return Refusal(code[1] if code else number if status else "an error", int(number))
