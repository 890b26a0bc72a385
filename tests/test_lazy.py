"""Lines held back from stderr, by several threads at once; settings of Keras; packages that the light install lacks."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nucleus.errors import UsageError
from nucleus.lazy import _check_keras_file, pip_install, stderr_without

ROOT = Path(__file__).parents[1]


def test_lines_that_match_are_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    with stderr_without(b"^remark") as real:
        os.write(2, b"remark\nkept\n")
        os.write(real, b"at once\n")
    assert capfd.readouterr().err == "at once\nkept\n"


def test_stderr_is_back_after_several_threads_held_it(capfd: pytest.CaptureFixture[str]) -> None:
    """The first to begin ends first, which would leave the file of the second in the place of stderr."""
    began, ended = threading.Event(), threading.Event()

    def first() -> None:
        with stderr_without(b"none"):
            began.set()
            second_thread.join(0.2)  # it waits for this one
        ended.set()

    def second() -> None:
        began.wait(600)
        with stderr_without(b"none"):
            ended.wait(600)

    first_thread, second_thread = threading.Thread(target=first), threading.Thread(target=second)
    second_thread.start()
    first_thread.start()
    first_thread.join(600)
    second_thread.join(600)
    os.write(2, b"shown\n")
    assert capfd.readouterr().err == "shown\n"


KERAS_JSON = {"floatx": "float64", "epsilon": 1e-3, "backend": "torch", "image_data_format": "channels_first"}
ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
OURS = ["tensorflow", "float32", "channels_last", 1e-7]


def keras_in_a_child(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process whose Keras has other settings than this project needs."""
    (home / "keras.json").write_text(json.dumps(KERAS_JSON))
    variables = {**os.environ, "KERAS_HOME": str(home), "TF_USE_LEGACY_KERAS": "1"}
    variables.pop(ONEDNN, None)  # this process has it from our own import
    variables |= environment
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "chosen", "onednn"), [("keras", {}, "1"), ("tf", {ONEDNN: "0"}, "0")])
def test_the_users_settings_of_keras_have_no_effect(
    first: str, chosen: dict[str, str], onednn: str, tmp_path: Path
) -> None:
    """TensorFlow's oneDNN is on unless the user turns it off."""
    code = (
        "import json, os; from nucleus.lazy import keras, tf; "
        f"{first}.__version__; config = keras.config; "
        "layer = keras.layers.Conv2D(4, 3); layer.build((None, 8, 8, 3)); assert layer.kernel.shape == (3, 3, 3, 4); "
        f"assert os.environ['KERAS_BACKEND'] == 'torch'; assert os.environ['{ONEDNN}'] == '{onednn}'; "
        "print(json.dumps([config.backend(), config.floatx(), config.image_data_format(), config.epsilon()]))"
    )
    done = keras_in_a_child(code, tmp_path, KERAS_BACKEND="torch", **chosen)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == OURS
    assert json.loads((tmp_path / "keras.json").read_text()) == KERAS_JSON


@pytest.mark.slow
def test_a_keras_that_the_caller_imported_otherwise_is_refused(tmp_path: Path) -> None:
    code = (
        "import keras; from nucleus import lazy\nkeras.config.backend = lambda: 'torch'\n"
        "try:\n    lazy.keras.layers\nexcept lazy.UsageError as error:\n    print(error)"
    )
    done = keras_in_a_child(code, tmp_path, KERAS_BACKEND="tensorflow")
    assert done.returncode == 0, done.stderr
    for word in ("'torch'", "KERAS_BACKEND=tensorflow", "float64", "channels_first"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("settings", "word"), [({"floatx": "float12"}, "float12"), ({"epsilon": 1}, "epsilon"), ([1], "a JSON object")]
)
def test_settings_that_keras_cannot_read_are_named(
    settings: object, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=word) as caught:
        _check_keras_file()
    assert str(tmp_path / "keras.json") in str(caught.value)


@pytest.mark.parametrize("content", ["{", json.dumps(KERAS_JSON), "{}"])
def test_settings_that_keras_can_read_are_accepted(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    _check_keras_file()
    (tmp_path / "keras.json").write_text(content)
    _check_keras_file()


HIDDEN = ("tensorflow", "keras", "ray", "wandb", "pyarrow", "pandas", "matplotlib", "sklearn", "tf2onnx", "ministack",
          "requests", "zarr", "yaozarrs", "openslide", "fastapi", "starlette", "uvicorn", "prometheus_client",
          "python_multipart")  # fmt: skip
HIDE = f"""
import importlib.abc, importlib.util, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] in {HIDDEN} else found(name, *more)
"""
"""Makes the packages that the light install lacks unknown to a process."""


def in_the_light_install(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDE + code], capture_output=True, text=True, check=False)


def test_light_modules_import_nothing_that_the_light_install_lacks() -> None:
    """Each module of `nucleus` but those of `nucleus.training`, and each command."""
    files = [path.relative_to(ROOT) for path in (ROOT / "nucleus").rglob("*.py") if path.stem not in {"__main__"}]
    names = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    light = sorted(name for name in names if not name.startswith("nucleus.training"))
    done = in_the_light_install(f"import importlib, job\nfor name in {light}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "extras"),
    [
        (["train", "demo"], "train"),
        (["sweep", "demo", "--over", "seed=1,2"], "train"),
        (["submit", "demo"], "train"),
        (["jobs", "list"], "train"),
        (["predict", "s3://bucket/images", "--model", "cells", "--out", "s3://bucket/results"], "train"),
        (["evaluate", "cells", "cells", "--workers", "2"], "train"),
        (["demo"], "local,train"),
        (["store", "start"], "local"),
        (["serve"], "serve"),
    ],
)  # fmt: skip
def test_a_command_names_the_extra_that_it_needs(command: list[str], extras: str, tmp_path: Path) -> None:
    code = f"import os; os.chdir({str(tmp_path)!r}); sys.argv[1:] = {command}; "
    code += "from nucleus.cli.main import main; main()"
    done = in_the_light_install(code)
    assert f"pip install 'nucleus[{extras}]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_the_command_installs_into_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pip in it, a pip elsewhere would take the name of this project for another one."""
    for pip, program in ((None, "uv pip"), (sys, "pip")):
        monkeypatch.setitem(sys.modules, "pip", pip)
        assert pip_install(extras=["train", "local"]) == f"{program} install 'nucleus[train,local]'"
        assert pip_install("anndata") == f"{program} install anndata"


def test_doctor_asks_the_light_install_for_no_bucket() -> None:
    code = (
        "import os\nos.environ.pop('NUCLEUS_BUCKET', None)\nfrom nucleus.doctor import check_packages, check_storage\n"
        "print(check_packages().state)\nfor each in check_storage(): print(each.state, each.found)"
    )
    done = in_the_light_install(code)
    assert done.returncode == 0, done.stderr
    first, bucket, *others = done.stdout.splitlines()
    assert first == "ok"
    assert "export NUCLEUS_BUCKET=s3://BUCKET" in bucket
    assert {line.partition(" ")[0] for line in (bucket, *others)} == {"skipped"}


def test_the_api_names_the_extra_that_it_needs() -> None:
    code = (
        "import nucleus, job\nfrom nucleus.errors import MissingPackageError\n"
        "for use in (lambda: nucleus.train('demo'), lambda: nucleus.lazy.tf.add, lambda: nucleus.lazy.pandas.DataFrame,"
        " lambda: job.map_on_cluster, lambda: nucleus.report.draw_curves([])):\n"
        "    try: use()\n    except MissingPackageError as error: print(error)"
    )
    done = in_the_light_install(code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert "nucleus[table]" in done.stdout
