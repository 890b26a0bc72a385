import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from botocore.utils import parse_timestamp

from nucleus.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    UnreachableError,
)
from nucleus.storage import client
from nucleus.storage.bucket import Bucket
from nucleus.storage.files import atomic_path, sha256_of, write_atomic
from nucleus.storage.retries import set_storage_timeout
from nucleus.storage.uri import parse_uri
from tests.faults.credentials import without_keys


def test_objects(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("a/1", b"one")
    (tmp_path / "two").write_bytes(b"two")
    bucket.put("a/2", tmp_path / "two")
    bucket.put("ab/3", b"three")
    assert [item.key for item in bucket.objects("a/")] == ["a/1", "a/2"]
    assert [item.size for item in bucket.objects("")] == [3, 3, 5]
    assert bucket.folders("") == ["a", "ab"]
    assert bucket.get("a/2") == b"two"
    with pytest.raises(ObjectNotFoundError, match="a/9"):
        bucket.get("a/9")


def test_conditional_writes(bucket: Bucket) -> None:
    tag = bucket.put("x", b"1", if_absent=True)
    with pytest.raises(ObjectExistsError):
        bucket.put("x", b"2", if_absent=True)
    bucket.put("x", b"3", if_match=tag)
    with pytest.raises(ObjectExistsError):
        bucket.put("x", b"4", if_match=tag)
    assert bucket.get("x") == b"3"


def test_downloads_are_verified_and_whole(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("x", b"data")
    path = tmp_path / "deep" / "x"
    digest = bucket.download("x", path)
    assert digest == sha256_of(path)
    path.write_bytes(b"last good copy")
    with pytest.raises(IntegrityError, match="SHA-256"):
        bucket.download("x", path, sha256="0" * 64)
    with pytest.raises(ObjectNotFoundError):
        bucket.download("y", path)
    assert path.read_bytes() == b"last good copy"
    assert [p.name for p in path.parent.iterdir()] == ["x"]


def test_what_travels_is_the_uri(bucket: Bucket) -> None:
    bucket.put("x", b"1")
    data = pickle.dumps(bucket)
    assert b"local-only" not in data
    assert pickle.loads(data).get("x") == b"1"


def test_missing_bucket(store: object) -> None:  # noqa: ARG001
    with pytest.raises(BucketNotFoundError, match="aws s3 mb s3://nowhere"):
        Bucket(parse_uri("s3://nowhere/x")).check()


def test_a_dead_proxy_is_named(store: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: ARG001
    """By small requests and by downloads, which use another client; the password in its address is not shown."""
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://me:hidden@127.0.0.1:9")
    set_storage_timeout(0.1)
    elsewhere = "http://s3.example:9000"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", elsewhere)
    bucket = Bucket(parse_uri("s3://cells"))
    for ask in (bucket.check, lambda: bucket.download("x", tmp_path / "x")):
        with pytest.raises(UnreachableError) as caught:
            ask()
        message = str(caught.value)
        for words in ("HTTP_PROXY=http://127.0.0.1:9", "add s3.example to NO_PROXY", elsewhere):
            assert words in message
        assert "hidden" not in message


def test_a_server_of_this_machine_is_reached_without_its_proxy(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Though the proxy was set after the server had started."""
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    bucket.put("x", b"1")
    bucket.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_unreachable_endpoint(store: object, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match="AWS_ENDPOINT_URL_S3"):
        Bucket(parse_uri("s3://nucleus")).check()


def test_no_credentials(store: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: ARG001
    without_keys(monkeypatch)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(AccessDeniedError, match="export AWS_ACCESS_KEY_ID"):
        Bucket(parse_uri("s3://nucleus")).check()


class _Refusing(BaseHTTPRequestHandler):
    """Answers as AWS does to a wrong key; the embedded server checks none."""

    def do_GET(self) -> None:
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>unknown key</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_wrong_credentials(store: object, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    refusing = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=refusing.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{refusing.server_port}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-show")
    with pytest.raises(AccessDeniedError, match="InvalidAccessKeyId") as caught:
        Bucket(parse_uri("s3://nucleus")).check()
    assert "do-not-show" not in str(caught.value)
    refusing.shutdown()
    refusing.server_close()


def test_files_are_written_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def interrupted() -> None:
        with atomic_path(path) as beside:
            beside.write_text("half")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", ["2026-11-29T16:23:18.780Z", "Sun, 29 Nov 2026 16:23:18 GMT", "2026-11-29T16:23:18+02:00"]
)
def test_times_are_those_of_botocore(text: str) -> None:
    found = client._parsed_time(text)
    assert (found, found.utcoffset()) == (parse_timestamp(text), parse_timestamp(text).utcoffset())
