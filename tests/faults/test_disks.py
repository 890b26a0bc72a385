"""The embedded store, caches and temporary folders on disks that are full or have no locks; real processes and mounts.

What the store answered 200 to is there after `kill -9`; nothing half-written is ever listed.
"""

import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import boto3
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from nucleus.data.synthetic import write_generated
from nucleus.errors import StoreServerError
from nucleus.storage import local_server as server
from nucleus.storage.files import free_bytes

pytestmark = pytest.mark.server
NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL]
Acknowledged = dict[str, tuple[bytes, str]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; the test is skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield place
    for folder in place.rglob("store.json"):
        server.stop(folder.parent)
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[server.RunningStore]:
    """A server of this test alone."""
    running = server.start(tmp_path / "own", 0)
    server.make_bucket(running)
    yield running
    server.stop(tmp_path / "own")


def client_of(running: server.RunningStore) -> Any:
    config = Config(retries={"total_max_attempts": 1}, proxies={})
    keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=running.endpoint, config=config, **keys)


def killed_and_restarted(running: server.RunningStore) -> server.RunningStore:
    os.kill(running.pid, signal.SIGKILL)
    with suppress(psutil.NoSuchProcess):
        server._children[running.pid].wait()
    return server.start(Path(running.folder))


def assert_stored(client: Any, expected: Acknowledged) -> None:
    listed = client.list_objects_v2(Bucket="nucleus").get("Contents", [])
    assert {item["Key"]: (item["Size"], item["ETag"]) for item in listed} == {
        key: (len(data), tag) for key, (data, tag) in expected.items()
    }
    for key, (data, tag) in expected.items():
        answer = client.get_object(Bucket="nucleus", Key=key)
        assert (answer["Body"].read(), answer["ETag"]) == (data, tag)


def attempted(act: Callable[..., Any], **arguments: Any) -> Any:
    """What a request gives; None if it is refused, which must be for want of room."""
    refused: dict[str, Any] = {}
    try:
        return act(**arguments)
    except ClientError as error:
        refused = dict(error.response)
    assert refused["ResponseMetadata"]["HTTPStatusCode"] == 507
    assert refused["Error"]["Code"] == "InsufficientStorage"
    assert "MiB are free" in refused["Error"]["Message"]
    return None


def write_until_refused(client: Any, size: int, most: int) -> Acknowledged:
    """Put, replace, copy and upload in parts; return what was acknowledged, which is not all."""
    stored: Acknowledged = {}
    refused = []

    def record(key: str, data: bytes, answer: Any) -> None:
        if answer is None:
            refused.append(key)
        else:
            stored[key] = (data, answer.get("ETag") or answer["CopyObjectResult"]["ETag"])

    for number in range(most):
        data, place = os.urandom(size), {"Bucket": "nucleus", "Key": f"folder/{number % 5}"}
        record(place["Key"], data, attempted(client.put_object, **place, Body=data))
    for key in list(stored):
        place = {"Bucket": "nucleus", "Key": f"copy of {key}"}
        record(place["Key"], stored[key][0], attempted(client.copy_object, **place, CopySource=f"nucleus/{key}"))
    parts = [os.urandom(size) for _ in range(4)]
    record("whole", b"".join(parts), attempted(uploaded, client=client, parts=parts))
    assert refused
    assert stored
    return stored


def uploaded(client: Any, parts: list[bytes]) -> Any:
    place = {"Bucket": "nucleus", "Key": "whole"}
    place["UploadId"] = client.create_multipart_upload(**place)["UploadId"]
    sent = [
        {"PartNumber": number, "ETag": client.upload_part(**place, PartNumber=number, Body=part)["ETag"]}
        for number, part in enumerate(parts, 1)
    ]
    return client.complete_multipart_upload(**place, MultipartUpload={"Parts": sent})


def left_over(folder: Path) -> list[Path]:
    return list((folder / "s3").rglob("*.tmp"))


def test_all_that_a_full_store_acknowledged_is_there(small_disk: Path) -> None:
    running = server.start(small_disk / "store", 0)
    server.make_bucket(running)
    client = client_of(running)
    stored = write_until_refused(client, 500_000, 12)
    assert_stored(client, stored)
    assert (free_bytes(small_disk) or 0) > (1 << 20) - (1 << 16)  # the reserve stays
    running = killed_and_restarted(running)
    assert_stored(client, stored)
    removed = sorted(stored)[0]  # what is full can be emptied
    client.delete_object(Bucket="nucleus", Key=removed)
    del stored[removed]
    again = client.put_object(Bucket="nucleus", Key="small", Body=b"small")
    stored["small"] = (b"small", again["ETag"])
    killed_and_restarted(running)
    assert_stored(client, stored)
    assert left_over(small_disk / "store") == []


