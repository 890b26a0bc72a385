"""One interface to the objects of a bucket, on AWS, MinIO or any server that speaks S3.

Endpoint, region and credentials come from the AWS SDK's own variables and files. Writes can be made create-only
(`If-None-Match: *`) or compare-and-swap (`If-Match`), which is what makes a registry in a bucket safe.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nucleus.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    UnreachableError,
)
from nucleus.storage.bulk import UNREACHABLE, BulkReader, obstore_error
from nucleus.storage.files import atomic_path
from nucleus.storage.uri import S3Uri

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

__all__ = ["Bucket", "StoredObject"]

_CONNECTIONS = 32
_DENIED = {
    "AccessDenied",
    "403",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
}
_CONFLICT = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}


@dataclass(frozen=True)
class StoredObject:
    """What a listing tells of one object.

    Attributes:
        key: Its key below the bucket's prefix.
        size: Bytes.
        modified: When it was last written, with time zone.
    """

    key: str
    size: int
    modified: datetime


class Bucket:
    """The objects below one `s3://bucket[/prefix]`. Keys are relative to the prefix.

    The client is made at first use and stays out of the pickle: what travels to a worker is the URI alone.
    """

    def __init__(self, uri: S3Uri) -> None:
        self.uri = uri

    def __reduce__(self) -> tuple[type["Bucket"], tuple[S3Uri]]:
        return Bucket, (self.uri,)

    @cached_property
    def _session(self) -> "Session":
        import boto3.session  # noqa: PLC0415  half a second that `nucleus --help` need not spend

        return boto3.session.Session()

    @cached_property
    def _client(self) -> "S3Client":
        from botocore.config import Config  # noqa: PLC0415

        config = Config(
            max_pool_connections=_CONNECTIONS,
            connect_timeout=5,
            read_timeout=60,
            retries={"mode": "standard", "total_max_attempts": 5},
        )
        try:
            with _explained(self.uri):
                return self._session.client("s3", config=config)
        except ValueError as error:
            raise UnreachableError(
                f"Expected a URL such as http://127.0.0.1:9000 in AWS_ENDPOINT_URL_S3; found {_endpoint()!r}."
            ) from error

    def key(self, key: str) -> str:
        """The whole key, prefix included."""
        return (self.uri / key).key if key else self.uri.key

    def check(self) -> None:
        """Raise the error that explains it if the bucket cannot be reached or read."""
        with _explained(self.uri):
            self._client.list_objects_v2(Bucket=self.uri.bucket, Prefix=self.uri.key, MaxKeys=1)

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises `ObjectNotFoundError`."""
        return self.get_tagged(key)[0]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """The object's bytes and the ETag that a compare-and-swap needs. Raises `ObjectNotFoundError`."""
        with _explained(self.uri / key):
            answer = self._client.get_object(Bucket=self.uri.bucket, Key=self.key(key))
            return answer["Body"].read(), answer["ETag"]

    def put(self, key: str, body: bytes | Path, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write an object in one request, so that readers see the old bytes or the new ones; return its ETag.

        Args:
            key: Key below the prefix.
            body: The bytes, or a file that holds them (at most 5 GiB, S3's limit for one request).
            if_absent: Only create; never replace.
            if_match: Only replace the object that has this ETag.

        Raises:
            ObjectExistsError: The condition did not hold.
        """
        condition: dict[str, Any] = {}
        if if_absent:
            condition["IfNoneMatch"] = "*"
        if if_match is not None:
            condition["IfMatch"] = if_match
        with _explained(self.uri / key):
            if isinstance(body, bytes):
                return self._put(key, body, condition)
            with body.open("rb") as file:
                return self._put(key, file, condition)

    def _put(self, key: str, body: Any, condition: dict[str, Any]) -> str:
        return self._client.put_object(Bucket=self.uri.bucket, Key=self.key(key), Body=body, **condition)["ETag"]

    @cached_property
    def _bulk(self) -> BulkReader:
        with _explained(self.uri):
            return BulkReader(self._session, self._client, self.uri.bucket)

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> str:
        """Copy an object to `path`, whole or not at all; return its SHA-256.

        Raises:
            ObjectNotFoundError: Nothing has this key.
            IntegrityError: The bytes do not have the sum `sha256`; `path` is left as it was.
        """
        with atomic_path(path) as beside, beside.open("wb") as file:
            return self.read_into(key, file, sha256=sha256)

    def read_into(self, key: str, file: BinaryIO, *, sha256: str | None = None) -> str:
        """Write an object's bytes to an open file; return their SHA-256. Raises what `download` raises."""
        digest = hashlib.sha256()
        with _explained(self.uri / key):
            for chunk in self._bulk.chunks(self.key(key)):
                file.write(chunk)
                digest.update(chunk)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise IntegrityError(
                f"Expected {self.uri / key} to have SHA-256 {sha256}; found {digest.hexdigest()}. "
                "The stored object was damaged or replaced: write it again from its source."
            )
        return digest.hexdigest()

    def objects(self, prefix: str) -> Iterator[StoredObject]:
        """Every object whose key starts with `prefix`, in the order of keys."""
        base = f"{self.uri.key}/" if self.uri.key else ""
        with _explained(self.uri):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.uri.bucket, Prefix=base + prefix)
            for page in pages:
                for item in page.get("Contents", []):
                    yield StoredObject(item["Key"].removeprefix(base), item["Size"], item["LastModified"])

    def folders(self, prefix: str) -> list[str]:
        """The names directly below the folder `prefix`, in order."""
        start = f"{self.key(prefix)}/".lstrip("/")
        with _explained(self.uri):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.uri.bucket, Prefix=start, Delimiter="/"
            )
            found = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", [])]
        return sorted(name[len(start) : -1] for name in found)


