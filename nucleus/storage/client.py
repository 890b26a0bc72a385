"""Client of an S3 server, the only one: boto3, so that the AWS SDK's rules decide endpoint, region, addressing,
certificates, proxy and credentials.

Added to it are a time limit for programs that provide credentials, credentials that are renewed in their file during a
run, and checks that an answer comes from an S3 server.
"""

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nucleus.errors import AccessDeniedError, NucleusError, UnreachableError
from nucleus.progress import Advance, no_progress
from nucleus.storage.answers import REGION_HEADER, check_answer
from nucleus.storage.retries import seconds_of_silence, storage_timeout
from nucleus.storage.s3_errors import AWS_HOSTS, endpoint_source, endpoint_variable, explained
from nucleus.storage.uri import S3Uri
from nucleus.surroundings import exempt_this_machine, proxy_of
from nucleus.text import first_line

if TYPE_CHECKING:
    from boto3.session import Session
    from botocore.credentials import Credentials
    from botocore.loaders import Loader
    from mypy_boto3_s3 import S3Client

__all__ = ["Address", "Connection", "body_of"]

_CONNECTIONS = 32
_LONGEST_CONNECT = 5.0
_ANSWER, _REQUEST = "before-parse.s3", "request-created.s3"
_REGION = "AWS_REGION"
_SIGNATURE, _ANY_KEY = "s3v4", "key"
_CERTIFICATES = "REQUESTS_CA_BUNDLE"
"""Environment variable that botocore reads after ca_bundle and AWS_CA_BUNDLE."""
_PROCESS = "custom-process"
_ROLE = "assume-role"
"""botocore's names of the providers that run the program of `credential_process`."""
_NOTE_SECONDS = 5.0
"""Wait for credentials after which a note says so."""


@dataclass(frozen=True)
class Address:
    """Where a bucket is, for requests that are sent without boto3 (`nucleus.storage.small_objects`).

    Attributes:
        server: URL of the server, without a path.
        path: What comes before a key in the path of an object: `/`, or `/bucket/`.
        region: Region, for the signature.
        certificates: File of the certificates to trust; None without TLS.
        credentials: Those of botocore, which renews them; None if requests are not signed.
    """

    server: str
    path: str
    region: str
    certificates: str | None
    credentials: "Credentials | None"


