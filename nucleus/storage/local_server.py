"""Embedded S3 server: a child process (`store_process`) with its data in one folder, reachable on this machine only.

It replaces AWS or MinIO where there is neither. The rest of this project reaches it like any S3 server, through
`AWS_ENDPOINT_URL_S3`.
"""

import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from pydantic import TypeAdapter, ValidationError

from nucleus.errors import OutputError, StoreServerError
from nucleus.lazy import need
from nucleus.storage.claims import file_lock
from nucleus.storage.files import write_atomic, writing
from nucleus.surroundings import check_can_train, loopback_exemption

__all__ = ["RunningStore", "environment", "make_bucket", "served_folder", "start", "status", "stop"]


HOST = "127.0.0.1"
DEFAULT_PORT = 9000
DEFAULT_BUCKET = "nucleus"
_START_SECONDS = 180.0
_STOP_SECONDS = 15.0
_PORT_SECONDS = 3.0
_ASK_SECONDS = 2.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without any http_proxy
_MOVE = "--dir DIR; of nucleus demo, --workdir DIR"
_LOG_FILE = "store.log"
_LOG_BYTES = 1 << 20
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); from nucleus.storage.store_process import serve_store; "
    "serve_store(*sys.argv[2:])"
)
"""Not `python -m`, which would run modules of the folder it starts in."""
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


_RECORD = TypeAdapter(RunningStore)


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
        MissingPackageError: ministack is not installed.
        StoreServerError: ministack is of another version, the port is in use, the folder cannot be
            written, its file system has no locks or no room, or the server does not start.
    """
    check_can_train("the embedded S3 server")
    folder = folder.expanduser().absolute()
    with _explained(), file_lock(folder / "store.lock", _MOVE):
        running = status(folder)
        if running is not None:
            if port not in {None, 0, running.port}:
                raise StoreServerError(
                    f"Expected to start on port {port}; a server for {folder} runs on port {running.port}. "
                    f"Run: nucleus store stop --dir {shlex.quote(str(folder))}"
                )
            return running
        need("ministack")
        return _launch(folder, _choose_port(folder, port))


@contextmanager
def _explained() -> Iterator[None]:
    """Raise `StoreServerError` for a folder that cannot be written or locked."""
    try:
        yield
    except OutputError as error:
        raise StoreServerError(str(error)) from error


def status(folder: Path) -> RunningStore | None:
    """Return the server that runs for `folder`, or None. Raises `StoreServerError` if its record is damaged."""
    record = _record(folder.expanduser().absolute())
    if record is None or _process(record) is None:
        return None
    return record


def stop(folder: Path) -> bool:
    """Stop the server for `folder`, if it was started by `start`. Return whether one was running.

    Raises:
        StoreServerError: The record of the server is damaged, or the server belongs to another user.
    """
    folder = folder.expanduser().absolute()
    record = _record(folder)
    process = _process(record) if record is not None else None
    if process is None:
        return False
    try:
        process.terminate()
        _await_end(process)
    except psutil.AccessDenied as error:
        raise StoreServerError(
            f"Expected a server for {folder} of this user; process {process.pid} belongs to {process.username()}. "
            "Stop it as that user."
        ) from error
    child = _children.pop(process.pid, None)
    if child is not None:
        child.wait()
    return True


def _await_end(process: psutil.Process) -> None:
    try:
        process.wait(_STOP_SECONDS)
    except psutil.TimeoutExpired:
        process.kill()  # data is on disk after each request, so nothing is lost
        process.wait(_STOP_SECONDS)


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
    child = _spawn(folder, port)
    try:
        store = RunningStore(str(folder), port, child.pid, psutil.Process(child.pid).create_time())
        write_atomic(folder / "store.json", json.dumps(asdict(store)), _MOVE)
        _await_answer(child, store)
    except BaseException:  # nobody would know of it
        child.kill()
        child.wait()
        raise
    for ended in [pid for pid, other in _children.items() if other.poll() is not None]:
        del _children[ended]
    _children[child.pid] = child
    return store


def _spawn(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    """Start the process; on its stdout, it says why it cannot serve."""
    log, here = folder / _LOG_FILE, Path(__file__).parents[2]
    with writing(log, _MOVE):
        if log.exists() and log.stat().st_size > _LOG_BYTES:  # what the process itself does not bound
            log.replace(log.with_name(f"{_LOG_FILE}.1"))
        with log.open("ab") as file:
            return subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-c", _PROGRAM, str(here), str(folder), str(log), str(port)],
                cwd=folder,
                env={**os.environ, "TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )


def _await_answer(child: "subprocess.Popen[bytes]", store: RunningStore) -> None:
    """Wait until the server answers. Raises `StoreServerError` if it ends or takes too long."""
    assert child.stdout is not None
    log = Path(store.folder) / _LOG_FILE
    with child.stdout:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if child.poll() is not None:
                problem = child.stdout.read().decode(errors="replace").strip()
                raise StoreServerError(
                    problem or f"Expected the S3 server to start; it ended with status {child.returncode}. See {log}."
                )
            if _answers(store):
                return
            time.sleep(0.1)
    raise StoreServerError(f"Expected the S3 server to answer within {_START_SECONDS:.0f} s; it did not. See {log}.")


def served_folder(endpoint: str) -> Path | None:
    """Return the folder of the embedded server at an endpoint; None if it is another server, or not on this machine."""
    if urlsplit(endpoint).hostname not in {HOST, "localhost"}:
        return None
    try:
        with _DIRECT.open(f"{endpoint.rstrip('/')}/_nucleus", timeout=_ASK_SECONDS) as answer:
            return Path(json.loads(answer.read())["folder"])
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return None


def _answers(store: RunningStore) -> bool:
    try:
        with _DIRECT.open(f"{store.endpoint}/_ministack/health", timeout=_ASK_SECONDS) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _record(folder: Path) -> RunningStore | None:
    path = folder / "store.json"
    try:
        return _RECORD.validate_json(path.read_bytes(), strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise StoreServerError(
            f"Expected {path} to describe a server; it is damaged. Remove this file (the data stays)."
        ) from error
    except OSError as error:
        raise StoreServerError(
            f"Expected to read {path}; found an obstacle: {error.strerror}. Name another folder: {_MOVE}"
        ) from error


def _process(record: RunningStore) -> psutil.Process | None:
    """Return the recorded process if it is still the one that `start` created (process ids are reused)."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.created) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None
