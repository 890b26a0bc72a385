"""A bucket on an S3 server: reading, atomic and conditional writing, listing, and upload progress.

Writes are single requests, so that readers see an object before or after a write but never a part of it. Upload
progress comes from boto3's transfer module, which distinguishes sending a body from reading it for the signature.
"""

import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import mktime_tz, parsedate_tz
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nucleus.errors import (
    ConditionalWritesError,
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    UnavailableError,
    UncertainWriteError,
    UnreachableError,
)
from nucleus.progress import Advance, no_progress
from nucleus.storage.bulk import BulkReader
from nucleus.storage.files import atomic_path
from nucleus.storage.retries import ask_briefly, ask_patiently, seconds_of_silence
from nucleus.storage.s3_errors import endpoint, explained
from nucleus.storage.uri import S3Uri
from nucleus.surroundings import exempt_this_machine

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

__all__ = ["Bucket", "StoredObject", "body_of", "check_conditional_writes", "watch_uploads"]

_CONNECTIONS = 32
_DOWNLOAD_ATTEMPTS = 2
_LONGEST_CONNECT = 5.0
_EVENT = "request-created.s3"

_TEST_KEY = "models/.conditional-writes"
_TEST_TEXT = "Written by nucleus to find out whether the server honours If-None-Match and If-Match."
_NO_TAG = '"00000000000000000000000000000000"'

_honoured: set[str] = set()


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
        single_writer: Whether the user guarantees that nobody else writes at the same time; then the server may
            ignore conditions.
    """

    def __init__(self, uri: S3Uri, *, single_writer: bool = False) -> None:
        self.uri = uri
        self.single_writer = single_writer

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Bucket, single_writer=self.single_writer), (self.uri,)

    @cached_property
    def _session(self) -> "Session":
        import boto3.session  # noqa: PLC0415  takes half a second, which `nucleus --help` need not spend

        return boto3.session.Session()

    @cached_property
    def _client(self) -> "S3Client":
        from botocore.config import Config  # noqa: PLC0415  as slow as boto3

        exempt_this_machine()
        config = Config(
            max_pool_connections=_CONNECTIONS,
            connect_timeout=min(_LONGEST_CONNECT, seconds_of_silence()),
            read_timeout=seconds_of_silence(),
            retries={"mode": "standard", "total_max_attempts": 1},  # `ask_patiently` retries, request bodies included
        )
        try:
            with explained(self.uri):
                client = self._session.client("s3", config=config)
        except ValueError as error:
            raise UnreachableError(
                f"Expected a URL such as http://127.0.0.1:9000 in AWS_ENDPOINT_URL_S3; found {endpoint()!r}."
            ) from error
        watch_uploads(client)
        return client

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

    def get(self, key: str) -> bytes:
        """Return the bytes of an object. Raises `ObjectNotFoundError`."""
        return self.get_tagged(key)[0]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the bytes of an object, and its ETag for a compare-and-swap. Raises `ObjectNotFoundError`."""
        return ask_patiently(lambda: self._get_once(key))

    def _get_once(self, key: str) -> tuple[bytes, str]:
        with explained(self.uri / key):
            answer = self._client.get_object(Bucket=self.uri.bucket, Key=self.key(key))
            return answer["Body"].read(), answer["ETag"]

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
        if if_absent and self.single_writer and self.find(key):
            raise ObjectExistsError(f"Expected nothing at {self.uri / key}; an object is there.")
        condition: dict[str, Any] = {}
        if if_absent:
            condition["IfNoneMatch"] = "*"
        if if_match is not None:
            condition["IfMatch"] = if_match
        asked = 0

        def ask() -> str:
            nonlocal asked
            asked += 1
            try:
                with explained(self.uri / key), body_of(body, advance) as file:
                    return self._client.put_object(Bucket=self.uri.bucket, Key=self.key(key), Body=file, **condition)[
                        "ETag"
                    ]
            except ObjectExistsError as error:
                if asked == 1:
                    raise
                tag = self._tag_of_ours(key, body)
                if tag is None and if_match is not None:
                    raise UncertainWriteError(
                        f"Expected an answer to the write of {self.uri / key}; it was lost, and another writer "
                        "followed. Check what is stored there now, and repeat the command if necessary."
                    ) from error
                if tag is None:
                    raise
                return tag

        return ask_patiently(ask)

    def _tag_of_ours(self, key: str, body: bytes | Path) -> str | None:
        """Return the ETag of the stored object if it has these bytes, else None."""
        try:
            stored, tag = self._get_once(key)
        except ObjectNotFoundError as error:  # makes the caller retry the write
            raise UnavailableError(f"Expected an object at {self.uri / key}; it was removed just now.") from error
        return tag if stored == (body if isinstance(body, bytes) else body.read_bytes()) else None

    @cached_property
    def _bulk(self) -> BulkReader:
        with explained(self.uri):
            return BulkReader(self._session, self._client, self.uri.bucket, seconds_of_silence())

    def download(self, key: str, path: Path, *, sha256: str | None = None, advance: Advance = no_progress) -> str:
        """Download an object to `path`, completely or not at all; return its SHA-256.

        `advance` is called with the bytes received and the size; it starts again from 0 at each retry.

        Raises:
            ObjectNotFoundError: No object has this key.
            IntegrityError: The bytes have another SHA-256 than `sha256`; `path` is unchanged.
        """
        with atomic_path(path) as beside, beside.open("wb") as file:
            return self.read_into(key, file, sha256=sha256, advance=advance)

    def read_into(self, key: str, file: BinaryIO, *, sha256: str | None = None, advance: Advance = no_progress) -> str:
        """Write the bytes of an object to an open file; return their SHA-256. Raises the errors of `download`."""
        start = file.tell()

        def ask() -> str:
            file.seek(start)
            digest = hashlib.sha256()
            with explained(self.uri / key):
                size, chunks = self._bulk.open(self.key(key))
                advance(0, size)
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
                    advance(file.tell() - start, size)
            file.truncate()
            return digest.hexdigest()

        for _ in range(_DOWNLOAD_ATTEMPTS):  # damage in transit does not happen twice
            found = ask_patiently(ask)
            if sha256 in {None, found}:
                return found
        raise IntegrityError(
            f"Expected {self.uri / key} to have SHA-256 {sha256}; found {found}. "
            "The stored object was damaged or replaced: restore it from its source."
        )

    def delete(self, key: str) -> None:
        """Delete an object; do nothing if there is none."""

        def ask() -> None:
            with explained(self.uri / key):
                self._client.delete_object(Bucket=self.uri.bucket, Key=self.key(key))

        ask_patiently(ask)

    @property
    def _below(self) -> str:
        """The prefix with a slash at its end, or an empty string."""
        return f"{self.uri.key}/" if self.uri.key else ""

    def objects(self, prefix: str) -> Iterator[StoredObject]:
        """Yield every object whose key starts with `prefix`, ordered by key."""
        for page in self._pages(Prefix=self._below + prefix):
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
        pages = list(self._pages(Prefix=start, Delimiter="/"))
        objects = [self._stored(item) for page in pages for item in page.get("Contents", [])]
        folders = [item["Prefix"][len(start) : -1] for page in pages for item in page.get("CommonPrefixes", [])]
        return objects, sorted(folders)

    def _stored(self, item: Any) -> StoredObject:
        return StoredObject(item["Key"].removeprefix(self._below), item["Size"], item["LastModified"], item["ETag"])

    def _pages(self, **arguments: Any) -> Iterator[Any]:
        """Yield the pages of a listing."""
        following: dict[str, Any] = {}
        while True:
            asked = {**arguments, **following}
            page = ask_patiently(lambda asked=asked: self._page(asked))  # type: ignore[misc]
            yield page
            if not page.get("IsTruncated"):
                return
            following = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, arguments: dict[str, Any]) -> Any:
        with explained(self.uri):
            return self._client.list_objects_v2(Bucket=self.uri.bucket, **arguments)