def test_writes_that_fail_on_the_way(own: server.RunningStore) -> None:
    """The system refuses larger files, as it does at the end of a quota: free space tells nothing before."""
    client = client_of(own)
    before = {}
    for key in ("folder/1", "whole"):
        before[key] = (key.encode(), client.put_object(Bucket="nucleus", Key=key, Body=key.encode())["ETag"])
    resource.prlimit(own.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert attempted(client.put_object, Bucket="nucleus", Key="folder/1", Body=bytes(100_001)) is None
    assert attempted(client.put_object, Bucket="nucleus", Key="new", Body=bytes(100_001)) is None
    assert attempted(uploaded, client=client, parts=[bytes(50_000), bytes(50_001)]) is None
    resource.prlimit(own.pid, resource.RLIMIT_FSIZE, (150, 100_000))  # room for the bytes, not for their metadata
    assert attempted(client.put_object, Bucket="nucleus", Key="new", Body=bytes(100)) is None
    assert left_over(Path(own.folder)) == []
    resource.prlimit(own.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    (upload,) = client.list_multipart_uploads(Bucket="nucleus")["Uploads"]  # it can be tried again, or given up
    client.abort_multipart_upload(Bucket="nucleus", Key="whole", UploadId=upload["UploadId"])
    assert_stored(client, before)
    copied = client.copy_object(Bucket="nucleus", Key="copy", CopySource="nucleus/whole")
    before["copy"] = (b"whole", copied["CopyObjectResult"]["ETag"])
    killed_and_restarted(own)
    assert_stored(client, before)
    assert left_over(Path(own.folder)) == []


def test_deletions_that_fail(own: server.RunningStore) -> None:
    """One that is not possible is not acknowledged, and the object stays; here a folder is in place of its file."""
    client = client_of(own)
    stored = {key: client.put_object(Bucket="nucleus", Key=key, Body=b"x")["ETag"] for key in ("a/1", "a/2")}
    folder = Path(own.folder) / "s3" / "000000000000" / "nucleus" / "a"
    subprocess.run(["chattr", "+i", folder], check=False, capture_output=True)
    try:
        if os.access(folder, os.W_OK) and subprocess.run(["touch", folder / "probe"], check=False).returncode == 0:
            pytest.skip("no folder can be made immutable here")
        for act in (
            lambda: client.delete_object(Bucket="nucleus", Key="a/1"),
            lambda: client.delete_objects(Bucket="nucleus", Delete={"Objects": [{"Key": key} for key in stored]}),
        ):
            with pytest.raises(ClientError, match="StorageNotWritable"):
                act()
        assert_stored(client, {key: (b"x", tag) for key, tag in stored.items()})
    finally:
        subprocess.run(["chattr", "-i", folder], check=False, capture_output=True)


KILLED = """
import os, pathlib, sys
from nucleus.storage.store_process import serve_store

replace, left = pathlib.Path.replace, [int(sys.argv[4])]

def killed(self, target):
    if "/s3/" in str(self) and self.name.startswith("x"):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
    return replace(self, target)

pathlib.Path.replace = killed
serve_store(*sys.argv[1:4])
"""


@pytest.mark.parametrize(("renames", "expected"), [(1, b"old"), (2, b"the new one"), (3, b"the new one")])
def test_killed_between_an_object_and_its_metadata(renames: int, expected: bytes, own: server.RunningStore) -> None:
    """Before each of the renames of one write: the object is the old or the new one, with its own ETag and metadata."""
    client = client_of(own)
    client.put_object(Bucket="nucleus", Key="x", Body=b"old", Metadata={"of": "old"})
    server.stop(Path(own.folder))
    command = [sys.executable, "-c", KILLED, own.folder, f"{own.folder}/store.log", str(own.port), str(renames)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while not server._answers(own):
            assert process.poll() is None
        with pytest.raises(BotoCoreError):
            client.put_object(Bucket="nucleus", Key="x", Body=b"the new one", Metadata={"of": "the new one"})
        assert process.wait() == -signal.SIGKILL
    server.start(Path(own.folder))
    answer = client.get_object(Bucket="nucleus", Key="x")
    assert answer["Body"].read() == expected
    assert answer["ETag"] == f'"{hashlib.md5(expected).hexdigest()}"'
    assert answer["Metadata"] == {"of": expected.decode()}
    assert left_over(Path(own.folder)) == []


def test_buckets_and_their_settings_are_there(own: server.RunningStore) -> None:
    client = client_of(own)
    client.create_bucket(Bucket="empty")
    rules = [{"ID": "x", "Status": "Enabled", "Filter": {"Prefix": "runs/"}, "Expiration": {"Days": 9}}]
    client.put_bucket_lifecycle_configuration(Bucket="empty", LifecycleConfiguration={"Rules": rules})
    client.create_bucket(Bucket="gone")
    client.delete_bucket(Bucket="gone")
    killed_and_restarted(own)
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == ["empty", "nucleus"]
    assert client.get_bucket_lifecycle_configuration(Bucket="empty")["Rules"][0]["Expiration"] == {"Days": 9}
    settings = Path(own.folder) / "state" / "s3.json"
    server.stop(Path(own.folder))
    settings.write_text(settings.read_text()[:-9])
    with pytest.raises(StoreServerError, match=r"s3\.json; they are damaged"):
        server.start(Path(own.folder))


def test_objects_that_cannot_be_read_are_no_empty_objects(own: server.RunningStore) -> None:
    client = client_of(own)
    client.put_object(Bucket="nucleus", Key="x", Body=b"bytes")
    (Path(own.folder) / "s3" / "000000000000" / "nucleus" / "x").unlink()
    for act in (
        lambda: client.get_object(Bucket="nucleus", Key="x"),
        lambda: client.copy_object(Bucket="nucleus", Key="y", CopySource="nucleus/x"),
    ):
        with pytest.raises(ClientError, match="InternalError"):
            act()
    with pytest.raises(ClientError, match="404"):
        client.head_object(Bucket="nucleus", Key="y")


@pytest.mark.parametrize("path", ["/_ministack/reset", "/_localstack/x", "/v20180820/accesspoint/x"])
def test_nobody_empties_it(path: str, own: server.RunningStore) -> None:
    client = client_of(own)
    tag = client.put_object(Bucket="nucleus", Key="x", Body=b"bytes")["ETag"]
    with pytest.raises(HTTPError, match="404"):
        urlopen(Request(own.endpoint + path, method="POST"))
    assert_stored(client, {"x": (b"bytes", tag)})


def test_what_would_be_forgotten_is_refused(own: server.RunningStore) -> None:
    client = client_of(own)
    client.put_object(Bucket="nucleus", Key="x", Body=b"bytes")
    with pytest.raises(ClientError, match="NotImplemented"):
        client.put_object_legal_hold(Bucket="nucleus", Key="x", LegalHold={"Status": "ON"})
    with pytest.raises(ClientError, match="NotImplemented"):
        client.put_object(Bucket="nucleus", Key="x", Body=b"locked", ObjectLockLegalHoldStatus="ON")


def nucleus(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nucleus", *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_an_import_that_does_not_fit(small_disk: Path, tmp_path: Path) -> None:
    running = server.start(small_disk / "store", 0)
    server.make_bucket(running)
    write_generated(tmp_path / "images", 24, side=256)
    settings = server.environment(running)
    done = nucleus("data", "import", tmp_path / "images", "big", **settings)
    assert done.returncode == 1
    for fact in ("Error:", "the store is full", "InsufficientStorage", "MiB are free"):
        assert fact in done.stderr
    assert "Traceback" not in done.stderr
    killed_and_restarted(running)
    assert json.loads(nucleus("data", "list", "--json", **settings).stdout) == []
    models = json.loads(nucleus("models", "list", "--json", **settings).stdout)
    assert [model["from"] for model in models] == ["package"]


def filled(folder: Path) -> None:
    with suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_starting_on_a_full_disk(small_disk: Path) -> None:
    filled(small_disk)
    done = nucleus("store", "start", "--dir", small_disk / "store", "--port", 0)
    assert done.returncode == 1
    for fact in (str(small_disk / "store"), "No space left on device", "0 MiB are free", "--dir"):
        assert fact in done.stderr
    assert server.status(small_disk / "store") is None
    (small_disk / "filling").unlink()
    assert server.start(small_disk / "store", 0)  # nothing that the first attempt left is in the way


def test_starting_where_nothing_can_be_written(small_disk: Path) -> None:
    running = server.start(small_disk / "store", 0)
    server.stop(Path(running.folder))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for folder in ("store", "another"):
        done = nucleus("store", "start", "--dir", small_disk / folder)
        assert done.returncode == 1
        assert "Read-only file system" in done.stderr
        assert str(small_disk / folder) in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_folder_of_another_user(tmp_path: Path) -> None:
    folder = tmp_path / "of root"
    folder.mkdir(mode=0o700)
    (folder / "store.json").write_text("{}")
    code = (
        "import os, sys; from pathlib import Path; from nucleus.storage import local_server as server\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "for act in (server.status, server.stop, lambda folder: server.start(folder, 0)):\n"
        "  try: act(Path(sys.argv[1]))\n"
        "  except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["StoreServerError"] * 3, done
    assert all("Permission denied" in line and str(tmp_path) in line for line in lines)


def test_two_servers_for_one_folder(own: server.RunningStore) -> None:
    (Path(own.folder) / "store.json").unlink()
    with pytest.raises(StoreServerError, match="no other server"):
        server.start(Path(own.folder), 0)
    os.kill(own.pid, signal.SIGKILL)
    server._children[own.pid].wait()
    assert server.start(Path(own.folder), 0)


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_store_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    with pytest.raises(StoreServerError, match=rf"locks at {tmp_path}.*store\.lock; it has none.*--dir"):
        server.start(tmp_path, 0)


def refusing(number: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_the_log_does_not_grow_without_end(tmp_path: Path) -> None:
    log = tmp_path / "store.log"
    code = (
        "import logging, sys; from pathlib import Path; from nucleus.storage import store_process as process\n"
        "process._log_to(Path(sys.argv[1]))\n"
        "for _ in range(5000): logging.getLogger('s3').warning('x' * 1000)"
    )
    subprocess.run([sys.executable, "-c", code, log], check=True)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= 1 << 20
