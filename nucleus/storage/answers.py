"""Answers of an S3 server: checks that they are such, pages of listings, and bodies that may break off.

Consoles, gateways and login pages answer requests too, often with status 200.
"""

import hashlib
import re
from collections.abc import Mapping
from contextlib import closing
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from nucleus.errors import StorageError, UnavailableError
from nucleus.progress import Advance

__all__ = ["REGION_HEADER", "Download", "ListingCheck", "check_answer", "check_received", "span_of"]

_CHUNK = 1 << 20

_DOCUMENTS = {"ListObjectsV2": "ListBucketResult"}
"""The root element of the answer to an operation."""
_TAGGED = {"GetObject", "PutObject"}
"""Operations whose answers have an ETag."""
_FIRST_TAG = re.compile(rb"<(?:[\w.-]+:)?([A-Za-z][\w.-]*)")
REGION_HEADER = "x-amz-bucket-region"
"""Header with the region of the bucket, of answers of AWS and others."""
_REGION_TAG = b"<Region>"
_SUCCESS, _REDIRECT, _REFUSED = 200, 300, 400
_AMENDED = 500
"""The status that botocore gives to an answer with status 200 that it cannot read."""
_SPAN = re.compile(r"bytes (\d+)-(\d+)/")
_ENTRY = ("Key", "Size", "LastModified", "ETag")
_EMPTY_PAGES = 1000
"""Pages without entries after which a listing has no end; AWS sends some where many objects were deleted."""
_PAGE, _NO_XML = "a web page", "no XML"
_OTHER = (
    "Check the endpoint's address and port: a web console, a proxy or a login page may answer there instead of the "
    "server's S3 interface."
)


def check_answer(endpoint: str, operation: str, answer: Mapping[str, Any]) -> None:
    """Raise an error unless an answer may be that of an S3 server.

    Args:
        endpoint: URL of the server, for messages.
        operation: Name of the operation, such as `ListObjectsV2`.
        answer: Status code, headers and body, as botocore has them before it parses the body.

    Raises:
        StorageError: A redirect to another address, or an answer without ETag.
        UnavailableError: Another document, such as a web page; it may be that of a gateway whose server restarts.
    """
    status = answer["status_code"]
    if _REDIRECT <= status < _REFUSED:
        _check_redirect(endpoint, operation, answer)
    elif _SUCCESS <= status < _REDIRECT or (status == _AMENDED and _found(answer["body"]) == _NO_XML):
        _check_document(endpoint, operation, answer)


def _check_redirect(endpoint: str, operation: str, answer: Mapping[str, Any]) -> None:
    """Raise `StorageError` unless a redirect names the bucket's region, to which botocore then turns.

    For a redirect without region botocore asks for the bucket's (`HeadBucket`), and if that is redirected too, again,
    without end.
    """
    headers, body = answer["headers"], answer["body"] if isinstance(answer["body"], bytes) else b""
    may_be_asked = operation != "HeadBucket" and _root(body) == "Error"
    if headers.get(REGION_HEADER) or _REGION_TAG in body or may_be_asked:
        return
    target = urlsplit(headers.get("location") or "")
    origin = f"{target.scheme}://{target.netloc.rpartition('@')[2]}" if target.netloc else "another address"
    if origin == endpoint.rstrip("/") or not target.netloc:
        raise StorageError(
            f"Expected an S3 server at {endpoint}; it redirects {operation} to {target.path or 'nowhere'}. {_OTHER}"
        )
    raise StorageError(
        f"Expected an S3 server at {endpoint}; it redirects to {origin}. If that is the S3 server, run: export "
        f"AWS_ENDPOINT_URL_S3={origin} (else a proxy or a login page is in between)."
    )


def _check_document(endpoint: str, operation: str, answer: Mapping[str, Any]) -> None:
    headers = answer["headers"]
    page = "text/html" in headers.get("content-type", "") or _found(answer["body"]) == _PAGE
    root = _DOCUMENTS.get(operation)
    if root is not None and _root(answer["body"]) != root:
        raise UnavailableError(
            f"Expected a listing (<{root}>) from the S3 server at {endpoint}; found {_found(answer['body'])}. {_OTHER}"
        )
    if page and operation != "GetObject":  # an object may be a page
        raise UnavailableError(f"Expected S3's answer to {operation} from {endpoint}; found {_PAGE}. {_OTHER}")
    if operation in _TAGGED and not headers.get("etag"):
        raise StorageError(f"Expected an ETag in the answer of {endpoint} to {operation}; it has none. {_OTHER}")


def _root(body: object) -> str | None:
    """Return the name of a document's first element, without namespace; None if it has none, or was not read yet."""
    found = _FIRST_TAG.search(body) if isinstance(body, bytes) else None
    return found[1].decode() if found else None


def _found(body: object) -> str:
    root = _root(body)
    if isinstance(body, bytes) and not body.strip():
        return "an empty answer"
    return _NO_XML if root is None else _PAGE if root.lower() == "html" else f"a document <{root}>"


