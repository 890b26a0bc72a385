"""`serve_load`: 32 clients of `nucleus serve`, against `nucleus predict FOLDER` on the same images.

Every answer is compared with the image's own: names and areas of its nuclei. REQUESTS says how many there are, IMAGES
names a folder of images in place of generated ones.
"""

import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from tests.benchmarks.measure import report, seconds

_CLIENTS = 32
_REQUESTS = 5_000
_ROUND = 160
"""Requests between two turns of the command."""
_SIDES = (256, 320, 384, 512)
_IMAGES = 40
_TURNS = 3


@dataclass
class _Load:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)
    clock: float = 0.0
    wrong: list[str] = field(default_factory=list)


def serve_load() -> None:
    """Throughput under load against the command's, the 99th percentile of a request, wrong answers, memory."""
    wanted = int(os.environ.get("REQUESTS", _REQUESTS))
    with tempfile.TemporaryDirectory() as name:
        images = _images(Path(name) / "images")
        folder = _copies(images, Path(name) / "folder")
        one = _copies(images[:1], Path(name) / "one", 1)
        load, command, starts = _Load(), [], []
        with _served() as (process, port):
            expected = [_areas(_ask(port, path, f"e{n}")) for n, path in enumerate(images)]
            _round(port, images, expected, _Load(), range(_CLIENTS))
            before = process.memory_info().rss
            for first in range(0, wanted, _ROUND):
                _round(port, images, expected, load, range(first, min(first + _ROUND, wanted)))
                if len(command) < _TURNS:
                    starts.append(seconds(partial(_predict, one, Path(name) / f"s{first}")))
                    command.append(seconds(partial(_predict, folder, Path(name) / f"o{first}")))
            after = process.memory_info().rss
    theirs = _ROUND / (statistics.median(command) - statistics.median(starts))
    ours = len(load.seconds) / load.clock
    report(
        "serve_load",
        ours / theirs,
        requests=len(load.seconds),
        lost_or_mixed_up=len(load.wrong),
        requests_per_second=ours,
        p99_of_mean=float(np.quantile(load.seconds, 0.99)) / statistics.fmean(load.seconds),
        mean_seconds=statistics.fmean(load.seconds),
        memory=after / before,
        mebibytes=after / (1 << 20),
    )


def _images(folder: Path) -> list[Path]:
    """Images of different sizes, as in a folder of a microscope."""
    given = os.environ.get("IMAGES")
    if given:
        return sorted(Path(given).iterdir())[:_IMAGES]
    folder.mkdir()
    for number in range(_IMAGES):
        height, width = _SIDES[number % 4], _SIDES[number // 4 % 4]
        (folder / f"{number:02d}.png").write_bytes(encode_png(generated_image(number, height, width)[0]))
    return sorted(folder.iterdir())


def _copies(images: list[Path], folder: Path, number: int = _ROUND) -> Path:
    folder.mkdir()
    for copy in range(number):
        (folder / f"{copy:04d}.png").write_bytes(images[copy % len(images)].read_bytes())
    return folder


def _predict(folder: Path, out: Path) -> None:
    command = [sys.executable, "-m", "nucleus", "predict", str(folder), "--out", str(out), "--engine", "onnx"]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def _served() -> Iterator[tuple[psutil.Process, int]]:
    command = [sys.executable, "-m", "nucleus", "serve", "--port", "0", "--engine", "onnx"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        port = next(int(found[1]) for line in running.stderr if (found := re.search(r"http://[^:]+:(\d+)", line)))
        threading.Thread(target=running.stderr.read, daemon=True).start()
        try:
            yield psutil.Process(running.pid), port
        finally:
            running.terminate()


def _ask(port: int, image: Path, name: str, connection: http.client.HTTPConnection | None = None) -> dict[str, Any]:
    connection = connection or http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", f"/v1/segment?name={name}.png", image.read_bytes())
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise RuntimeError(content.decode())
    found: dict[str, Any] = json.loads(content)
    return found


def _areas(found: dict[str, Any]) -> list[int]:
    return [row["area"] for row in found["table"]]


def _round(port: int, images: list[Path], expected: list[list[int]], load: _Load, numbers: range) -> None:
    """Send requests by clients that each wait for an answer before they ask again."""
    remaining, last = count(numbers.start), numbers.stop

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while (number := next(remaining)) < last:
            place = number % len(images)
            started = time.perf_counter()
            found = _ask(port, images[place], f"r{number}", connection)
            load.seconds.append(time.perf_counter() - started)
            if {row["image"] for row in found["table"]} - {f"r{number}.png"} or _areas(found) != expected[place]:
                load.wrong.append(images[place].name)

    started = time.perf_counter()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        for future in [pool.submit(client) for _ in range(_CLIENTS)]:
            future.result()
    load.clock += time.perf_counter() - started