class Connection:
    """A client with the credentials that it uses, which can be read anew.

    Args:
        uri: The bucket or prefix that it is for, for messages.
        newer_checksums: Whether uploads may have checksums that older servers do not know; the SDK's settings decide.
        anonymous: Whether requests are not signed; no credentials are looked for.

    Attributes:
        client: The client; another one after the credentials were renewed.
        provider: Where the credentials come from, by botocore's name, such as `env`; None if there are none.
        expire: When the credentials end, if that is known.
        bucket_region: The bucket's region, if an answer told it; of a bucket elsewhere, a redirect does.

    Raises:
        StorageError: The configuration is wrong, or there are no credentials.
    """

    def __init__(self, uri: S3Uri, *, newer_checksums: bool = True, anonymous: bool = False) -> None:
        exempt_this_machine()
        self._uri = uri
        self._newer_checksums = newer_checksums
        self._anonymous = anonymous
        self.provider: str | None = None
        self.expire: datetime | None = None
        self.bucket_region: str | None = None
        self._renewing = threading.Lock()
        self._keys, self.client = self._connect()

    @property
    def endpoint(self) -> str:
        """URL of the server."""
        return str(self.client.meta.endpoint_url)

    def route(self) -> str:
        """Return how requests reach the server: region, addressing of buckets, certificates and proxy, as text."""
        meta, usual = self.client.meta, "path" if AWS_HOSTS not in self.endpoint else "virtual"
        style = (getattr(meta.config, "s3", None) or {}).get("addressing_style") or usual
        style = usual if style == "auto" else style
        bundle = _bundle()
        proxy = proxy_of(self.endpoint)
        parts = [
            f"set by {endpoint_source(self.endpoint)}",
            f"region {meta.region_name}",
            "buckets as host names" if style == "virtual" else "buckets in the path",
            *([f"certificates of {bundle}"] if bundle and self.endpoint.startswith("https") else []),
            *([f"through {proxy}"] if proxy else []),
        ]
        return ", ".join(parts)

    def address(self) -> Address | None:
        """Return where the bucket is; None if requests need what only boto3 knows: a proxy, or another signature."""
        meta, keys = self.client.meta, self._credentials
        if proxy_of(self.endpoint) or getattr(meta.config, "signature_version", None) not in (_SIGNATURE, _unsigned()):
            return None
        # A bucket with rules of its own, such as that of an access point, makes another path, or none.
        key = {"Bucket": self._uri.bucket, "Key": _ANY_KEY}
        with explained(self._uri, self.endpoint):
            place = urlsplit(self.client.generate_presigned_url("get_object", Params=key))
        if place.path not in (f"/{_ANY_KEY}", f"/{self._uri.bucket}/{_ANY_KEY}") or (keys is None) != self._anonymous:
            return None
        certificates = _trusted() if place.scheme == "https" else None
        server, path = f"{place.scheme}://{place.netloc}", place.path.removesuffix(_ANY_KEY)
        return Address(server, path, meta.region_name, certificates, keys)

    def renew(self, used: "S3Client") -> bool:
        """Read the credentials again where they come from; return whether the client now has others.

        Args:
            used: The client whose credentials were refused.
        """
        with self._renewing:
            if self.client is not used:  # another thread was faster
                return True
            keys, client = self._connect()
            if keys == self._keys:
                return False
            self._keys, self.client = keys, client
            return True

    def _connect(self) -> tuple[Any, "S3Client"]:
        variable = endpoint_variable()
        with explained(self._uri, os.environ[variable] if variable else "the S3 server"):
            session = _session()
            found, keys = (None, None) if self._anonymous else _credentials(session, self._uri)
            self._credentials = found
            self.provider, self.expire = getattr(found, "method", None), getattr(found, "_expiry_time", None)
            client = _client(session, self._uri, newer_checksums=self._newer_checksums, anonymous=self._anonymous)
            client.meta.events.register_first(_ANSWER, self._check, unique_id="nucleus-answer")
            return keys, client

    def _check(self, operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
        """Check an answer before botocore parses it."""
        self.bucket_region = response_dict["headers"].get(REGION_HEADER) or self.bucket_region
        try:
            check_answer(self.endpoint, operation_model.name, response_dict)
        except NucleusError:
            if not isinstance(response_dict["body"], bytes):  # a body that nobody will read
                response_dict["body"].close()
            raise


def _bundle() -> str | None:
    """Return the file of certificates that the settings name, or None."""
    import botocore.session  # noqa: PLC0415  slow to import

    return botocore.session.get_session().get_config_variable("ca_bundle") or os.environ.get(_CERTIFICATES)


def _trusted() -> str:
    """Return the file of certificates that botocore trusts."""
    from botocore.httpsession import get_cert_path  # noqa: PLC0415  slow to import

    return _bundle() or str(get_cert_path(True))


def _unsigned() -> Any:
    from botocore import UNSIGNED  # noqa: PLC0415  slow to import

    return UNSIGNED


def _session() -> "Session":
    """Return a session whose credential program has a time limit; sessions share the SDK's own data files."""
    import boto3.session  # noqa: PLC0415  takes half a second, which `nucleus --help` need not spend
    import botocore.session  # noqa: PLC0415
    from botocore.credentials import ProcessProvider  # noqa: PLC0415

    core = botocore.session.get_session()
    files = _data_files(core.get_config_variable("data_path"))
    core.register_component("data_loader", files)
    profile = core.get_config_variable("profile") or "default"
    resolver = core.get_component("credential_provider")

    def limited(name: str) -> Any:
        return ProcessProvider(name, lambda: core.full_config, popen=_LimitedProcess)

    resolver.insert_before(_PROCESS, limited(profile))  # if it has a program, the original is not asked
    roles = resolver.get_provider(_ROLE)._profile_provider_builder  # of profiles whose keys a role is assumed with
    roles._create_process_provider = limited
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parsed_time)
    region = os.environ.get(_REGION) or None  # as the other SDKs and W&B do; boto3 itself knows AWS_DEFAULT_REGION only
    session = boto3.session.Session(botocore_session=core, region_name=region)
    files.search_paths[:] = dict.fromkeys(files.search_paths)  # each session adds the same folder
    return session


@functools.cache
def _data_files(folders: str | None) -> "Loader":
    """Return what reads the SDK's descriptions of its services, which take most of the time that a client takes."""
    from botocore.loaders import create_loader  # noqa: PLC0415

    return create_loader(folders)