@contextmanager
def _explained(uri: S3Uri) -> Iterator[None]:
    """Turn botocore's exceptions into ours, with the fix in the message and no credential in it."""
    import botocore.exceptions as boto  # noqa: PLC0415

    try:
        yield
    except boto.ClientError as error:
        raise _from_response(error, uri) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as error:
        raise AccessDeniedError(
            f"Expected credentials for {uri}; found none ({error}). Run: export AWS_ACCESS_KEY_ID=... "
            "AWS_SECRET_ACCESS_KEY=... (or aws configure)."
        ) from error
    except (boto.EndpointConnectionError, boto.HTTPClientError, boto.ConnectionClosedError) as error:
        raise _unreachable(uri, type(error).__name__) from error
    except boto.BotoCoreError as error:
        raise StorageError(f"{uri}: {error}") from error
    except Exception as error:
        code = obstore_error(error)
        if code is None:
            raise
        raise _from_code(code, "GetObject", uri, str(error).splitlines()[0]) from error


def _from_response(error: Any, uri: S3Uri) -> StorageError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    operation = error.operation_name
    if code == "404" and operation == "ListObjectsV2":
        code = "NoSuchBucket"
    return _from_code(code, operation, uri, str(error))


def _from_code(code: str, operation: str, uri: S3Uri, text: str) -> StorageError:
    if code == UNREACHABLE:
        return _unreachable(uri, text)
    if code == "NoSuchBucket":
        return BucketNotFoundError(
            f"Expected the bucket {uri.bucket!r} at {_endpoint()}; it does not exist. "
            f"Run: aws s3 mb s3://{uri.bucket} (or correct the name)."
        )
    if code in {"NoSuchKey", "404", "NotFound"}:
        return ObjectNotFoundError(f"Expected an object at {uri}; found none.")
    if code in _DENIED:
        return AccessDeniedError(
            f"Expected the right to {operation} at {uri}; {_endpoint()} refused ({code}). Check "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights that go with them."
        )
    if code in _CONFLICT:
        return ObjectExistsError(f"Expected to be the only writer of {uri}; another write was first ({code}).")
    return StorageError(f"{uri}: {_endpoint()} answered {code} to {operation}: {text}")


def _unreachable(uri: S3Uri, reason: str) -> UnreachableError:
    return UnreachableError(
        f"Expected an S3 server at {_endpoint()}; got no answer for {uri} ({reason}). "
        "Check AWS_ENDPOINT_URL_S3; for the server on this machine run: nucleus store status."
    )


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS S3"
