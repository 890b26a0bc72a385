import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nucleus.errors import StoreServerError
from nucleus.storage import local_server as server
from nucleus.storage import store_process
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
    deadline = time.monotonic() + 600  # or it hangs
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
    for damaged in (b"{", b"", b"[]", b"\xff", b'{"folder": "x", "port": "9000", "pid": null, "created": 1}', b"null"):
        (tmp_path / "other" / "store.json").write_bytes(damaged)
        for act in (server.status, server.stop, server.start):
            with pytest.raises(StoreServerError, match=r"store\.json.*Remove this file"):
                act(tmp_path / "other")


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


@pytest.mark.parametrize("name", ["blank s", "quote's", 'double"', "$(exit 3)", "a;b", "-dash"])
def test_the_shell_takes_what_it_prints(name: str, tmp_path: Path) -> None:
    """A real `sh` evaluates it: the folder and the exempted hosts keep blanks and quotes."""
    folder = tmp_path / name
    exempted = f"one host, {name},two"
    script = (
        'eval "$("$1" -m nucleus store start --dir "$2" --port 0)" || exit 9; '
        '"$1" -c "import json, os; print(json.dumps(dict(os.environ)))"; "$1" -m nucleus store stop --dir "$2"'
    )
    environment = {**os.environ, "HTTP_PROXY": "http://proxy:3128", "NO_PROXY": exempted}
    environment.pop("no_proxy", None)
    command = ["sh", "-c", script, "sh", sys.executable, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not found" not in done.stderr
    found = json.loads(done.stdout)
    assert found["AWS_ENDPOINT_URL_S3"].startswith("http://127.0.0.1:")
    assert found["NUCLEUS_BUCKET"] == "s3://nucleus"
    hosts = found["NO_PROXY"].split(",")
    assert {"one host", name, "two", "127.0.0.1", "localhost"} <= set(hosts)
    assert found["no_proxy"] == found["NO_PROXY"]


def test_modules_in_the_folder_are_not_run(tmp_path: Path) -> None:
    for name in ("ministack", "nucleus", "json", "hypercorn"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    server.start(tmp_path, 0)
    server.stop(tmp_path)
    assert not (tmp_path / "run").exists()


def test_another_ministack_is_refused() -> None:
    import ministack.services.s3 as known

    store_process._check_ministack(known)
    without = {name: value for name, value in vars(known).items() if name != "_persist_object"}
    for changed in (without, {**without, "_persist_object": known._persist_delete_marker}):
        with pytest.raises(StoreServerError, match=r"pip install ministack==1\.5\.33"):
            store_process._check_ministack(SimpleNamespace(**changed))


def test_what_prevents_the_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import nucleus.storage.store_process as process; process._DIGEST = 'other'; "
    monkeypatch.setattr(server, "_PROGRAM", server._PROGRAM.replace("serve_store(*", f"{program}serve_store(*"))
    with pytest.raises(StoreServerError, match="whose way to store objects is known"):
        server.start(tmp_path, 0)
    monkeypatch.setattr(server, "_PROGRAM", "raise SystemExit('broken')")
    with pytest.raises(StoreServerError, match=r"ended with status 1\. See .*store\.log"):
        server.start(tmp_path, 0)
    assert "broken" in (tmp_path / "store.log").read_text()
    assert server.status(tmp_path) is None


def test_the_folder_that_it_serves(own: server.RunningStore) -> None:
    assert server.served_folder(own.endpoint) == Path(own.folder)
    for elsewhere in ("", "https://s3.example.org", "http://127.0.0.1:1", "http://localhost:1", "127.0.0.1"):
        assert server.served_folder(elsewhere) is None
