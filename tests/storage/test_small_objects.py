"""Small objects by requests of our own: the same signatures, bytes and errors as those of boto3."""

import base64
import hashlib
import zlib
from dataclasses import replace

import pytest
from urllib3 import HTTPResponse
from urllib3.connection import HTTPConnection

from nucleus.errors import ObjectNotFoundError
from nucleus.storage.bucket import Bucket
from nucleus.storage.small_objects import SmallObjects, is_whole

KEYS = ("a.png", "a b/é~(1).png", "50%20x+y=z&q?.png", "b..png")


def test_objects_are_those_of_boto3_without_it(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    small = SmallObjects(bucket)
    for key in KEYS:
        bucket.put(key, key.encode())
    with monkeypatch.context() as patched:
        for name in ("get", "put"):
            patched.setattr(bucket, name, None)
        assert [small.get(key) for key in KEYS] == [key.encode() for key in KEYS]
        for key in KEYS:
            small.put(key, b"new " + key.encode())
            small.put(f"empty/{key}", b"")
    assert [bucket.get(key) for key in KEYS] == [b"new " + key.encode() for key in KEYS]
    assert {bucket.get(f"empty/{key}") for key in KEYS} == {b""}


def test_what_is_missing_is_told_by_boto3(bucket: Bucket) -> None:
    small = SmallObjects(bucket)
    for _ in range(5):
        with pytest.raises(ObjectNotFoundError, match="gone"):
            small.get("gone.png")
    bucket.put("there.png", b"here")
    assert small.get("there.png") == b"here"


def test_a_server_that_is_reached_otherwise_is_left_to_boto3(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request is answered all the same; after three the wrong address is not asked any more."""
    sent: list[str] = []
    right = bucket.connection.address()
    assert right is not None

    def connect(line: HTTPConnection) -> None:
        if line.host == "elsewhere":
            sent.append(line.host)
            raise ConnectionRefusedError
        connected(line)

    connected = HTTPConnection.connect
    monkeypatch.setattr(bucket.connection, "address", lambda: replace(right, server="http://elsewhere"))
    monkeypatch.setattr(HTTPConnection, "connect", connect)
    small = SmallObjects(bucket)
    for number in range(5):
        small.put(f"{number}.png", b"pixels")
        assert small.get(f"{number}.png") == b"pixels"
    assert sent == ["elsewhere"] * 3


def test_proxies_are_left_to_boto3(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = bucket.connection
    assert connection.address() is not None
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert connection.address() is None


def test_a_body_with_another_sum_is_not_whole() -> None:
    crc = base64.b64encode(zlib.crc32(b"pixels").to_bytes(4, "big")).decode()
    sha = base64.b64encode(hashlib.sha256(b"pixels").digest()).decode()
    for headers in ({}, {"x-amz-checksum-crc32": crc}, {"x-amz-checksum-sha256": sha, "x-amz-checksum-crc32": "AA-2"}):
        assert is_whole(b"pixels", {"content-length": "6", **headers})
        assert not is_whole(b"pixels", headers)
    for headers in ({"x-amz-checksum-crc32": crc}, {"x-amz-checksum-sha256": sha}):
        assert not is_whole(b"pixelz", {"content-length": "6", **headers})
    assert not is_whole(b"pixel", {"content-length": "6"})


def test_a_web_page_is_no_object(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway may answer anything with status 200; boto3 asks again, and says what is wrong."""
    bucket.put("a.png", b"pixels")
    small = SmallObjects(bucket)
    page = {"content-length": "4", "content-type": "text/html"}
    monkeypatch.setattr(small, "_answer", lambda *_: HTTPResponse(b"<p/>", page, 200))
    assert small.get("a.png") == b"pixels"
    small.put("b.png", b"others")
    assert bucket.get("b.png") == b"others"
