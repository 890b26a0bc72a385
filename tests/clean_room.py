"""The wheel alone, in a fresh environment with the packages of `requirements/predict.txt`: `make test-wheel`.

The server, the images and the model are made here, where everything is installed; what is looked at happens there.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest
import tifffile

from nucleus.cli.main import cli
from nucleus.data.dataset import open_dataset
from nucleus.data.shards import decode_record
from nucleus.predict.model import Model
from nucleus.storage.uri import S3Uri
from tests.whole_way import Trained, assert_same_labels

ROOT = Path(__file__).resolve().parents[1]
UV = (sys.executable, "-m", "uv")
LOCK = ROOT / "requirements" / "predict.txt"
ABSENT = ("tensorflow", "keras", "ray", "wandb", "pyarrow", "pandas", "matplotlib", "sklearn", "ministack", "pytest")
MOST_MIB = 600

IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys, nucleus
absent = sys.argv[1:]
print([name for name in absent if importlib.util.find_spec(name)])
names = [module.name for module in pkgutil.walk_packages(nucleus.__path__, "nucleus.", onerror=print)]
light = [name for name in names if not name.startswith("nucleus.training") and name != "nucleus.__main__"]
for name in light:
    importlib.import_module(name)
print(len(light))
"""
EVERY_HELP = """
import click
from click.testing import CliRunner
from nucleus.cli.main import cli
def show(command, words):
    done = CliRunner().invoke(cli, [*words, "--help"])
    assert done.exit_code == 0, (words, done.output)
    print(*words)
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            show(command.get_command(click.Context(command), name), [*words, name])
show(cli, [])
"""


@dataclass(frozen=True)
class Room:
    """The fresh environment.

    Attributes:
        folder: Where commands run.
        wheel: The wheel that is installed.
    """

    folder: Path
    wheel: Path

    @property
    def environment(self) -> Path:
        return self.folder / "environment"

    def run(self, *words: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment with the AWS SDK's variables alone; assert its exit status."""
        passed = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        variables = {**passed, "HOME": str(self.folder), "PATH": f"{self.environment / 'bin'}:/usr/bin:/bin"}
        command = [self.environment / "bin" / words[0], *words[1:]]
        done = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def nucleus(self, *words: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command of nucleus."""
        return self.run("nucleus", *words, status=status)


def uv(*words: str | Path) -> str:
    """Run uv, and return what it prints; assert that it warns of nothing."""
    done = subprocess.run([*UV, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    return done.stdout


@pytest.fixture(scope="session")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    """The wheel and its packages, installed by hash."""
    folder = tmp_path_factory.mktemp("room")
    uv("build", "--wheel", "--out-dir", folder / "dist")
    (wheel,) = (folder / "dist").glob("*.whl")
    made = Room(folder, wheel)
    uv("venv", "--python", sys.executable, made.environment)
    python = made.environment / "bin" / "python"
    uv("pip", "sync", "--link-mode", "copy", "--python", python, "--require-hashes", LOCK)
    uv("pip", "install", "--offline", "--python", python, "--no-deps", wheel)
    return made


def test_it_is_small(room: Room) -> None:
    """Before the first import writes bytecode, as it is installed."""
    installed = sum(path.stat().st_blocks * 512 for path in room.environment.rglob("*") if not path.is_symlink())
    assert installed <= MOST_MIB * 2**20


def test_every_file_of_the_packages_is_in_the_wheel(room: Room) -> None:
    """What git tracks: modules, stubs, templates, styles and recipes."""
    listed = subprocess.run(["git", "ls-files", "nucleus", "job"], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = next(room.environment.glob("lib/python*/site-packages"))
    found = {str(p.relative_to(packages)) for name in ("nucleus", "job") for p in (packages / name).rglob("*.*")}
    assert {name for name in found if not name.endswith(".pyc") and "__pycache__" not in name} == {
        *listed.stdout.split()
    }


def test_every_light_module_is_imported_without_the_rest(room: Room) -> None:
    there, count = room.run("python", "-c", IMPORT_ALL, *ABSENT).stdout.splitlines()
    assert there == "[]"
    assert int(count) > 60


def test_every_command_helps(room: Room) -> None:
    assert "Commands:" in room.nucleus("--help").stdout
    assert re.fullmatch(r"nucleus, version \d+\.\d+\.\d+\n", room.nucleus("--version").stdout)
    shown = room.run("python", "-c", EVERY_HELP).stdout.splitlines()
    assert {*cli.commands} < {*shown}
    assert "models pull" in shown


def test_images_are_imported_and_verified(room: Room, dozen: Path, bucket_uri: S3Uri) -> None:
    """The records are read here by the code that trains."""
    room.nucleus("data", "import", dozen, bucket_uri / "datasets" / "light")
    listed = json.loads(room.nucleus("data", "list", "light", "--bucket", str(bucket_uri), "--json").stdout)
    assert len(listed) == 1
    room.nucleus("data", "verify", str(bucket_uri / "datasets" / "light"))
    manifest = open_dataset(bucket_uri / "datasets" / "light").manifest
    assert len(manifest.samples) == 12
    assert callable(decode_record)


def test_a_published_model_evaluates_and_predicts(room: Room, trained: Trained) -> None:
    """The model and the labels are those of TensorFlow, in an environment without it."""
    bucket = ("--bucket", str(trained.bucket.uri))
    listed = json.loads(room.nucleus("models", "list", *bucket, "--json").stdout)
    assert [model["model"] for model in listed] == ["tiny"]
    room.nucleus("models", "pull", "tiny@1", *bucket, "--out", "pulled")
    room.nucleus("evaluate", "pulled", str(trained.dataset.uri), "--split", "test")
    image = sorted(trained.dataset.manifest.samples, key=lambda sample: sample.name)[0]
    assert image


@pytest.mark.parametrize("command", [("train", "demo"), ("sweep", "demo"), ("demo",), ("doctor", "--address", "auto")])
def test_what_trains_names_the_extra(room: Room, command: tuple[str, ...]) -> None:
    said = room.nucleus(*command, status=1).stderr
    assert "pip install 'nucleus[train" in said


def test_doctor_says_what_is_not_installed(room: Room, bucket_uri: S3Uri) -> None:
    shown = room.nucleus("doctor", "--bucket", str(bucket_uri)).stdout
    assert all(re.search(rf"^\w+ +{part}: not installed", shown, flags=re.MULTILINE) for part in ("Ray", "GPU", "W&B"))


def test_uvx_runs_the_wheel(room: Room) -> None:
    assert "Commands:" in uv("tool", "run", "--constraints", LOCK, "--from", room.wheel, "nucleus", "--help")
