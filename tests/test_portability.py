"""Other operating systems, as far as Linux can tell: what the code uses, and commands run without what they lack.

There is no macOS or Windows here. mypy knows what the standard library has on each; `tests.other_system` runs the
commands of the light install without it.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nucleus.data.images import encode_png
from nucleus.data.synthetic import generated_image
from nucleus.errors import UsageError
from nucleus.predict.image_files import check_stems
from nucleus.registry.publish import publish
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import S3Uri, local_path
from nucleus.surroundings import name_on_disk
from tests.other_system import MISSING, POSIX_MODULES
from tests.predict.test_predict import CONFIG
from tests.small_model import origin, write_untrained

ROOT = Path(__file__).parents[1]
HOMES = {"nucleus/surroundings.py", "nucleus/storage/claims.py"}
"""Where platforms are told apart."""
POSIX_ALONE = {*HOMES, "nucleus/storage/store_process.py"}
"""Files that use what Windows lacks: the embedded server runs on Linux and macOS alone, as `job` does."""
FORBIDDEN = set('<>:"|?*\\')
TRAINING = [
    ["train", "demo"],
    ["sweep", "demo", "--over", "optimizer.epochs=1,2"],
    ["demo"],
    ["submit", "demo"],
    ["jobs", "list"],
    ["store", "start"],
]


def sources() -> list[Path]:
    return sorted((ROOT / "nucleus").rglob("*.py"))


def guarded(tree: ast.Module) -> set[int]:
    """The lines of functions that ask `hasattr` for what they use."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    asking = [node for node in functions if "hasattr(" in ast.unparse(node)]
    return {line for node in asking for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def test_what_platforms_lack_is_used_in_two_modules() -> None:
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text())
        lines = guarded(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and name not in POSIX_ALONE:
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                assert not POSIX_MODULES & set(modules), f"{name} imports {modules}"
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            module, used = node.value.id, node.attr
            if name not in POSIX_ALONE and node.lineno not in lines:
                assert used not in MISSING["win32"].get(module, ()), f"{name}:{node.lineno} uses {module}.{used}"
            if (module, used) in {("sys", "platform"), ("os", "name"), ("platform", "system")}:
                assert name in HOMES, f"{name}:{node.lineno} asks for the platform"


@pytest.fixture
def mypy_folder(tmp_path: Path) -> Path:
    """The cache of mypy, which takes long without one."""
    return tmp_path / "mypy"


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_types_of_other_platforms(platform: str, mypy_folder: Path, tmp_path: Path) -> None:
    """mypy's stubs of the standard library know what each platform has.

    Other packages are left out, since they are the same everywhere and take most of the time; `make check` has them.
    """
    alone = ("--config-file=", "--no-site-packages", "--ignore-missing-imports", "--cache-dir", str(mypy_folder))
    command = [sys.executable, "-m", "mypy", "--platform", platform, *alone, "-p", "nucleus"]
    for package in (
        "job",
        "nucleus",
    ):  # without the folder wandb, which a run writes and mypy would take for the package
        (tmp_path / package).symlink_to(ROOT / package)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "errors in" in done.stdout or "Success" in done.stdout, done.stdout + done.stderr
    lacking = re.compile(r': error: (Module|"type\[).* has no attribute')
    errors = [line for line in done.stdout.splitlines() if lacking.search(line)]
    posix = [line for line in errors if line.startswith(("job/", "nucleus/storage/store_process.py"))]
    assert bool(posix) == (platform == "win32")  # what runs on Linux and macOS alone is found to use what Windows lacks
    assert errors == posix


def test_text_files_have_an_encoding_of_their_own() -> None:
    """Windows would take that of the user's language."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = {keyword.arg for keyword in node.keywords}
                if node.func.attr in {"read_text", "write_text"}:
                    assert "encoding" in named, f"{path}:{node.lineno}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The files of a small network that was not trained."""
    return write_untrained(tmp_path / "files", CONFIG)


def light_steps(dozen: Path) -> list[list[str]]:
    """Commands of the light install, that work everywhere."""
    predicted = ["predict", "images", "--out"]
    return [
        ["models", "list"],
        ["models", "list", "aux"],
        ["models", "show", "aux"],
        ["models", "pull", "aux@1", "pulled"],
        ["models", "pull", "aux@1", "pulled"],
        ["models", "alias", "aux@1", "production"],
        ["models", "alias", "aux@2", "production"],
        ["models", "rollback", "aux", "production"],
        [*predicted, "out", "--model", "pulled"],
        [*predicted, "out", "--model", "pulled", "--overwrite"],
        [*predicted, "out2", "--model", "aux@1", "--channel", "0", "--json"],
        ["data", "import", str(dozen), "con"],
        ["data", "list"],
        ["data", "show", "con", "--out", "examples.png"],
        ["data", "verify", "con"],
        ["evaluate", "pulled", "con", "--gallery", "worst.png"],
        ["evaluate", "pulled", "con", "--json"],
        ["call:locks"],
        ["call:large"],
        ["call:stdout"],
    ]


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_the_light_install_runs(platform: str, bucket: Bucket, model: Path, dozen: Path, tmp_path: Path) -> None:
    registry = Bucket(bucket.uri / "pre:fix" / "nul")
    for run in ("r1", "r2"):
        publish(registry, "aux", model, origin(run))
    (tmp_path / "images" / "s").mkdir(parents=True)
    for number, name in enumerate(("a.png", "s/b.png", "ä µ.png")):
        (tmp_path / "images" / name).write_bytes(encode_png(generated_image(number, 90, 80)[0]))
    steps = light_steps(dozen)
    more = [["doctor"], *(TRAINING if platform == "win32" else [])]
    outcomes = run_on(platform, [*steps, *more], tmp_path, registry.uri)
    assert [each for each in outcomes if each["status"] and each["step"] not in more] == []
    for each in outcomes:
        if each["step"] in TRAINING and platform == "win32":
            assert (each["status"], "Expected Linux, macOS or WSL for" in str(each["output"])) == (2, True), each
    assert len([each for each in outcomes if each["step"][-1] == "--help"]) > 30
    (doctor,) = [each for each in outcomes if each["step"] == ["doctor"]]
    assert "file locks: files in" in doctor["output"], doctor
    assert "Traceback" not in doctor["output"], doctor
    names = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "cache").rglob("*")}
    assert not [name for name in names if FORBIDDEN & set(name) or {"aux", "con", "nul"} & set(name.split("/"))]
    assert any(name.endswith(".tfrecord") for name in names)
    as_here(tmp_path, registry.uri)


