"""Ray nodes in processes of their own on this machine, started by the commands that a user types."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

__all__ = ["ray_command", "started_head", "started_node"]

_START_SECONDS = 240


def ray_command(*arguments: object) -> list[str]:
    """`ray ARGUMENTS`, of this installation."""
    return [str(Path(sys.executable).with_name("ray")), *map(str, arguments)]


@contextmanager
def started_head(cpus: int, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Run a cluster of one node; yield the addresses of its head and of its dashboard."""
    head, dashboard, agent = _free_ports(3)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie there, whose names may not be long
    ports = ("--port", head, "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent)
    command = ray_command("start", "--head", "--num-cpus", cpus, *ports, "--temp-dir", folder)
    try:
        with _running(command, environment, folder / "head.log"):
            _wait_for(dashboard, folder / "head.log")
            yield f"127.0.0.1:{head}", f"http://127.0.0.1:{dashboard}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started_node(address: str, cpus: int, environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """Run one more node of a cluster; it is killed when the block ends."""
    with _running(ray_command("start", "--address", address, "--num-cpus", cpus), environment, log):
        yield


@contextmanager
def _running(command: list[str], changes: Mapping[str, str], log: Path) -> Iterator[None]:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **changes}
    with log.open("ab") as file:
        process = subprocess.Popen([*command, "--block"], env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_for(port: int, log: Path) -> None:
    """Wait until a port is listened on."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