def check_conditional_writes(bucket: Bucket) -> None:
    """Raise `ConditionalWritesError` if the server ignores the conditions of writes, unless `single_writer` is set.

    The check creates one small object below `models/`, once; it runs once per process and bucket.
    """
    where = str(bucket.uri)
    if bucket.single_writer or where in _honoured:
        return
    _writes(bucket, if_absent=True)  # from now on the object exists
    conditions: dict[str, dict[str, Any]] = {"If-None-Match": {"if_absent": True}, "If-Match": {"if_match": _NO_TAG}}
    for header, condition in conditions.items():
        if _writes(bucket, **condition):
            raise ConditionalWritesError(
                f"Expected a server that honours conditional writes, as AWS and MinIO do; the one behind {bucket.uri} "
                f"ignores {header}, so two publishers at the same time would overwrite each other. If nobody else "
                "publishes to this bucket, add --single-writer."
            )
    _honoured.add(where)


def _writes(bucket: Bucket, *, if_absent: bool = False, if_match: str | None = None) -> bool:
    """Return whether the server accepts a conditional write of new bytes."""
    body = f"{_TEST_TEXT} {secrets.token_hex(8)}\n".encode()
    try:
        bucket.put(_TEST_KEY, body, if_absent=if_absent, if_match=if_match)
    except ObjectExistsError:
        return False
    return True


def watch_uploads(client: "S3Client") -> None:
    """Make a client count only the bytes of a body that are sent, not those read to compute the signature."""
    from s3transfer.utils import signal_not_transferring, signal_transferring  # noqa: PLC0415  as slow as boto3

    client.meta.events.register_first(_EVENT, signal_not_transferring, unique_id="nucleus-upload-signed")
    client.meta.events.register_last(_EVENT, signal_transferring, unique_id="nucleus-upload-sent")


@contextmanager
def body_of(body: bytes | Path, advance: Advance) -> Iterator[Any]:
    """Yield the body of a request: the bytes, or the open file; `advance` is called as the file is sent."""
    if isinstance(body, bytes):
        yield body
        return
    if advance is no_progress:
        with body.open("rb") as file:
            yield file
        return
    from s3transfer.utils import ReadFileChunk  # noqa: PLC0415  as slow as boto3

    size = body.stat().st_size
    sent = 0
    advance(sent, size)

    def count(bytes_transferred: int) -> None:
        nonlocal sent
        sent += bytes_transferred
        advance(sent, size)

    with ReadFileChunk.from_filename(str(body), 0, size, callbacks=[count], enable_callbacks=False) as chunk:
        yield chunk
