"""Lines that are held back from stderr, by several threads at once; and the settings of Keras."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nucleus.errors import UsageError
from nucleus.lazy import _check_keras_file, stderr_without


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
        began.wait(10)
        with stderr_without(b"none"):
            ended.wait(10)

    first_thread, second_thread = threading.Thread(target=first), threading.Thread(target=second)
    second_thread.start()
    first_thread.start()
    first_thread.join(20)
    second_thread.join(20)
    os.write(2, b"shown\n")
    assert capfd.readouterr().err == "shown\n"


KERAS_JSON = {"floatx": "float64", "epsilon": 1e-3, "backend": "torch", "image_data_format": "channels_first"}
OURS = ["tensorflow", "float32", "channels_last", 1e-7]


def keras_in_a_child(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process whose Keras has other settings than this project needs."""
    (home / "keras.json").write_text(json.dumps(KERAS_JSON))
    variables = {**os.environ, "KERAS_HOME": str(home), "TF_USE_LEGACY_KERAS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("first", ["keras", "tf"])
def test_the_users_settings_of_keras_have_no_effect(first: str, tmp_path: Path) -> None:
    code = (
        "import json, os; from nucleus.lazy import keras, tf; "
        f"{first}.__version__; config = keras.config; "
        "layer = keras.layers.Conv2D(4, 3); layer.build((None, 8, 8, 3)); assert layer.kernel.shape == (3, 3, 3, 4); "
        "assert os.environ['KERAS_BACKEND'] == 'torch'; "
        "print(json.dumps([config.backend(), config.floatx(), config.image_data_format(), config.epsilon()]))"
    )
    done = keras_in_a_child(code, tmp_path, KERAS_BACKEND="torch")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == OURS
    assert json.loads((tmp_path / "keras.json").read_text()) == KERAS_JSON


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
