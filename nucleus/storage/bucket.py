"""How much of a file has been sent, by boto3's own transfer module: it knows the sending from the summing before."""

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

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

__all__ = ["Bucket", "StoredObject", "body_of", "check_conditional_writes", "watch_uploads"]


_EVENT = "request-created.s3"


def watch_uploads(client: "S3Client") -> None:
    """Let a client tell the bodies of its requests when they are signed, and read for it, and when they are sent."""
    from s3transfer.utils import signal_not_transferring, signal_transferring  # noqa: PLC0415

    client.meta.events.register_first(_EVENT, signal_not_transferring, unique_id="nucleus-upload-signed")
    client.meta.events.register_last(_EVENT, signal_transferring, unique_id="nucleus-upload-sent")


@contextmanager
def body_of(body: bytes | Path, advance: Advance) -> Iterator[Any]:
    """What a request sends: the bytes, or the open file, of which `advance` is told how much is sent."""
    if isinstance(body, bytes):
        yield body
        return
    if advance is no_progress:
        with body.open("rb") as file:
            yield file
        return
    from s3transfer.utils import ReadFileChunk  # noqa: PLC0415

    size = body.stat().st_size
    sent = 0
    advance(sent, size)

    def count(bytes_transferred: int) -> None:
        nonlocal sent
        sent += bytes_transferred
        advance(sent, size)

    with ReadFileChunk.from_filename(str(body), 0, size, callbacks=[count], enable_callbacks=False) as chunk:
        yield chunk


_CONNECTIONS = 32
_READINGS = 2
_LONGEST_CONNECT = 5.0


@dataclass(frozen=True)
class StoredObject:
    """What a listing tells of one object.

    Attributes:
        key: Its key below the bucket's prefix.
        size: Bytes.
        modified: When it was last written, with time zone.
        etag: Changes with the bytes.
    """

    key: str
    size: int
    modified: datetime
    etag: str


