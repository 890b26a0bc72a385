import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from nucleus.errors import StoreServerError
from nucleus.storage import local_server as server
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri

pytestmark = pytest.mark.server


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    running = server.start(tmp_path / "s", 0)
    server.make_bucket(running)
    for name, value in server.environment(running).items():
        monkeypatch.setenv(name, value)
    yield running
    server.stop(tmp_path / "s")


def test_data_survives_kill_and_restart(own: server.RunningStore) -> None:
    folder = Path(own.folder)
    Bucket(parse_uri("s3://nucleus/a")).put("x", b"kept", if_absent=True)
    os.kill(own.pid, signal.SIGKILL)
    deadline = time.monotonic() + 120  # or it hangs
    while server.status(folder) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.status(folder) is None
    again = server.start(folder)
    assert again.port == own.port  # so that exported variables stay right
    assert again.pid != own.pid
    assert Bucket(parse_uri("s3://nucleus/a")).get("x") == b"kept"
    assert server.stop(folder)
    third = server.start(folder)
    assert Bucket(parse_uri("s3://nucleus/a")).get("x") == b"kept"
    assert third.port == own.port


def test_listens_on_loopback_only(own: server.RunningStore) -> None:
    time.sleep(0.5)
    processes = [psutil.Process(own.pid), *psutil.Process(own.pid).children(recursive=True)]
    listening = [c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening
    assert set(listening) == {"127.0.0.1"}


def test_starting_twice_is_one_server(own: server.RunningStore) -> None:
    assert server.start(Path(own.folder)) == own
    with pytest.raises(StoreServerError, match="store stop --dir"):
        server.start(Path(own.folder), own.port + 1)


def test_taken_port_and_damaged_record(own: server.RunningStore, tmp_path: Path) -> None:
    with pytest.raises(StoreServerError, match=str(own.port)):
        server.start(tmp_path / "other", own.port)
    (tmp_path / "other" / "store.json").write_text("{")
    with pytest.raises(StoreServerError, match=r"store\.json"):
        server.status(tmp_path / "other")


def test_stop_spares_processes_that_it_did_not_start(tmp_path: Path) -> None:
    record = {"folder": str(tmp_path), "port": 1, "pid": os.getpid(), "created": 0.0}
    (tmp_path / "store.json").write_text(json.dumps(record))
    assert server.status(tmp_path) is None
    assert not server.stop(tmp_path)


def test_is_reached_directly_where_there_is_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = server.start(tmp_path, 0)
    try:
        server.make_bucket(running)
        for name, value in server.environment(running).items():
            monkeypatch.setenv(name, value)
        Bucket(parse_uri("s3://nucleus/a")).put("x", b"1")
    finally:
        server.stop(tmp_path)
