"""Errors of requests to the bucket, translated to this project's exceptions: with the fix, without credentials."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nucleus.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ClockError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    UnavailableError,
    UnreachableError,
)
from nucleus.storage.bulk import UNREACHABLE, Refusal, obstore_error
from nucleus.storage.uri import S3Uri
from nucleus.surroundings import proxy_advice

__all__ = ["endpoint", "explained"]


_REFUSALS: tuple[tuple[set[str], type[StorageError], str], ...] = (
    (
        {"NoSuchBucket"},
        BucketNotFoundError,
        "Expected the bucket {uri.bucket!r} at {endpoint}; it does not exist. Run: aws s3 mb s3://{uri.bucket} (or "
        "correct the name).",
    ),
    ({"NoSuchKey", "404", "NotFound"}, ObjectNotFoundError, "Expected an object at {uri}; found none."),
    (
        {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"},
        AccessDeniedError,
        "Expected permission for {operation} at {uri}; {endpoint} refused ({code}). Check AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY and their permissions.",
    ),
    (
        {"RequestTimeTooSkewed"},
        ClockError,
        "Expected this machine's clock to be within 15 minutes of {endpoint}'s; {operation} was refused ({code}). Run: "
        "timedatectl set-ntp true (for a container, on its host).",
    ),
    (
        {"PreconditionFailed", "412"},
        ObjectExistsError,
        "Expected to be the only writer of {uri}; another write was first ({code}).",
    ),
)
"""Error codes of S3, with the exception and the message for each."""
_UNAVAILABLE = {
    "BandwidthLimitExceeded",
    "BadDigest",  # the body was damaged in transit
    "ConditionalRequestConflict",  # another write of the key is in progress: AWS wants the request repeated
    "IncompleteBody",
    "RequestLimitExceeded",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
}
"""Codes of temporary errors with other statuses than 429 and 5xx."""
_AWS = "https://amazonaws.com"
"""Stands for AWS, whose hosts all end so, where no other endpoint is set."""
_TOO_MANY, _SERVERS_FAULT, _NOT_IMPLEMENTED = 429, 500, 501


def endpoint() -> str:
    """Return the address of the S3 server from the environment."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS S3"


@contextmanager
def explained(uri: S3Uri) -> Iterator[None]:
    """Translate the errors that botocore and obstore raise in the block to `StorageError` and its subclasses."""
    import botocore.exceptions as boto  # noqa: PLC0415  slow to import
    from botocore.parsers import ResponseParserError  # noqa: PLC0415
    from urllib3.exceptions import ProtocolError  # noqa: PLC0415  raised through botocore when a body breaks off

    try:
        yield
    except boto.ClientError as error:
        raise _from_response(error, uri) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as error:
        raise AccessDeniedError(
            f"Expected credentials for {uri}; found none ({error}). Run: export AWS_ACCESS_KEY_ID=... "
            "AWS_SECRET_ACCESS_KEY=... (or aws configure)."
        ) from error
    except (boto.ConnectionError, boto.HTTPClientError) as error:
        raise _unreachable(uri, type(error).__name__) from error
    except (boto.IncompleteReadError, boto.FlexibleChecksumError, ResponseParserError, ProtocolError) as error:
        raise UnavailableError(
            f"Expected the whole answer of {endpoint()} for {uri}; got only a part of it, or damaged bytes."
            f"{_by_proxy()}"
        ) from error
    except boto.BotoCoreError as error:
        raise StorageError(f"{uri}: {error}") from error
    except Exception as error:
        refusal = obstore_error(error)
        if refusal is None:
            raise
        raise _from_refusal(refusal, "GetObject", uri, str(error).splitlines()[0]) from error


def _from_response(error: Any, uri: S3Uri) -> StorageError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    operation = error.operation_name
    if code == "404" and operation == "ListObjectsV2":
        code = "NoSuchBucket"
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return _from_refusal(Refusal(code, status), operation, uri, str(error))


def _from_refusal(refusal: Refusal, operation: str, uri: S3Uri, text: str) -> StorageError:
    code, status = refusal
    if code == UNREACHABLE:
        return _unreachable(uri, text)
    for codes, kind, message in _REFUSALS:
        if code in codes:
            told = message.format(uri=uri, endpoint=endpoint(), operation=operation, code=code)
            return kind(told + (_by_proxy() if code.isdecimal() else ""))  # not a code of S3: a proxy may have refused
    if code in _UNAVAILABLE or status == _TOO_MANY or (status >= _SERVERS_FAULT and status != _NOT_IMPLEMENTED):
        return UnavailableError(f"Expected {endpoint()} to do {operation} at {uri}; it answered {code}.{_by_proxy()}")
    return StorageError(f"{uri}: {endpoint()} answered {code} to {operation}: {text}{_by_proxy()}")


def _unreachable(uri: S3Uri, reason: str) -> UnreachableError:
    return UnreachableError(
        f"Expected an S3 server at {endpoint()}; got no answer for {uri} ({reason}).{_by_proxy()} "
        "Check AWS_ENDPOINT_URL_S3; for the server on this machine run: nucleus store status."
    )


def _by_proxy() -> str:
    """Return a sentence about the proxy between this machine and the server; empty if there is none."""
    return proxy_advice(endpoint() if "://" in endpoint() else _AWS)
