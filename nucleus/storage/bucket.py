"""A bucket on an S3 server: reading, atomic and conditional writing, listing, and upload progress.

Writes are single requests, so that readers see an object before or after a write but never a part of it. Upload
progress comes from boto3's transfer module, which distinguishes sending a body from reading it for the signature.
A download that breaks off goes on where it was.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from email.utils import mktime_tz, parsedate_tz
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from nucleus.errors import (
    AccessDeniedError,
    ConditionalWritesError,
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    UnavailableError,
    UncertainWriteError,
)
from nucleus.progress import Advance, no_progress
from nucleus.storage.answers import Download, ListingCheck, check_received, span_of
from nucleus.storage.client import Connection, body_of
from nucleus.storage.files import atomic_path
from nucleus.storage.retries import ask_briefly, ask_patiently
from nucleus.storage.s3_errors import CHECKSUM_FIX, credentials_refused, explained, refusal_of
from nucleus.storage.uri import S3Uri

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["TEST_FILE", "Bucket", "StoredObject", "check_conditional_writes", "knows_checksums"]

_DOWNLOAD_ATTEMPTS = 2
_NO_REST = {412, 416}
"""Statuses of answers to a request for the rest of an object that was replaced: the ETag or the range is wrong."""
_NOT_IMPLEMENTED = 501

TEST_FILE = ".conditional-writes"
"""Name of the object by which conditional writes are checked."""
_TEST_KEY = f"models/{TEST_FILE}"
_TEST_TEXT = "Written by nucleus to find out whether the server honours If-None-Match and If-Match."
_NO_TAG = '"00000000000000000000000000000000"'

_honoured: set[str] = set()

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class StoredObject:
    """An object in a listing.

    Attributes:
        key: Key below the bucket's prefix.
        size: Size in bytes.
        modified: Time of the last write, with time zone.
        etag: ETag, which changes with the bytes.
    """

    key: str
    size: int
    modified: datetime
    etag: str


class Bucket:
    """Objects below `s3://bucket[/prefix]`. Keys are relative to the prefix.

    The client is created at first use and is not pickled: only the arguments travel to workers.

    Args:
        uri: Address of the bucket or prefix.
        single_writer: Whether the user guarantees that nobody else writes at the same time; then conditions are
            checked here, and the server may lack them.
        newer_checksums: Whether uploads may have checksums that older servers do not know; the SDK's settings decide.
        anonymous: Whether requests are not signed, which a public bucket takes from whoever has no credentials.
    """

    def __init__(
        self, uri: S3Uri, *, single_writer: bool = False, newer_checksums: bool = True, anonymous: bool = False
    ) -> None:
        self.uri, self.single_writer = uri, single_writer
        self._settings: dict[str, Any] = {"newer_checksums": newer_checksums, "anonymous": anonymous}

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Bucket, single_writer=self.single_writer, **self._settings), (self.uri,)

    @cached_property
    def connection(self) -> Connection:
        """The connection to the server. Raises `StorageError` if the configuration or the credentials are wrong."""
        return Connection(self.uri, **self._settings)

    @property
    def _client(self) -> "S3Client":
        return self.connection.client

    @property
    def endpoint(self) -> str:
        """URL of the server. Raises the errors of `connection`."""
        return self.connection.endpoint

    def _request(self, uri: S3Uri, request: "Callable[[S3Client], Answer]") -> Answer:
        """Send a request; once more if the credentials were refused, and have been renewed since they were read."""
        client, endpoint = self._client, self.endpoint
        try:
            with explained(uri, endpoint):
                return request(client)
        except AccessDeniedError as error:
            if not (credentials_refused(error) and self.connection.renew(client)):
                raise
        with explained(uri, endpoint):
            return request(self._client)

    def key(self, key: str) -> str:
        """Return the full key, including the prefix."""
        return (self.uri / key).key if key else self.uri.key

    def check(self, prefix: str = "") -> None:
        """Raise a `StorageError` with the reason if the objects below a prefix cannot be listed."""
        ask_briefly(lambda: self._page({"Prefix": self._below + prefix, "MaxKeys": 1}))

    def seconds_ahead(self, prefix: str = "") -> float | None:
        """Return how many seconds this machine's clock is ahead of the server's; None if the server sends no date.

        Makes the same request as `check`, and raises the same errors.
        """

        def ask() -> tuple[float, Any, float]:
            asked = time.time()
            page = self._page({"Prefix": self._below + prefix, "MaxKeys": 1})
            return asked, page, time.time()

        asked, page, answered = ask_briefly(ask)
        date = parsedate_tz(page["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
        return (asked + answered) / 2 - mktime_tz(date) if date else None

    def get(self, key: str, span: str | None = None) -> bytes:
        """Return an object, or the bytes of a span such as `bytes=0-99`. Raises `ObjectNotFoundError`."""
        return ask_patiently(lambda: self._get_once(key, span))[0]

    def get_tagged(self, key: str, span: str | None = None) -> tuple[bytes, str]:
        """Return what `get` does, and the object's ETag, which changes with it. Raises `ObjectNotFoundError`."""
        return ask_patiently(lambda: self._get_once(key, span))

    def _get_once(self, key: str, span: str | None = None) -> tuple[bytes, str]:
        def get(client: "S3Client") -> tuple[bytes, str]:
            part: dict[str, Any] = {} if span is None else {"Range": span}
            answer = client.get_object(Bucket=self.uri.bucket, Key=self.key(key), **part)
            with closing(answer["Body"]) as body:
                size, data = self._size(key, answer) if span is None else span_of(answer), body.read()
            check_received(len(data), size)
            return data, answer["ETag"]

        return self._request(self.uri / key, get)

    def _size(self, key: str, answer: Mapping[str, Any]) -> int:
        """Return the size of the object of which an answer has all or the rest; it is listed if the answer has none."""
        whole = str(answer.get("ContentRange") or "").rpartition("/")[2]
        if whole.isdecimal():
            return int(whole)
        stated: int | None = answer.get("ContentLength")
        if stated is not None:
            return stated
        found = self.find(key)
        if found is None:
            raise UnavailableError(f"Expected an object at {self.uri / key}; it was removed just now.")
        return found.size

    def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        if_match: str | None = None,
        advance: Advance = no_progress,
    ) -> str:
        """Write an object in one request, so that readers see either the old or the new bytes; return its ETag.

        A retry of a conditional write may find the object that an earlier attempt wrote, whose answer was lost. It
        recognises the object by its bytes, which should therefore differ between writers. With `single_writer`, where
        the server may ignore conditions, `if_absent` looks for an object before writing.

        Args:
            key: Key below the prefix.
            body: The bytes, or a file with them (at most 5 GiB, S3's limit for one request).
            if_absent: Only create the object; never replace one.
            if_match: Only replace the object with this ETag.
            advance: Called with the bytes of a file that were sent, and its size; starts again from 0 at each retry.

        Raises:
            ObjectExistsError: The condition did not hold.
            UncertainWriteError: The answer to a compare-and-swap was lost, and another writer's object is there now.
        """
        condition: dict[str, Any] = {}
        if self.single_writer:
            self._check_alone(key, if_absent=if_absent, if_match=if_match)
        elif if_absent:
            condition["IfNoneMatch"] = "*"
        elif if_match is not None:
            condition["IfMatch"] = if_match
        asked = 0

        def send(client: "S3Client") -> str:
            with body_of(body, advance) as file:
                return client.put_object(Bucket=self.uri.bucket, Key=self.key(key), Body=file, **condition)["ETag"]

        def ask() -> str:
            nonlocal asked
            asked += 1
            try:
                return self._request(self.uri / key, send)
            except ObjectExistsError as error:
                if asked == 1:
                    raise
                return self._after_lost_answer(key, body, if_match, error)
            except StorageError as error:
                if condition and _is_unknown(error):
                    raise _without_conditions(self, f"does not know {next(iter(condition))}") from error
                raise

        return ask_patiently(ask)

    def _check_alone(self, key: str, *, if_absent: bool, if_match: str | None) -> None:
        """Check the condition of a write here, for a server that does not. Raises `ObjectExistsError`."""
        if not if_absent and if_match is None:
            return
        found = self.find(key)
        tag = found.etag.strip('"') if found is not None else None
        if (if_absent and tag is not None) or (if_match is not None and tag != if_match.strip('"')):
            raise ObjectExistsError(
                f"Expected {'nothing' if if_absent else 'the object read before'} at {self.uri / key}; found another."
            )

    def _after_lost_answer(self, key: str, body: bytes | Path, if_match: str | None, error: ObjectExistsError) -> str:
        """Return the ETag of an object that an earlier attempt wrote. Raises the error if it is another's."""
        tag = self._tag_of_ours(key, body)
        if tag is None and if_match is not None:
            raise UncertainWriteError(
                f"Expected an answer to the write of {self.uri / key}; it was lost, and another writer "
                "followed. Check what is stored there now, and repeat the command if necessary."
            ) from error
        if tag is None:
            raise error
        return tag

    def _tag_of_ours(self, key: str, body: bytes | Path) -> str | None:
        """Return the ETag of the stored object if it has these bytes, else None."""
        try:
            stored, tag = self._get_once(key)
        except ObjectNotFoundError as error:  # makes the caller retry the write
            raise UnavailableError(f"Expected an object at {self.uri / key}; it was removed just now.") from error
        return tag if stored == (body if isinstance(body, bytes) else body.read_bytes()) else None

    def download(self, key: str, path: Path, *, sha256: str | None = None, advance: Advance = no_progress) -> str:
        """Download an object to `path`, completely or not at all; return its SHA-256.

        `advance` is called with the bytes received and the size.

        Raises:
            ObjectNotFoundError: No object has this key.
            IntegrityError: The bytes have another SHA-256 than `sha256`; `path` is unchanged.
        """
        with atomic_path(path) as beside, beside.open("wb") as file:
            return self.read_into(key, file, sha256=sha256, advance=advance)

    def read_into(self, key: str, file: BinaryIO, *, sha256: str | None = None, advance: Advance = no_progress) -> str:
        """Write the bytes of an object to an open file; return their SHA-256. Raises the errors of `download`."""
        start = file.tell()
        for _ in range(_DOWNLOAD_ATTEMPTS):  # damage in transit does not happen twice
            found = self._receive(key, Download(file, start, advance))
            if sha256 in {None, found}:
                return found
        raise IntegrityError(
            f"Expected {self.uri / key} to have SHA-256 {sha256}; found {found}. "
            "The stored object was damaged or replaced: restore it from its source."
        )

    def _receive(self, key: str, download: Download) -> str:
        """Request an object, and its rest each time that it breaks off; return its SHA-256."""

        def get(client: "S3Client") -> None:
            answer = client.get_object(Bucket=self.uri.bucket, Key=self.key(key), **download.rest())
            download.receive(answer, self._size(key, answer))

        def ask() -> str:
            try:
                self._request(self.uri / key, get)
            except StorageError as error:
                refusal = refusal_of(error)
                if refusal is None or refusal.status not in _NO_REST:
                    raise
                download.restart()
                raise UnavailableError(f"Expected the rest of {self.uri / key}; it was replaced just now.") from error
            return download.finish()

        return ask_patiently(ask)

    def delete(self, key: str) -> None:
        """Delete an object; do nothing if there is none."""

        def delete(client: "S3Client") -> None:
            client.delete_object(Bucket=self.uri.bucket, Key=self.key(key))

        ask_patiently(lambda: self._request(self.uri / key, delete))

    @property
    def _below(self) -> str:
        """The prefix with a slash at its end, or an empty string."""
        return f"{self.uri.key}/" if self.uri.key else ""

    def objects(self, prefix: str, after: str = "") -> Iterator[StoredObject]:
        """Yield every object whose key starts with `prefix`, ordered by key; if `after` is given, those after it."""
        for page in self._pages(self._below + prefix, **({"StartAfter": self._below + after} if after else {})):
            for item in page.get("Contents", []):
                yield self._stored(item)

    def find(self, key: str) -> StoredObject | None:
        """Return the object with this key, or None."""
        first = next(self.objects(key), None)  # ordered by key, so the object itself precedes longer keys
        return first if first is not None and first.key == key else None

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly below `prefix`, sorted."""
        return self.children(prefix)[1]

    def children(self, folder: str) -> tuple[list[StoredObject], list[str]]:
        """Return the objects directly below a folder, and the names of the folders in it, both sorted."""
        start = f"{self.key(folder)}/".lstrip("/")
        pages = list(self._pages(start, Delimiter="/"))
        objects = [self._stored(item) for page in pages for item in page.get("Contents", [])]
        folders = [item["Prefix"][len(start) : -1] for page in pages for item in page.get("CommonPrefixes", [])]
        return objects, sorted(folders)

    def _stored(self, item: Any) -> StoredObject:
        return StoredObject(item["Key"].removeprefix(self._below), item["Size"], item["LastModified"], item["ETag"])

    def _pages(self, prefix: str, **arguments: Any) -> Iterator[Any]:
        """Yield the pages of a listing. Raises `StorageError` for pages that are not those of S3."""
        check = ListingCheck(f"{self.uri} at {self.endpoint}", prefix)
        asked = {"Prefix": prefix, **arguments}
        while True:
            page = ask_patiently(partial(self._page, dict(asked)))
            token = check.following(page)
            yield page
            if token is None:
                return
            asked["ContinuationToken"] = token

    def _page(self, arguments: dict[str, Any]) -> Any:
        return self._request(self.uri, lambda client: client.list_objects_v2(Bucket=self.uri.bucket, **arguments))


def check_conditional_writes(bucket: Bucket, key: str = _TEST_KEY) -> None:
    """Check that the server stores what is written, and honours the conditions of writes.

    The check creates one small object, once; it runs once per process and bucket. With `single_writer`, conditions are
    not checked.

    Args:
        bucket: The bucket.
        key: Key of the object.

    Raises:
        ConditionalWritesError: The server ignores or refuses conditions.
        StorageError: The server does not store the bytes that it is sent.
    """
    where = f"{bucket.uri} {bucket.endpoint} {bucket.single_writer}"
    if where in _honoured:
        return
    _check_stored(bucket, key)
    conditions: dict[str, dict[str, Any]] = {"If-None-Match": {"if_absent": True}, "If-Match": {"if_match": _NO_TAG}}
    for header, condition in {} if bucket.single_writer else conditions.items():
        if _writes(bucket, key, **condition):
            raise _without_conditions(bucket, f"ignores {header}")
    _honoured.add(where)


def knows_checksums(bucket: Bucket) -> bool:
    """Return whether the server takes uploads with the SDK's newer checksums; False if it takes them only without.

    Raises:
        StorageError: The server takes no uploads at all.
    """
    body = _test_bytes()
    try:
        bucket.put(_TEST_KEY, body)
        return bucket.get(_TEST_KEY) == body
    except StorageError as error:
        try:
            Bucket(bucket.uri, newer_checksums=False).put(_TEST_KEY, body)
        except StorageError:
            raise error from None
        return False


def _check_stored(bucket: Bucket, key: str) -> None:
    """Write the test object if there is none, and read it."""
    body = _test_bytes()
    try:
        bucket.put(key, body, if_absent=True)
    except ObjectExistsError:
        return
    if bucket.get(key) != body:
        raise StorageError(
            f"Expected the server behind {bucket.uri} to store what it is sent; found other bytes at "
            f"{bucket.uri / key}. If it does not know the SDK's newer checksums, run: {CHECKSUM_FIX}."
        )


def _test_bytes() -> bytes:
    return f"{_TEST_TEXT} {secrets.token_hex(8)}\n".encode()


def _writes(bucket: Bucket, key: str, *, if_absent: bool = False, if_match: str | None = None) -> bool:
    """Return whether the server accepts a conditional write of new bytes.

    Raises `ConditionalWritesError` if it refuses the write only because of its condition.
    """
    try:
        bucket.put(key, _test_bytes(), if_absent=if_absent, if_match=if_match)
    except ObjectExistsError:
        return False
    return True


def _without_conditions(bucket: Bucket, what: str) -> ConditionalWritesError:
    return ConditionalWritesError(
        f"Expected a server that honours conditional writes, as AWS and MinIO do; the one behind {bucket.uri} {what}, "
        "so two writers at the same time would overwrite each other. If nobody else writes to this bucket, add "
        "--single-writer."
    )


def _is_unknown(error: StorageError) -> bool:
    """Return whether a server refused a request because it does not know a header."""
    refusal = refusal_of(error)
    return refusal is not None and (refusal.status == _NOT_IMPLEMENTED or refusal.code == "NotImplemented")