class Bucket:
    """The objects below one `s3://bucket[/prefix]`. Keys are relative to the prefix.

    The client is made at first use and stays out of the pickle: what travels to a worker are the arguments alone.

    Args:
        uri: Where.
        single_writer: Whether the user says that nobody else writes meanwhile; then a server may ignore conditions.
    """

    def __init__(self, uri: S3Uri, *, single_writer: bool = False) -> None:
        self.uri = uri
        self.single_writer = single_writer

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Bucket, single_writer=self.single_writer), (self.uri,)

    @cached_property
    def _session(self) -> "Session":
        import boto3.session  # noqa: PLC0415  half a second that `nucleus --help` need not spend

        return boto3.session.Session()

    @cached_property
    def _client(self) -> "S3Client":
        from botocore.config import Config  # noqa: PLC0415

        config = Config(
            max_pool_connections=_CONNECTIONS,
            connect_timeout=min(_LONGEST_CONNECT, seconds_of_silence()),
            read_timeout=seconds_of_silence(),
            retries={"mode": "standard", "total_max_attempts": 1},  # `ask_patiently` repeats, bodies included
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
        """The whole key, prefix included."""
        return (self.uri / key).key if key else self.uri.key

    def check(self, prefix: str = "") -> None:
        """Raise the error that explains it if what lies below a prefix of the bucket cannot be listed."""

        ask_briefly(lambda: self._page({"Prefix": self._below + prefix, "MaxKeys": 1}))

    def seconds_ahead(self, prefix: str = "") -> float | None:
        """How far this machine's clock is ahead of the server's, to a second; None if the server does not tell its own.

        It is `check` otherwise: the same question, and the same errors.
        """

        def ask() -> tuple[float, Any, float]:
            asked = time.time()
            page = self._page({"Prefix": self._below + prefix, "MaxKeys": 1})
            return asked, page, time.time()

        asked, page, answered = ask_briefly(ask)
        told = parsedate_tz(page["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
        return (asked + answered) / 2 - mktime_tz(told) if told else None

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises `ObjectNotFoundError`."""
        return self.get_tagged(key)[0]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """The object's bytes and the ETag that a compare-and-swap needs. Raises `ObjectNotFoundError`."""

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
        """Write an object in one request, so that readers see the old bytes or the new ones; return its ETag.

        A conditional write that has to be repeated may find its own object there, written by a request whose answer
        was lost. It is told from another writer's by its bytes, so those should differ between writers. For a single
        writer, whose server may ignore conditions, creating looks first.

        Args:
            key: Key below the prefix.
            body: The bytes, or a file that holds them (at most 5 GiB, S3's limit for one request).
            if_absent: Only create; never replace.
            if_match: Only replace the object that has this ETag.
            advance: Told how many bytes of a file are sent, of how many; it may begin anew.

        Raises:
            ObjectExistsError: The condition did not hold.
            UncertainWriteError: The answer to a compare-and-swap was lost, and now another writer's object is there.
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
                        f"Expected to know whether {self.uri / key} was written; the answer was lost, and then another "
                        "writer came. Look at what is there now, and do it again if need be."
                    ) from error
                if tag is None:
                    raise
                return tag

        return ask_patiently(ask)

    def _tag_of_ours(self, key: str, body: bytes | Path) -> str | None:
        """The ETag of the stored object if it has these bytes."""
        try:
            stored, tag = self._get_once(key)
        except ObjectNotFoundError as error:  # then the write is asked for again
            raise UnavailableError(f"Expected an object at {self.uri / key}; it was removed meanwhile.") from error
        return tag if stored == (body if isinstance(body, bytes) else body.read_bytes()) else None

    @cached_property
    def _bulk(self) -> BulkReader:
        with explained(self.uri):
            return BulkReader(self._session, self._client, self.uri.bucket, seconds_of_silence())

    def download(self, key: str, path: Path, *, sha256: str | None = None, advance: Advance = no_progress) -> str:
        """Copy an object to `path`, whole or not at all; return its SHA-256.

        `advance` is told how many bytes have come, of how many; it may begin anew.

        Raises:
            ObjectNotFoundError: Nothing has this key.
            IntegrityError: The bytes do not have the sum `sha256`; `path` is left as it was.
        """
        with atomic_path(path) as beside, beside.open("wb") as file:
            return self.read_into(key, file, sha256=sha256, advance=advance)

    def read_into(self, key: str, file: BinaryIO, *, sha256: str | None = None, advance: Advance = no_progress) -> str:
        """Write an object's bytes to an open file; return their SHA-256. Raises what `download` raises."""
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

        for _ in range(_READINGS):  # what was damaged on its way is whole the next time
            found = ask_patiently(ask)
            if sha256 in {None, found}:
                return found
        raise IntegrityError(
            f"Expected {self.uri / key} to have SHA-256 {sha256}; found {found}. "
            "The stored object was damaged or replaced: write it again from its source."
        )

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""

        def ask() -> None:
            with explained(self.uri / key):
                self._client.delete_object(Bucket=self.uri.bucket, Key=self.key(key))

        ask_patiently(ask)

    @property
    def _below(self) -> str:
        """What the keys of all objects in the bucket's prefix begin with."""
        return f"{self.uri.key}/" if self.uri.key else ""

    def objects(self, prefix: str) -> Iterator[StoredObject]:
        """Every object whose key starts with `prefix`, in the order of keys."""
        for page in self._pages(Prefix=self._below + prefix):
            for item in page.get("Contents", []):
                yield self._stored(item)

    def find(self, key: str) -> StoredObject | None:
        """The object that has this key, if there is one."""
        first = next(self.objects(key), None)  # in the order of keys, so the object itself comes before longer ones
        return first if first is not None and first.key == key else None

    def folders(self, prefix: str) -> list[str]:
        """The names directly below the folder `prefix`, in order."""
        return self.children(prefix)[1]

    def children(self, folder: str) -> tuple[list[StoredObject], list[str]]:
        """What lies directly below a folder, in order: its objects, and the names of the folders in it."""
        start = f"{self.key(folder)}/".lstrip("/")
        pages = list(self._pages(Prefix=start, Delimiter="/"))
        objects = [self._stored(item) for page in pages for item in page.get("Contents", [])]
        folders = [item["Prefix"][len(start) : -1] for page in pages for item in page.get("CommonPrefixes", [])]
        return objects, sorted(folders)

    def _stored(self, item: Any) -> StoredObject:
        return StoredObject(item["Key"].removeprefix(self._below), item["Size"], item["LastModified"], item["ETag"])

    def _pages(self, **arguments: Any) -> Iterator[Any]:
        """The pages of a listing."""
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