def run_on(platform: str, steps: list[list[str]], folder: Path, uri: S3Uri) -> list[dict[str, object]]:
    """Run commands in a folder, as on another platform."""
    file = folder / "steps.json"
    file.write_text(json.dumps({"platform": platform, "steps": steps}))
    environment = {**os.environ, **variables(folder, uri), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-X", "warn_default_encoding", "-m", "tests.other_system", str(file)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nucleus, version")
    return list(json.loads(file.read_text()))


def variables(folder: Path, uri: S3Uri) -> dict[str, str]:
    return {"NUCLEUS_BUCKET": str(uri), "XDG_CACHE_HOME": str(folder / "cache"), "WANDB_MODE": "disabled"}


def as_here(folder: Path, uri: S3Uri) -> None:
    """Compare the results with those of this platform, to the byte."""
    command = [sys.executable, "-m", "nucleus", "predict", "images", "--out", "here", "--model", "pulled"]
    subprocess.run(command, cwd=folder, env={**os.environ, **variables(folder, uri)}, capture_output=True, check=True)
    files = sorted(path.relative_to(folder / "here") for path in (folder / "here").rglob("*") if path.is_file())
    assert len(files) == 8
    assert files == sorted(path.relative_to(folder / "out") for path in (folder / "out").rglob("*") if path.is_file())
    for file in files:
        assert (folder / "out" / file).read_bytes() == (folder / "here" / file).read_bytes(), file


def test_paths_of_keys_are_those_of_every_file_system() -> None:
    for key in ("a:b/c?", "aux/Com1.txt/lpt9 .x", "end./blank /.", "back\\..\\slash", "100%/con", 'q"<>|*', "\x1f"):
        parts = local_path(S3Uri("bucket", key)).parts
        assert len(parts) == 1 + key.count("/") + 1
        for part in parts:
            assert not FORBIDDEN & set(part)
            assert part[-1] not in ". "
            assert part.partition(".")[0].rstrip().lower() not in {"aux", "con", "com1", "lpt9"}
    plain = S3Uri("bucket", "datasets/dsb2018/0123456789ab/common-10.v2")
    assert local_path(plain).as_posix() == f"{plain.bucket}/{plain.key}"
    found = {local_path(S3Uri("b", key)) for key in ("a:b", "a%3Ab", "a%253Ab", "con", "%63on", "x.", "x%2E")}
    assert len(found) == 7  # none takes the place of another


def test_names_that_differ_in_case_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [("s/Ä", "s/Ä.png"), ("s/a\u0308", "s/ä.tif")]
    check_stems(images, name_on_disk)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match="would both write"):
        check_stems(images, name_on_disk)
