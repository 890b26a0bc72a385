"""The wheel alone, in a fresh environment with the packages of `requirements/predict.txt`: `make test-wheel`.

The server, the images and the model are made here, where everything is installed; what is looked at happens there.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit
from urllib.request import urlopen

import pytest
import tifffile

import nucleus
from nucleus.cli.main import cli
from nucleus.data.dataset import DatasetLocation, open_dataset
from nucleus.data.importing import SplitOptions, import_dataset
from nucleus.storage.uri import S3Uri
from tests.whole_way import Trained, assert_same_labels, assert_same_scores

ROOT = Path(__file__).resolve().parents[1]
UV = (sys.executable, "-m", "uv")
LOCK = ROOT / "requirements" / "predict.txt"
ABSENT = (
    "tensorflow",
    "keras",
    "ray",
    "wandb",
    "pyarrow",
    "pandas",
    "matplotlib",
    "sklearn",
    "ministack",
    "pytest",
    "zarr",
)
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

    def run(self, *words: str | Path, status: int = 0, bucket: S3Uri | str = "") -> subprocess.CompletedProcess[str]:
        """Run a program of the environment with the AWS SDK's variables alone; assert its exit status."""
        passed = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        variables = {**passed, "HOME": str(self.folder), "NUCLEUS_BUCKET": str(bucket), "PATH": "/usr/bin:/bin"}
        command = [self.environment / "bin" / words[0], *words[1:]]
        done = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done


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
    """Comes first, before imports write bytecode."""
    installed = sum(path.lstat().st_size for path in room.environment.rglob("*"))
    assert installed <= MOST_MIB * 2**20