def _parsed_time(text: Any) -> datetime:
    """Return a time of S3 as botocore does, which takes half of a listing's time for those of ISO 8601."""
    from botocore.utils import parse_timestamp  # noqa: PLC0415  as slow as boto3

    with suppress(TypeError, ValueError):
        found = datetime.fromisoformat(text)
        if found.tzinfo is not None:
            return found
    return parse_timestamp(text)


class _LimitedProcess(subprocess.Popen[bytes]):
    """The program of `credential_process`, which must end within the storage timeout and print JSON."""

    def __init__(self, command: list[str], **settings: Any) -> None:
        self._command = command[0] if command else ""
        try:
            super().__init__(command, stdin=subprocess.DEVNULL, **settings)
        except (OSError, IndexError) as error:
            raise self._error(f"it cannot be run ({error})") from error

    def communicate(self, *_: Any, **__: Any) -> tuple[bytes, bytes]:
        """Return the program's output. Raises botocore's `CredentialRetrievalError`."""
        limit = storage_timeout()
        try:
            printed, errors = super().communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            self.kill()
            super().communicate()
            raise self._error(f"it did not end within {limit:g} s (nucleus --storage-timeout SECONDS)") from error
        if self.returncode != 0:
            text = first_line(errors.decode(errors="replace")) or f"exit status {self.returncode}"
            raise self._error(f"it failed ({text})")
        try:
            answer = json.loads(printed)
        except ValueError as error:  # what it printed may contain keys
            raise self._error("it printed more than one JSON document, or none") from error
        if not isinstance(answer, dict):
            raise self._error("it printed JSON that is not an object")
        return printed, b""

    def _error(self, found: str) -> Exception:
        from botocore.exceptions import CredentialRetrievalError  # noqa: PLC0415  slow to import

        return CredentialRetrievalError(
            provider=_PROCESS,
            error_msg=(
                f"Expected {self._command!r}, the credential_process of the AWS configuration, to print credentials; "
                f"{found}. Run it by hand, and correct it"
            ),
        )


def _credentials(session: "Session", uri: S3Uri) -> tuple[Any, Any]:
    """Return the credentials of a session, and their values; both None if it has none. A note says if that takes long.

    Raises `AccessDeniedError` for values that the SDK cannot read.
    """
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415  slow to import

    text = f"Note: waiting for credentials for {uri} (credential_process, SSO or the machine's role)\n"
    note = threading.Timer(_NOTE_SECONDS, sys.stderr.write, (text,))
    note.daemon = True
    note.start()
    try:
        found = session.get_credentials()
        return found, found.get_frozen_credentials() if found is not None else None
    except BotoCoreError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:  # of what a file or program gives, or a missing file
        raise AccessDeniedError(
            f"Expected credentials for {uri} in the form of the AWS SDK; {first_line(error)}. Check the AWS "
            "configuration and credentials files."
        ) from error
    finally:
        note.cancel()


def _client(session: "Session", uri: S3Uri, *, newer_checksums: bool, anonymous: bool) -> "S3Client":
    from botocore import UNSIGNED  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415  as slow as boto3
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415

    config = Config(
        max_pool_connections=_CONNECTIONS,
        connect_timeout=min(_LONGEST_CONNECT, seconds_of_silence()),
        read_timeout=seconds_of_silence(),
        retries={"mode": "standard", "total_max_attempts": 1},  # `ask_patiently` retries, request bodies included
        signature_version=UNSIGNED if anonymous else None,
        request_checksum_calculation=None if newer_checksums else "when_required",
    )
    try:
        client = session.client("s3", config=config)
    except BotoCoreError:
        raise
    except ValueError as error:
        raise UnreachableError(
            f"Expected a URL such as http://127.0.0.1:9000 as the endpoint for {uri}; {first_line(error)}. Check "
            f"{endpoint_source('')}."
        ) from error
    _watch_uploads(client)
    return client


def _watch_uploads(client: "S3Client") -> None:
    """Make a client count only the bytes of a body that are sent, not those read to compute the signature."""
    from s3transfer.utils import signal_not_transferring, signal_transferring  # noqa: PLC0415  as slow as boto3

    client.meta.events.register_first(_REQUEST, signal_not_transferring, unique_id="nucleus-upload-signed")
    client.meta.events.register_last(_REQUEST, signal_transferring, unique_id="nucleus-upload-sent")


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
