"""The process: it refuses wrong settings before it listens, and finishes what runs when it is told to end."""

import contextlib
import http.client
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from nucleus.cli.main import cli
from nucleus.data.synthetic import generated_image
from nucleus.errors import UsageError
from nucleus.serve.server import bound_socket
from nucleus.serve.service import ServeSettings, Token

SECONDS = 600


@contextmanager
def serving(*options: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """The command in a process of its own; its process and port."""
    command = [sys.executable, "-m", "nucleus", "serve", "--port", "0", "--engine", "onnx", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r" on http://127\.0\.0\.1:(\d+)\b", line):
                break
        assert found, "".join(lines)
        try:
            yield process, int(found[1])
        finally:
            process.kill()


def status_of(port: int, path: str) -> int:
    """The status of an address; 0 if nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except ConnectionError:
        return 0
    finally:
        connection.close()


@pytest.mark.slow
def test_sigterm_finishes_what_runs(tmp_path: Path) -> None:
    """`/readyz` is red or gone while a request is computed; it is answered, and the exit status is 0."""
    image = tmp_path / "large.tif"
    tifffile.imwrite(image, np.tile(generated_image(0, 512, 512)[0], (5, 5, 1)))
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    answers: list[int] = []

    def ask(port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/segment", image.read_bytes(), {"Authorization": "Bearer 0123456789abcdef"})
            answer = connection.getresponse()
            answer.read()
            answers.append(answer.status)

    with serving("--token-file", str(token), "--max-seconds", "3600") as (process, port):  # on a busy machine
        arguments = Path(f"/proc/{process.pid}/cmdline")
        assert not arguments.exists() or b"0123456789abcdef" not in arguments.read_bytes()
        assert (status_of(port, "/readyz"), status_of(port, "/v1/models")) == (200, 401)
        asking = threading.Thread(target=ask, args=(port,))
        asking.start()
        while "nucleus_requests_at_once 1.0" not in metrics(port):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        while (ready := status_of(port, "/readyz")) == 200:
            time.sleep(0.02)
        assert ready in {503, 0}
        assert answers == []
        asking.join()
        assert answers == [200]
        assert process.wait(SECONDS) == 0
        assert process.stderr is not None
        log = process.stderr.read()
    assert "POST /v1/segment 200" in log
    assert "0123456789abcdef" not in log


def metrics(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request("GET", "/metrics", headers={"Authorization": "Bearer 0123456789abcdef"})
    with contextlib.closing(connection):
        return connection.getresponse().read().decode()


def test_a_refused_upload_hears_why() -> None:
    """A client that sends its whole body before it reads finds the answer, not a broken connection."""
    with serving("--max-bytes", "1000000") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        connection.request("POST", "/v1/segment", bytes(8_000_000))
        answer = connection.getresponse()
        assert (answer.status, b"--max-bytes" in answer.read()) == (413, True)
        assert status_of(port, "/healthz") == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--host", "0.0.0.0"), "--token-file"),
        (("--token-file", "nowhere"), "openssl"),
        (("--images", "folder"), "s3://"),
        (("--ray", "--corrections", "folder"), "--corrections is for the page"),
        (("--max-seconds", "nan"), "finite"),
        (("--model", "nowhere/at-all"), "models pull"),
    ],
)
def test_wrong_settings_are_refused(options: tuple[str, ...], word: str) -> None:
    done = CliRunner().invoke(cli, ["serve", *options])
    assert done.exit_code == 2, done.output
    assert word in done.output


def test_a_name_that_cannot_be_one() -> None:
    with pytest.raises(UsageError, match="--host takes an address"):
        bound_socket(ServeSettings(host="a..b", token=Token.of("0123456789abcdef")))


def test_a_malformed_bucket_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrections would go into a folder without a word."""
    monkeypatch.setenv("NUCLEUS_BUCKET", "bucket")
    done = CliRunner().invoke(cli, ["serve"])
    assert (done.exit_code, "s3://" in done.output) == (2, True), done.output


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr("nucleus.serve.find_served", lambda *_, **__: pytest.fail("it loads the model first"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = CliRunner().invoke(cli, ["serve", "--port", str(taken.getsockname()[1])])
    assert (done.exit_code, "--port 0" in done.output) == (2, True)
