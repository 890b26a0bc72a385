"""Many small objects, by requests that botocore signs and urllib3 sends: two fifths of boto3's time for each.

boto3 takes five milliseconds of a slow processor for a request, whatever its size, which is more than a small image
needs for all else. It still decides where the server is and with which credentials, and whatever is not answered as
expected is asked again by it, so that errors, retries and renewed credentials are the same as everywhere. Servers that
it reaches otherwise (through a proxy, by another signature, in another region) are left to it altogether.
"""

import base64
import hashlib
import zlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nucleus.errors import StorageError
from nucleus.storage.answers import check_answer
from nucleus.storage.bucket import Bucket
from nucleus.storage.client import Address
from nucleus.storage.retries import seconds_of_silence

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, HTTPConnectionPool

__all__ = ["SmallObjects", "is_whole"]

_OK, _NOT_FOUND, _TOO_MANY, _SERVERS_FAULT = 200, 404, 429, 500
_CONNECTIONS = 32
_MOST_FAILURES = 3
"""Requests in a row that are not answered as expected, after which all are left to boto3."""
_SUMS: dict[str, Callable[[bytes], bytes]] = {
    "x-amz-checksum-crc32": lambda data: zlib.crc32(data).to_bytes(4, "big"),
    "x-amz-checksum-sha1": lambda data: hashlib.sha1(data, usedforsecurity=False).digest(),
    "x-amz-checksum-sha256": lambda data: hashlib.sha256(data).digest(),
}
"""Sums of stored objects that boto3 compares too; they are in Base64."""


class SmallObjects:
    """Small objects of a bucket, for several threads.

    Args:
        bucket: The bucket.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._address: Address | None = None
        self._failures = 0
        self._asked = False

    def get(self, key: str) -> bytes:
        """Return an object. Raises `ObjectNotFoundError`, and what else `Bucket.get` does."""
        found = self._exchange("GET", key, b"")
        return self._bucket.get(key) if found is None else found

    def put(self, key: str, data: bytes) -> None:
        """Write an object, whatever is there. Raises the errors of `Bucket.put`."""
        if self._exchange("PUT", key, data) is None:
            self._bucket.put(key, data)

    def _exchange(self, method: str, key: str, data: bytes) -> bytes | None:
        """Return the body of the answer to a request; None if it is not what was expected, or cannot be sent here."""
        if not self._asked:
            self._address = self._bucket.connection.address()
            self._asked = True
        address = self._address
        if address is None or self._failures >= _MOST_FAILURES:
            return None
        try:
            answer = self._answer(address, method, address.path + quote(self._bucket.key(key), safe="/~"), data)
        except self._trouble:
            self._failures += 1
            return None
        status, headers, body = answer.status, answer.headers, answer.data
        if status == _OK and _is_answer(self._bucket.endpoint, method, headers, body):
            self._failures = 0
            return body
        if status not in {_NOT_FOUND, _TOO_MANY} and status < _SERVERS_FAULT:
            self._failures += 1
            self._asked = False  # boto3 may find other credentials
        return None

    @cached_property
    def _trouble(self) -> tuple[type[Exception], ...]:
        """What connections, certificates and the programs that give credentials may raise."""
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415  slow to import
        from urllib3.exceptions import HTTPError  # noqa: PLC0415

        return OSError, HTTPError, BotoCoreError

    @cached_property
    def _server(self) -> "HTTPConnectionPool":
        """Connections to the server, of which each thread takes a free one."""
        from urllib3 import PoolManager  # noqa: PLC0415  slow to import

        assert self._address is not None
        made = PoolManager(maxsize=_CONNECTIONS, timeout=seconds_of_silence(), ca_certs=self._address.certificates)
        return made.connection_from_url(self._address.server)

    def _answer(self, address: Address, method: str, path: str, data: bytes) -> "BaseHTTPResponse":
        """Return the answer to a request, all of which was read."""
        from botocore.auth import S3SigV4Auth  # noqa: PLC0415  slow to import
        from botocore.awsrequest import AWSRequest  # noqa: PLC0415

        headers = {"x-amz-checksum-mode": "ENABLED"} if method == "GET" else {}
        request = AWSRequest(method, address.server + path, headers, data)
        if address.credentials is not None:
            keys = address.credentials.get_frozen_credentials()
            S3SigV4Auth(keys, "s3", address.region).add_auth(request)
        body = data if method == "PUT" else None
        return self._server.urlopen(method, path, body, dict(request.headers), retries=False, redirect=False)


def _is_answer(endpoint: str, method: str, headers: Any, body: bytes) -> bool:
    """Return whether an answer with status 200 is one of an S3 server, and a whole object."""
    operation = {"GET": "GetObject", "PUT": "PutObject"}[method]
    told = body if method == "PUT" else None  # an object may be of any kind
    try:
        check_answer(endpoint, operation, {"status_code": _OK, "headers": headers, "body": told})
    except StorageError:
        return False
    return method == "PUT" or is_whole(body, headers)


def is_whole(body: bytes, headers: Any) -> bool:
    """Return whether a body has the stated length, and the sums stored with the object; sums of parts have a hyphen."""
    if headers.get("content-length") != str(len(body)):  # without it, an answer that breaks off is not told
        return False
    sums = ((headers.get(name), made) for name, made in _SUMS.items())
    return all("-" in (stored or "-") or base64.b64encode(made(body)).decode() == stored for stored, made in sums)
