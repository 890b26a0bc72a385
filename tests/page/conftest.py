"""Fixtures of the page: a service in a process of its own, and images."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image

__all__ = ["RunningPage", "running_page"]


@dataclass(frozen=True)
class RunningPage:
    """A service with the page.

    Attributes:
        address: Its address.
        process: Its process.
    """

    address: str
    process: "subprocess.Popen[str]"


@contextmanager
def running_page(*options: str, environment: Mapping[str, str] | None = None) -> Iterator[RunningPage]:
    """Run `nucleus serve` while the block runs."""
    command = [sys.executable, "-m", "nucleus", "serve", *(() if "--port" in options else ("--port", "0")), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(environment or os.environ)) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                found = re.search(r"http://[\w.:]+", line)
                if found:
                    yield RunningPage(found[0], process)
                    break
            else:
                pytest.fail("".join(lines))
        finally:
            process.kill()


@pytest.fixture(scope="session")
def page_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with about twenty nuclei."""
    path = tmp_path_factory.mktemp("image") / "cells one.png"
    path.write_bytes(encode_png(generated_image(0, 192, 256)[0]))
    return path