class ListingCheck:
    """Checks the pages of one listing: whole entries below the prefix, and progress from page to page.

    Args:
        where: What is listed, and on which server, for messages.
        prefix: Prefix that all keys have.
    """

    def __init__(self, where: str, prefix: str) -> None:
        self._where = where
        self._prefix = prefix
        self._seen: set[object] = set()
        self._empty = 0

    def following(self, page: Mapping[str, Any]) -> str | None:
        """Check a page, and return the token with which the next one is requested; None after the last one.

        Raises:
            StorageError: An entry without key, size, time or ETag, or outside the prefix; a page that says that more
                follow, but not how; or a page or token that was there before.
        """
        names = [self._name(entry) for entry in page.get("Contents", [])]
        names += [str(entry.get("Prefix")) for entry in page.get("CommonPrefixes", [])]
        for name in names:
            self._require(name.startswith(self._prefix), f"entries below {self._prefix!r}", f"{name!r}")
        if not page.get("IsTruncated"):
            return None
        token = page.get("NextContinuationToken")
        self._require(bool(token), "a token for the next page", "none, though the listing is said to go on")
        self._progress(str(token), (names[0], names[-1]) if names else None)
        return str(token)

    def _name(self, entry: Mapping[str, Any]) -> str:
        missing = [field for field in _ENTRY if entry.get(field) is None]
        self._require(not missing, "entries with key, size, time and ETag", f"one without {' and '.join(missing)}")
        return str(entry["Key"])

    def _progress(self, token: str, ends: tuple[str, str] | None) -> None:
        """Check that neither a page's token nor its first and last entry were there before."""
        self._require(token not in self._seen, "another page", "the token of a page before, again")
        self._require(ends not in self._seen, "another page", "the entries of a page before, again")
        self._seen |= {token} if ends is None else {token, ends}
        self._empty = self._empty + 1 if ends is None else 0
        self._require(self._empty < _EMPTY_PAGES, "a page with entries", f"{_EMPTY_PAGES} without, one after another")

    def _require(self, holds: bool, expected: str, found: str) -> None:
        if not holds:
            raise StorageError(
                f"Expected {expected} in the listing of {self._where}; found {found}. The server does not list as S3 "
                "does, so its listings would be incomplete: update it, or use another one."
            )


class Download:
    """An object on its way into a file, which goes on where it broke off.

    Args:
        file: The file.
        start: Its position for the first byte.
        advance: Called with the bytes received, and the size.

    Attributes:
        received: Number of bytes in the file.
    """

    def __init__(self, file: BinaryIO, start: int, advance: Advance) -> None:
        self._file = file
        self._start = start
        self._advance = advance
        self.restart()

    def restart(self) -> None:
        """Forget what was received."""
        self._file.seek(self._start)
        self._digest = hashlib.sha256()
        self._tag = ""
        self.received = 0

    def rest(self) -> dict[str, Any]:
        """Return the arguments of the request for what is missing."""
        return {"Range": f"bytes={self.received}-", "IfMatch": self._tag} if self.received else {}

    def receive(self, answer: Mapping[str, Any], size: int) -> None:
        """Write the bytes of an answer. Raises `UnavailableError` if they are not all that was missing."""
        from botocore.exceptions import FlexibleChecksumError  # noqa: PLC0415  slow to import

        begins = str(answer.get("ContentRange") or "").startswith(f"bytes {self.received}-")
        if self.received and not (begins and answer["ETag"] == self._tag):  # a server that does not know ranges
            self.restart()
        self._tag = answer["ETag"]
        self._advance(self.received, size)
        try:
            with closing(answer["Body"]) as body:
                for chunk in body.iter_chunks(_CHUNK):
                    self._file.write(chunk)
                    self._digest.update(chunk)
                    self.received += len(chunk)
                    self._advance(self.received, size)
        except FlexibleChecksumError:  # damaged, and nobody knows where
            self.restart()
            raise
        check_received(self.received, size)

    def finish(self) -> str:
        """End the file after the last byte, and return the SHA-256."""
        self._file.truncate()
        return self._digest.hexdigest()


def span_of(answer: Mapping[str, Any]) -> int:
    """Return the number of bytes in the answer to a request for a span of an object.

    Raises `StorageError` if the server does not know such requests, and sent the whole.
    """
    found = _SPAN.match(str(answer.get("ContentRange") or ""))
    if found is None:
        raise StorageError(
            "Expected a part of an object, by the header Range; got the whole. Use a server that knows this header."
        )
    return int(found[2]) - int(found[1]) + 1


def check_received(received: int, size: int) -> None:
    """Raise `UnavailableError` if an object was not received as a whole."""
    if received != size:
        raise UnavailableError(f"Expected {size:,} bytes of an object; got {received:,}, and the answer ended.")
