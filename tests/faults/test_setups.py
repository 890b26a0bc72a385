"""Set-ups of stores and of the AWS SDK: each is used by every way in which this project reaches a bucket."""

import hashlib
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb

from job.filesystem import run_storage
from nucleus.errors import StorageError
from nucleus.storage.bucket import Bucket, check_conditional_writes
from nucleus.storage.local_server import RunningStore
from nucleus.storage.uri import S3Uri
from tests.faults.certificates import private_authority
from tests.faults.credentials import without_keys, written
from tests.faults.proxy import Answer, Framing, Proxy, Request, proxied, refusal

DATA = b"0123456789abcdef" * 20_000
SUM = hashlib.sha256(DATA).hexdigest()
KEY = "folder/x"
HOST = "s3.test"
_SCOPE = re.compile(r"Credential=[^/]+/\d+/([^/]+)/s3/")


@pytest.fixture
def line(store: RunningStore, bucket_uri: S3Uri, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the store, in whose bucket one object is."""
    Bucket(bucket_uri).put(KEY, DATA)
    with proxied(store.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


def configured(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the AWS configuration file."""
    file = tmp_path / "aws-config"
    file.write_text(f"[default]\n{text}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))


def check_every_way(uri: S3Uri, folder: Path) -> None:
    """Read, list, download, write and delete, as Ray Train does too, and refer to an object as W&B does."""
    bucket = Bucket(uri)
    bucket.check()
    assert bucket.get(KEY) == DATA
    assert [(item.key, item.size) for item in bucket.objects("folder/")] == [(KEY, len(DATA))]
    assert bucket.folders("") == ["folder"]
    assert bucket.download(KEY, folder / "x", sha256=SUM) == SUM
    check_conditional_writes(bucket)
    bucket.put("new/y", folder / "x", if_absent=True)
    assert run_storage(uri, 600.0).open_input_stream(f"{uri.bucket}/{uri.key}/new/y").read() == DATA
    bucket.delete("new/y")
    artifact = wandb.Artifact("m", "model")
    artifact.add_reference(f"{uri}/{KEY}", name="x")
    assert [entry.size for entry in artifact.manifest.entries.values()] == [len(DATA)]


def only_region(region: str) -> Callable[[Request], Answer | None]:
    """Answers as AWS does to a request that is signed for another region."""

    def check(request: Request) -> Answer | None:
        scope = _SCOPE.search(request.headers["authorization"])
        if scope is not None and scope[1] == region:
            return None
        malformed = refusal(400, "AuthorizationHeaderMalformed", more=f"<Region>{region}</Region>")
        return replace(malformed, headers={**malformed.headers, "x-amz-bucket-region": region})

    return check


@pytest.mark.parametrize("refused", ["AuthorizationHeaderMalformed", "PermanentRedirect"])
@pytest.mark.parametrize("way", ["AWS_REGION", "AWS_DEFAULT_REGION", "region"])
def test_a_region_that_is_not_the_buckets(
    line: Proxy, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, way: str
) -> None:
    """Refused as AWS does, and as the embedded server does by itself."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    if way != "region":
        monkeypatch.setenv(way, "eu-west-3")
    else:
        configured("region = eu-west-3", tmp_path, monkeypatch)
    if refused != "PermanentRedirect":
        line.scripted = only_region("us-east-1")
    check_every_way(bucket_uri, tmp_path)
    signed = [_SCOPE.search(request.headers["authorization"]) for request in line.log]
    assert [scope[1] for scope in signed[:2] if scope] == ["eu-west-3", "us-east-1"]


@pytest.fixture
def by_host(line: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The proxy under a name below which buckets are host names."""
    known = socket.getaddrinfo

    def lookup(host: Any, *arguments: Any, **more: Any) -> Any:
        return known("127.0.0.1" if str(host).endswith(HOST) else host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{HOST}:{line.server_port}")
    return line


def test_buckets_as_host_names_by_the_configuration_file(
    by_host: Proxy, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured("s3 =\n    addressing_style = virtual", tmp_path, monkeypatch)
    check_every_way(bucket_uri, tmp_path)
    assert {request.headers["host"].partition(".")[0] for request in by_host.log} == {bucket_uri.bucket}


def test_a_variable_that_the_sdk_does_not_know_changes_nothing(
    by_host: Proxy, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    check_every_way(bucket_uri, tmp_path)
    assert {request.headers["host"] for request in by_host.log} == {f"{HOST}:{by_host.server_port}"}


@pytest.mark.parametrize("way", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle"])
def test_a_private_certificate_authority(
    line: Proxy, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    bundle, context = private_authority(tmp_path)
    line.secure(context)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", line.endpoint)
    with pytest.raises(StorageError, match="AWS_CA_BUNDLE"):
        Bucket(bucket_uri).get(KEY)
    assert line.log == []  # nothing was sent
    if way == "ca_bundle":
        configured(f"ca_bundle = {bundle}", tmp_path, monkeypatch)
    else:
        monkeypatch.setenv(way, str(bundle))
    check_every_way(bucket_uri, tmp_path)


@pytest.mark.parametrize("framing", [Framing.CHUNKED, Framing.CLOSED])
def test_no_content_length(line: Proxy, bucket_uri: S3Uri, tmp_path: Path, framing: Framing) -> None:
    line.framing = framing
    check_every_way(bucket_uri, tmp_path)


def test_an_endpoint_of_the_configuration_file(
    line: Proxy, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    configured(f"endpoint_url = {line.endpoint}", tmp_path, monkeypatch)
    check_every_way(bucket_uri, tmp_path)
    assert Bucket(bucket_uri).endpoint == line.endpoint
    configured("endpoint_url = http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9; .*endpoint_url in the AWS configuration file"):
        Bucket(bucket_uri).check()


@pytest.mark.parametrize("profile", ["default", "other"])
def test_credentials_of_a_profile(
    line: Proxy, bucket_uri: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str
) -> None:
    without_keys(monkeypatch)
    file = tmp_path / "credentials"
    written(file, "KEYOFPROFILE", profile)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", profile)
    check_every_way(bucket_uri, tmp_path)
    assert all("Credential=KEYOFPROFILE/" in request.headers["authorization"] for request in line.log)