def test_every_file_of_the_packages_is_in_the_wheel(room: Room) -> None:
    """What git tracks: modules, stubs, templates, styles and recipes."""
    listed = subprocess.run(["git", "ls-files", "nucleus", "job"], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(room.wheel) as wheel:
        packed = {name for name in wheel.namelist() if not name.endswith("/") and ".dist-info/" not in name}
    assert packed == {*listed.stdout.split()}


def test_every_light_module_is_imported_without_the_rest(room: Room) -> None:
    there, count = room.run("python", "-c", IMPORT_ALL, *ABSENT).stdout.splitlines()
    assert there == "[]"
    assert int(count) > 60


def test_every_command_helps(room: Room) -> None:
    assert "Commands:" in room.run("nucleus", "--help").stdout
    assert re.fullmatch(r"nucleus, version \d+\.\d+\.\d+\n", room.run("nucleus", "--version").stdout)
    shown = room.run("python", "-c", EVERY_HELP).stdout.splitlines()
    assert {*cli.commands, "models pull"} <= {*shown}


def test_images_are_imported_and_verified(room: Room, dozen: Path, bucket_uri: S3Uri) -> None:
    """What is written is the same as here, where the code that trains reads it."""
    theirs, ours = bucket_uri / "datasets" / "light", bucket_uri / "datasets" / "whole"
    room.run("nucleus", "data", "import", dozen, str(theirs))
    shown = room.run("nucleus", "data", "list", "--json", bucket=bucket_uri).stdout
    assert [dataset["name"] for dataset in json.loads(shown)] == ["light"]
    room.run("nucleus", "data", "verify", str(theirs))
    found = open_dataset(DatasetLocation(theirs, "latest")).manifest
    expected = import_dataset(dozen, ours, SplitOptions()).dataset.manifest
    assert found.samples == expected.samples
    assert [shard.sha256 for shard in found.shards] == [shard.sha256 for shard in expected.shards]


def test_the_model_that_comes_along_needs_no_bucket(room: Room, dozen: Path) -> None:
    """As the README's first screen says, and with Python; no variable names a server, and no cache is filled."""
    image = sorted(dozen.glob("*/images/*.png"))[0]
    done = room.run("nucleus", "predict", image, "--out", "along", "--json")
    answer = json.loads(done.stdout)
    assert answer["model"].startswith("nuclei@")
    endings = ("labels.tif", "overlay.png")
    assert {path.name for path in (room.folder / "along").iterdir()} == {
        *(f"{image.stem}.{ending}" for ending in endings), "images.csv", "nuclei.csv"
    }  # fmt: skip
    found = room.run("python", "-c", f"import nucleus; print(nucleus.load().segment({str(image)!r}).count)").stdout
    assert int(found) == answer["nuclei"][image.name]
    assert room.run("nucleus", "models", "show", "nuclei").stdout.startswith("# nuclei\n")


def test_a_published_model_evaluates_as_where_it_was_trained(room: Room, trained: Trained) -> None:
    words = ("evaluate", "tiny@1", str(trained.dataset.uri), "--json")
    shown = room.run("nucleus", *words, bucket=trained.bucket.uri).stdout
    assert_same_scores(json.loads(shown)["overall"], trained.manifest.origin.metrics["test"])


def test_a_pulled_model_predicts_the_labels_of_tensorflow(room: Room, trained: Trained, dozen: Path) -> None:
    listed = json.loads(room.run("nucleus", "models", "list", "--json", bucket=trained.bucket.uri).stdout)
    assert "tiny" in {each["model"] for each in listed}  # other tests publish too
    room.run("nucleus", "models", "pull", "tiny@1", "pulled", bucket=trained.bucket.uri)
    images = sorted(dozen.glob("*/images/*.png"))[:3]
    room.run("nucleus", "predict", *images, "--model", "./pulled", "--out", "found")
    model = nucleus.load(trained.folder, engine="tensorflow")
    for image in images:
        labels = tifffile.imread(room.folder / "found" / f"{image.stem}.labels.tif")
        assert_same_labels(labels, model.segment(image).labels)


@pytest.mark.parametrize("command", ["train demo", "sweep demo --over optimizer.epochs=1,2", "submit demo", "demo"])
def test_what_trains_names_the_extra(room: Room, bucket_uri: S3Uri, command: str) -> None:
    said = room.run("nucleus", *command.split(), status=1, bucket=bucket_uri).stderr
    assert re.search(r"pip install 'nucleus\[(train|local|train,local|local,train)\]'", said)


def test_the_page_is_served_from_the_wheel(room: Room) -> None:
    """The lock has the extra `serve`; each file that a file of the page names is there."""
    command = [room.environment / "bin" / "nucleus", "serve", "--port", "0"]
    variables = {"HOME": str(room.folder), "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(command, cwd=room.folder, env=variables, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = next(found[0] for line in process.stderr if (found := re.search(r"http://[\w.:]+", line)))
            asked, seen = ["/"], set()
            while asked:
                with urlopen(address + asked.pop()) as answer:
                    seen.add(urlsplit(answer.url).path)
                    text = answer.read().decode()
                named = re.findall(r"""["'](\.{0,2}/[\w/.-]+\.(?:css|js|svg))["']""", text)
                asked += {urlsplit(urljoin(answer.url, name)).path for name in named} - seen - {*asked}
        finally:
            process.kill()
    static = ROOT / "nucleus" / "page" / "static"
    kept = {
        f"/static/page/{path.relative_to(static)}"
        for path in static.rglob("*")
        if path.suffix in {".js", ".css", ".svg"}
    }
    assert seen == {"/", *kept}


def test_doctor_says_what_is_not_installed(room: Room, bucket_uri: S3Uri) -> None:
    shown = room.run("nucleus", "doctor", bucket=bucket_uri).stdout
    rows = {row.split(":")[0].split(maxsplit=1)[1] for row in shown.splitlines() if ": not installed" in row}
    assert rows >= {"Ray", "GPU", "W&B"}


def test_uvx_runs_the_wheel(room: Room) -> None:
    assert "Commands:" in uv("tool", "run", "--constraints", LOCK, "--from", room.wheel, "nucleus", "--help")
