"""Many small objects, read and written by requests that are signed and sent here: a sixth of boto3's time for each.

boto3 takes five milliseconds of a slow processor for a request, whatever its size, which is more than a small image
needs for all else. It still decides where the server is and with which credentials, and whatever is not answered as
expected is asked again by it, so that errors, retries and renewed credentials are the same as everywhere. Servers that
it reaches otherwise (through a proxy, by another signature, in another region) are left to it altogether.

The signature is AWS's version 4: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html.
"""

import base64
import hashlib
import hmac
import http.client
import ssl
import threading
import time
import weakref
import zlib
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import quote

from nucleus.errors import StorageError
from nucleus.storage.answers import check_answer
from nucleus.storage.bucket import Bucket
from nucleus.storage.client import Address
from nucleus.storage.retries import seconds_of_silence

__all__ = ["SmallObjects", "is_whole", "signed_headers"]

_OK, _NOT_FOUND, _TOO_MANY, _SERVERS_FAULT = 200, 404, 429, 500
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
        self._lines = threading.local()
        self._all_lines: list[http.client.HTTPConnection] = []
        weakref.finalize(self, _close, self._all_lines)
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
        path = address.path + quote(self._bucket.key(key), safe="/~")
        try:
            status, headers, body = self._answer(address, method, path, data)
        except self._trouble:
            self._hang_up()
            self._failures += 1
            return None
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

        return OSError, http.client.HTTPException, BotoCoreError

    def _answer(self, address: Address, method: str, path: str, data: bytes) -> tuple[int, Any, bytes]:
        """Return status, headers and body of the answer to a request."""
        extra = {"x-amz-checksum-mode": "ENABLED"} if method == "GET" else {}
        headers = extra if address.anonymous else signed_headers(address, method, path, data, extra)
        line = self._line(address)
        line.request(method, path, data if method == "PUT" else None, headers)
        answer = line.getresponse()
        return answer.status, answer.headers, answer.read()

    def _hang_up(self) -> None:
        """End this thread's connection; it connects again."""
        line: http.client.HTTPConnection | None = getattr(self._lines, "line", None)
        if line is not None:
            line.close()

    def _line(self, address: Address) -> http.client.HTTPConnection:
        """Return this thread's connection."""
        line: http.client.HTTPConnection | None = getattr(self._lines, "line", None)
        if line is None:
            limit = seconds_of_silence()
            if address.certificates is None:
                line = http.client.HTTPConnection(address.host, timeout=limit)
            else:
                trusted = ssl.create_default_context(cafile=address.certificates)
                line = http.client.HTTPSConnection(address.host, timeout=limit, context=trusted)
            self._lines.line = line
            self._all_lines.append(line)
        return line


def _close(lines: list[http.client.HTTPConnection]) -> None:
    for line in lines:
        line.close()


def signed_headers(
    address: Address, method: str, path: str, data: bytes, extra: dict[str, str], now: float | None = None
) -> dict[str, str]:
    """Return the headers of a request with its signature.

    Args:
        address: Where the bucket is, and with which credentials.
        method: `GET` or `PUT`.
        path: Quoted path of the object.
        data: Body.
        extra: Further headers, all of which begin with `x-amz-`.
        now: Time in seconds; by default, that of this machine.
    """
    keys = address.keys()
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    headers = {**extra, "x-amz-content-sha256": hashlib.sha256(data).hexdigest(), "x-amz-date": moment}
    if keys.token:
        headers["x-amz-security-token"] = keys.token
    signed = sorted({"host": address.host, **headers}.items())
    names = ";".join(name for name, _ in signed)
    lines = "".join(f"{name}:{value}\n" for name, value in signed)
    request = f"{method}\n{path}\n\n{lines}\n{names}\n{headers['x-amz-content-sha256']}"
    scope = f"{moment[:8]}/{address.region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    signature = hmac.digest(_signing_key(keys.secret_key, scope), text.encode(), "sha256").hex()
    credential = f"Credential={keys.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {**headers, "Authorization": f"AWS4-HMAC-SHA256 {credential}"}


@lru_cache(maxsize=8)
def _signing_key(secret: str, scope: str) -> bytes:
    """Return the key of a day, region and service."""
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


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
