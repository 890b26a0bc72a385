"""The dependencies of the light install: wheels for every platform and Python that the README lists.

Only Linux on x86-64 is run here. For the others, uv resolves the dependencies as it would on them, from wheels alone.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin", "x86_64-pc-windows-msvc")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACOS = "14.0"
"""The oldest macOS for which ONNX Runtime has wheels."""
NO_INDEX = ("error sending request", "failed to fetch", "dns error", "network connectivity is disabled")
"""What uv says, in small letters, where no package index can be reached."""


@pytest.fixture(scope="module")
def resolve() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Resolve the dependencies for a platform and a Python, from wheels alone, by the package index."""
    return _resolved


def _resolved(platform: str, python: str, *extras: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"),
        *(f"--extra={extra}" for extra in extras),
        *("--only-binary", ":all:", "--python-platform", platform, "--python-version", python, "pyproject.toml"),
    ]
    environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": MACOS}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_light_install_has_wheels(
    platform: str, python: str, resolve: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = resolve(platform, python)
    if any(text in done.stderr.lower() for text in NO_INDEX):
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    names = {line.partition("==")[0] for line in done.stdout.splitlines()}
    assert {"numpy", "onnxruntime", "opencv-python-headless", "scikit-image"} <= names
    assert not {"keras", "pandas", "pyarrow", "ray", "tensorflow", "tensorflow-cpu", "wandb"} & names


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_small_extras_have_wheels(platform: str, resolve: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """On the newest Python, where wheels come last."""
    done = resolve(platform, PYTHONS[-1], "formats", "serve", "slides", "table")
    if any(text in done.stderr.lower() for text in NO_INDEX):
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    names = {line.partition("==")[0] for line in done.stdout.splitlines()}
    assert {"zarr", "fastapi", "openslide-bin", "pandas"} <= names
