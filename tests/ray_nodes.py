"""Ray nodes in processes of their own on this machine, started by the commands that a user types."""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

__all__ = ["free_ports", "ray_command", "started_head", "started_node"]

_START_SECONDS = 600
_PORTS = range(20_000, 24_700)  # above those of Ray's workers, below those of tests/training/test_workers.py


def ray_command(*arguments: object) -> list[str]:
    """`ray ARGUMENTS`, of this installation."""
    return [str(Path(sys.executable).with_name("ray")), *map(str, arguments)]


@contextmanager
def started_head(cpus: int, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Run a cluster of one node; yield the addresses of its head and of its dashboard."""
    head, dashboard, agent = free_ports(3)
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


def free_ports(count: int) -> list[int]:
    """Ports that are free, and below those that the system gives to whoever wants any before they are listened on."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def _wait_for(port: int, log: Path) -> None:
    """Wait until a port is listened on."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
