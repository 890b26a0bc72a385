"""Errors of requests to the bucket, translated to this project's exceptions: with the fix, without credentials."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
from nucleus.storage.uri import S3Uri
from nucleus.surroundings import CLOCK_FIX, export, proxy_advice
from nucleus.text import first_line

__all__ = [
    "AWS_HOSTS",
    "CHECKSUM_FIX",
    "credentials_refused",
    "endpoint_source",
    "endpoint_variable",
    "explained",
    "refusal_of",
]

AWS_HOSTS = ".amazonaws.com"
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Environment variables of the AWS SDK with the URL of the server, the first that is set."""
_CHECKSUMS, _NO_CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"
CHECKSUM_FIX = f"export {_CHECKSUMS}={_NO_CHECKSUMS}"
"""The command that helps with a server that does not know the SDK's newer checksums of uploads."""

_REFUSALS: tuple[tuple[set[str], type[StorageError], str], ...] = (
    (
        {"NoSuchBucket"},
        BucketNotFoundError,
        "Expected the bucket {uri.bucket!r} at {endpoint}; it does not exist. Run: aws s3 mb s3://{uri.bucket} (or "
        "correct the name).",
    ),
    ({"NoSuchKey", "404", "NotFound"}, ObjectNotFoundError, "Expected an object at {uri}; found none."),
    (
        {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"},
        AccessDeniedError,
        "Expected valid credentials for {operation} at {uri}; {endpoint} answered that they have expired ({code}). "
        "Renew them where they come from (such as: aws sso login); a file with credentials is read again by itself.",
    ),
    (
        {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidTokenId"},
        AccessDeniedError,
        "Expected permission for {operation} at {uri}; {endpoint} refused ({code}). Check AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY and their permissions.",
    ),
    (
        {"RequestTimeTooSkewed"},
        ClockError,
        "Expected this machine's clock to be within 15 minutes of {endpoint}'s; {operation} was refused ({code}). "
        + CLOCK_FIX,
    ),
    (
        {"PreconditionFailed", "412"},
        ObjectExistsError,
        "Expected to be the only writer of {uri}; another write was first ({code}).",
    ),
)
"""Error codes of S3, with the exception and the message for each."""
_RENEWABLE = {
    "403",
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "InvalidTokenId",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
"""Codes that refuse the credentials themselves."""
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
_FULL = {"InsufficientStorage", "QuotaExceeded", "StorageFull", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
_OLD_CHECKSUMS = {
    "400", "411", "501", "AccessDenied", "BadRequest", "InvalidArgument", "InvalidDigest", "InvalidRequest",
    "MalformedTrailerError", "MissingContentLength", "NotImplemented", "SignatureDoesNotMatch",
    "XAmzContentSHA256Mismatch",
}  # fmt: skip
"""Codes with which servers refuse an upload with a checksum that they do not know."""
_TOO_MANY, _SERVERS_FAULT, _NOT_IMPLEMENTED, _NO_ROOM = 429, 500, 501, 507
_NO_CERTIFICATES = ("[Errno ", "[X509")
_UNTRUSTED, _NOT_TLS = "CERTIFICATE_VERIFY_FAILED", ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")


class Refusal(NamedTuple):
    """A server's answer that refuses a request.

    Attributes:
        code: Error code of S3, or the HTTP status as text.
        status: HTTP status, or 0 if it is unknown.
        message: The server's own sentence; may be empty.
    """

    code: str
    status: int
    message: str


def endpoint_variable() -> str | None:
    """Return the name of the environment variable that has the URL of the server; None if none is set."""
    return next((name for name in _ENDPOINT_VARIABLES if os.environ.get(name)), None)


def endpoint_source(endpoint: str) -> str:
    """Return where an endpoint was set: an environment variable, or the configuration file of the AWS SDK."""
    named = endpoint_variable()
    if named is not None:
        return named
    if AWS_HOSTS in endpoint:
        return f"{_ENDPOINT_VARIABLES[0]}, which is not set, so that AWS is asked"
    return f"endpoint_url in the AWS configuration file ({os.environ.get('AWS_CONFIG_FILE', '~/.aws/config')})"


def refusal_of(error: BaseException | None) -> Refusal | None:
    """Return a server's answer that caused an error of this project; None if the error has another cause."""
    answer = getattr(error.__cause__ if error is not None else None, "response", None)
    return _refusal(answer) if isinstance(answer, dict) else None


def _refusal(answer: dict[str, Any]) -> Refusal:
    found = answer.get("Error", {})
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return Refusal(str(found.get("Code", "")), status, first_line(found.get("Message") or ""))


def credentials_refused(error: AccessDeniedError) -> bool:
    """Return whether a server refused the credentials themselves, such as expired ones, and not what they may do."""
    refusal = refusal_of(error)
    return refusal is not None and refusal.code in _RENEWABLE


@contextmanager
def explained(uri: S3Uri, endpoint: str) -> Iterator[None]:
    """Translate the errors that botocore raises in the block to `StorageError` and its subclasses.

    Args:
        uri: What the block asks for.
        endpoint: URL of the server that it asks.
    """
    import botocore.exceptions as boto  # noqa: PLC0415  slow to import
    from botocore.parsers import ResponseParserError  # noqa: PLC0415
    from urllib3.exceptions import ProtocolError, ReadTimeoutError  # noqa: PLC0415  of a body that breaks off

    try:
        yield
    except boto.ClientError as error:
        raise _from_response(error, uri, endpoint) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise AccessDeniedError(
            f"Expected credentials for {uri}; found none ({error}). Run: aws configure "
            f"(or {export('AWS_ACCESS_KEY_ID', '...')}, and AWS_SECRET_ACCESS_KEY). For images in a public "
            "bucket, nucleus predict takes --anonymous."
        ) from error
    except (boto.CredentialRetrievalError, boto.SSOError, boto.InvalidConfigError) as error:
        raise AccessDeniedError(f"Expected credentials for {uri}; got none: {_sentence(error)}") from error
    except boto.SSLError as error:
        raise _from_tls(str(error), uri, endpoint) from error
    except (boto.ConnectionError, boto.HTTPClientError, ReadTimeoutError) as error:
        raise _unreachable(uri, endpoint, type(error).__name__) from error
    except (boto.IncompleteReadError, boto.FlexibleChecksumError, ResponseParserError, ProtocolError) as error:
        raise UnavailableError(
            f"Expected the whole answer of {endpoint} for {uri}; got only a part of it, or damaged bytes."
            f"{proxy_advice(endpoint)}"
        ) from error
    except boto.BotoCoreError as error:
        raise StorageError(
            f"Expected a usable AWS configuration for {uri}; {_sentence(error)} Check AWS_PROFILE, AWS_REGION and the "
            "files ~/.aws/config and ~/.aws/credentials (AWS_CONFIG_FILE, AWS_SHARED_CREDENTIALS_FILE)."
        ) from error


def _sentence(error: Exception) -> str:
    return f"{first_line(error).rstrip('.')}."


def _from_response(error: Any, uri: S3Uri, endpoint: str) -> StorageError:
    found = _refusal(error.response)
    if found.code == "404" and error.operation_name == "ListObjectsV2":
        found = found._replace(code="NoSuchBucket")
    return _from_refusal(found, error.operation_name, uri, endpoint)


def _from_refusal(refusal: Refusal, operation: str, uri: S3Uri, endpoint: str) -> StorageError:
    code, status, _ = refusal
    if status == _NO_ROOM or code in _FULL:
        return StorageError(
            f"Expected room for {uri} at {endpoint}; the store is full: {_words(refusal)}. Remove what is no longer "
            "needed there or enlarge it, and repeat the command."
        )
    advice = _checksum_advice(operation, code) + (proxy_advice(endpoint) if code.isdecimal() else "")
    for codes, kind, message in _REFUSALS:
        if code in codes:
            return kind(message.format(uri=uri, endpoint=endpoint, operation=operation, code=code) + advice)
    if code in _UNAVAILABLE or status == _TOO_MANY or (status >= _SERVERS_FAULT and status != _NOT_IMPLEMENTED):
        return UnavailableError(
            f"Expected {endpoint} to do {operation} at {uri}; it answered {_words(refusal)}.{proxy_advice(endpoint)}"
        )
    return StorageError(f"Expected {endpoint} to do {operation} at {uri}; it answered {_words(refusal)}.{advice}")


def _words(refusal: Refusal) -> str:
    """Return the server's code and its own sentence."""
    return f"{refusal.code} ({refusal.message.rstrip('.')})" if refusal.message else refusal.code


def _checksum_advice(operation: str, code: str) -> str:
    """Return a sentence about checksums that older servers do not know; empty where they cannot be the cause."""
    if operation != "PutObject" or code not in _OLD_CHECKSUMS or os.environ.get(_CHECKSUMS) == _NO_CHECKSUMS:
        return ""
    return f" If the server does not know the SDK's newer checksums (nucleus doctor finds out), run: {CHECKSUM_FIX}."


def _from_tls(text: str, uri: S3Uri, endpoint: str) -> StorageError:
    """Return the error of a connection by TLS that was not made."""
    if _UNTRUSTED in text:
        reason = text.partition("certificate verify failed: ")[2].partition(" (_ssl")[0] or "it is not trusted"
        return StorageError(
            f"Expected a certificate of {endpoint} that this machine trusts; found another: {reason}. For a private "
            f"certificate authority, run: {export('AWS_CA_BUNDLE', 'FILE.pem')} (or ca_bundle in the AWS configuration "
            "file)."
        )
    if any(part in text for part in _NO_CERTIFICATES):
        return StorageError(
            f"Expected a file with certificates for {endpoint}; found none, or one without any. Check AWS_CA_BUNDLE, "
            "REQUESTS_CA_BUNDLE, and ca_bundle in the AWS configuration file."
        )
    if any(part in text for part in _NOT_TLS):
        return StorageError(
            f"Expected TLS at {endpoint}; found a server without it. If that is right, write http:// instead of "
            f"https:// in {endpoint_source(endpoint)}."
        )
    return _unreachable(uri, endpoint, "SSLError")


def _unreachable(uri: S3Uri, endpoint: str, reason: str) -> UnreachableError:
    return UnreachableError(
        f"Expected an S3 server at {endpoint}; got no answer for {uri} ({reason}).{proxy_advice(endpoint)} "
        f"Check {endpoint_source(endpoint)}; for the server on this machine run: nucleus store status."
    )
