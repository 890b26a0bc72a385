"""Embedded S3 server: ministack as a child process, reachable on this machine only, with its data in one folder.

It replaces AWS or MinIO where there is neither. The rest of this project reaches it like any S3 server, through
`AWS_ENDPOINT_URL_S3`.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from nucleus.errors import StoreServerError
from nucleus.storage.files import write_atomic
from nucleus.surroundings import loopback_exemption

__all__ = ["RunningStore", "environment", "make_bucket", "start", "status", "stop"]


HOST = "127.0.0.1"
DEFAULT_PORT = 9000
DEFAULT_BUCKET = "nucleus"
_START_SECONDS = 60.0
_STOP_SECONDS = 15.0
_PORT_SECONDS = 3.0
# The server checks no keys, but the SDKs require some.
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nucleus",
    "AWS_SECRET_ACCESS_KEY": "local-only",
    "AWS_REGION": "us-east-1",
}


# Servers started by this process. They normally outlive it; those that end earlier are reaped through this table.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class RunningStore:
    """A running server.

    Attributes:
        folder: Folder with its data, its log and this record.
        port: Port on 127.0.0.1.
        pid: Process id.
        created: Start time of the process, seconds since the epoch; with `pid` it identifies the process.
    """

    folder: str
    port: int
    pid: int
    created: float

    @property
    def endpoint(self) -> str:
        """URL for AWS_ENDPOINT_URL_S3."""
        return f"http://{HOST}:{self.port}"


def environment(store: RunningStore) -> dict[str, str]:
    """Return the environment variables with which S3 clients reach the server."""
    return {
        "AWS_ENDPOINT_URL_S3": store.endpoint,
        **_CREDENTIALS,
        "NUCLEUS_BUCKET": f"s3://{DEFAULT_BUCKET}",
        **loopback_exemption(),
    }


def make_bucket(store: RunningStore) -> None:
    """Create the bucket that `environment` names, unless it exists."""
    import boto3  # noqa: PLC0415  takes half a second
    from botocore.config import Config  # noqa: PLC0415
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

    client = boto3.client(
        "s3",
        config=Config(proxies={}),
        endpoint_url=store.endpoint,
        aws_access_key_id=_CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=_CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=_CREDENTIALS["AWS_REGION"],
    )
    try:
        if DEFAULT_BUCKET not in {item["Name"] for item in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=DEFAULT_BUCKET)
    except (BotoCoreError, ClientError) as error:
        raise StoreServerError(
            f"Expected to create the bucket {DEFAULT_BUCKET!r} at {store.endpoint}; {error}"
        ) from error


def start(folder: Path, port: int | None = None) -> RunningStore:
    """Start a server for `folder`, or return the one that is running.

    Args:
        folder: Folder of the data, created if it does not exist. Data that earlier servers stored there is kept.
        port: Port on 127.0.0.1; 0 for any free one; None for the last one used with this folder, else 9000.

    Raises:
        StoreServerError: ministack is not installed, the port is in use, or the server does not start.
    """
    folder = folder.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "store.lock"):
        running = status(folder)
        if running is not None:
            if port not in {None, 0, running.port}:
                raise StoreServerError(
                    f"Expected to start on port {port}; a server for {folder} runs on port {running.port}. "
                    f"Run: nucleus store stop --dir {folder}"
                )
            return running
        if importlib.util.find_spec("ministack") is None:
            raise StoreServerError(
                "Expected the package ministack (extra `local`); it is not installed. Run: make install "
                "(or pip install ministack)."
            )
        return _launch(folder, _choose_port(folder, port))


def status(folder: Path) -> RunningStore | None:
    """Return the server that runs for `folder`, or None."""
    record = _record(folder.expanduser().absolute())
    if record is None or _process(record) is None:
        return None
    return record


def stop(folder: Path) -> bool:
    """Stop the server for `folder`, if it was started by `start`. Return whether one was running."""
    folder = folder.expanduser().absolute()
    record = _record(folder)
    process = _process(record) if record is not None else None
    if process is None:
        return False
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except psutil.TimeoutExpired:
        process.kill()  # data is on disk after each request, so nothing is lost
        process.wait(_STOP_SECONDS)
    child = _children.pop(process.pid, None)
    if child is not None:
        child.wait()
    return True


def _choose_port(folder: Path, port: int | None) -> int:
    if port is None:
        record = _record(folder)
        port = record.port if record is not None else DEFAULT_PORT
    deadline = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            return _free_port(port)
        except OSError as error:
            if time.monotonic() > deadline:
                raise StoreServerError(
                    f"Expected port {port} on {HOST} to be free; it is taken ({error.strerror}). "
                    "Run: nucleus store start --port 0 (any free port)."
                ) from error
        time.sleep(0.1)  # a server that was just killed may still hold the port


def _free_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        return int(probe.getsockname()[1])


def _launch(folder: Path, port: int) -> RunningStore:
    # IOT_MTLS_ENABLED: otherwise ministack opens an MQTT listener on every interface (port 8883), despite BIND_HOST.
    settings = {
        "BIND_HOST": HOST,
        "GATEWAY_PORT": str(port),
        "SERVICES": "s3",
        "IOT_MTLS_ENABLED": "0",
        "SFTP_HOST": HOST,
        "PERSIST_STATE": "1",
        "STATE_DIR": str(folder / "state"),
        "S3_PERSIST": "1",
        "S3_DATA_DIR": str(folder / "s3"),
        "TMPDIR": str(folder),
    }
    with (folder / "store.log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "ministack"],
            cwd=folder,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    for ended in [pid for pid, other in _children.items() if other.poll() is not None]:
        del _children[ended]
    _children[child.pid] = child
    store = RunningStore(str(folder), port, child.pid, psutil.Process(child.pid).create_time())
    write_atomic(folder / "store.json", json.dumps(asdict(store)))
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise StoreServerError(
                f"Expected the S3 server to start; it ended with status {child.returncode}. See {folder / 'store.log'}."
            )
        if _answers(store):
            return store
        time.sleep(0.1)
    child.kill()
    raise StoreServerError(
        f"Expected the S3 server to answer within {_START_SECONDS:.0f} s; it did not. See {folder / 'store.log'}."
    )


def _answers(store: RunningStore) -> bool:
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without any http_proxy
        with direct.open(f"{store.endpoint}/_ministack/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _record(folder: Path) -> RunningStore | None:
    try:
        return RunningStore(**json.loads((folder / "store.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise StoreServerError(
            f"Expected {folder / 'store.json'} to describe a server; it is damaged. Remove this file."
        ) from error


def _process(record: RunningStore) -> psutil.Process | None:
    """Return the recorded process if it is still the one that `start` created (process ids are reused)."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.created) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None
