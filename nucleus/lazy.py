"""Lazy imports of heavy libraries: imported at first use, without the log messages of their native code.

The light install lacks those that only training needs. Whoever uses one then gets a `MissingPackageError` that names
the extra to install.

TensorFlow takes seconds to import, and most commands do not need it. A module that does has
`from nucleus.lazy import tf` at its top; TensorFlow is imported when the module first uses an attribute. scikit-image
and SciPy are here because each worker of a run would import them before its first step, and needs them later. With
`from __future__ import annotations` its types can be used in annotations.
"""

import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nucleus.errors import MissingPackageError, UsageError
from nucleus.surroundings import provide_folders

if TYPE_CHECKING:
    import fastapi
    import keras
    import pandas
    import prometheus_client
    import pyarrow as pa
    import pyarrow.csv as pacsv
    import pyarrow.dataset as pads
    import pyarrow.parquet as pq
    import skimage
    import tensorflow as tf
    import uvicorn
    import wandb
    import zarr
    from scipy import ndimage

    anndata: Any  # in no extra, and not in the environment for development

__all__ = [
    "SERVING",
    "TRAINING",
    "anndata",
    "fastapi",
    "keras",
    "missing_package",
    "missing_packages",
    "ndimage",
    "need",
    "pa",
    "pacsv",
    "pads",
    "pandas",
    "pip_install",
    "pq",
    "prometheus_client",
    "skimage",
    "stderr_without",
    "tf",
    "uvicorn",
    "wandb",
    "zarr",
]

TRAINING = ("tensorflow", "keras", "ray", "wandb")
"""What the package `job` needs; all are in the extras `train` and `train-gpu`."""
SERVING = ("fastapi", "prometheus_client", "python_multipart", "uvicorn")
"""What `nucleus serve` needs; all are in the extra `serve`."""
_EXTRAS = {
    **dict.fromkeys((*TRAINING, "matplotlib", "pyarrow", "tf2onnx"), "train"),
    "ministack": "local",
    "pandas": "table",
    **dict.fromkeys(("yaozarrs", "zarr"), "formats"),
    "openslide": "slides",
    **dict.fromkeys(SERVING, "serve"),
}
"""Packages that the light install lacks, and the extra of `pyproject.toml` that has them; others come by themselves."""
_NO_TENSORFLOW_FROM = (3, 14)

_REMARKS = rb"^(WARNING: All log messages before absl|[IW]0000 |To enable the following instructions)"

_KERAS, _BACKEND, _FLOATX, _EPSILON, _FORMAT = "keras", "tensorflow", "float32", 1e-7, "channels_last"
"""Name of Keras, and the settings that this project needs."""
_KERAS_VARIABLES = (
    "KERAS_BACKEND",
    "KERAS_MAX_EPOCHS",
    "KERAS_MAX_STEPS_PER_EPOCH",
    "KERAS_NNX_ENABLED",
    "TF_USE_LEGACY_KERAS",
)
"""Environment variables that change what Keras and TensorFlow do when they are imported."""
_ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
"""Whether TensorFlow computes by oneDNN. Its own default is yes only on CPUs with AVX512-VNNI; a training step takes
.6 of the time with it on others too (docs/performance.md)."""
_KERAS_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "floatx": (lambda value: value in ("float16", "float32", "float64"), "'float32'"),
    "epsilon": (lambda value: isinstance(value, float), "a number such as 1e-07"),
    "image_data_format": (lambda value: value in ("channels_last", "channels_first"), "'channels_last'"),
    "(the whole)": (lambda _: False, "a JSON object"),
}
"""Keys of `keras.json` whose values are checked when Keras is imported: the check, and what is expected."""
_redirecting = threading.RLock()
"""Held while stderr is held back: two threads at once would put it back in the wrong order, and lose what follows."""


class _LazyModule:
    """A module that is imported when one of its attributes is first used."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._ready = False

    def __getattr__(self, attribute: str) -> Any:
        if not self._ready:
            if self._name not in sys.modules:
                _import_quietly(self._name)
            if self._name == _KERAS:
                _check_keras(importlib.import_module(_KERAS))
            self._ready = True
        return getattr(importlib.import_module(self._name), attribute)  # waits for another thread's import


def _import_quietly(name: str) -> None:
    """Import a module, and hide TensorFlow's usual log messages among its output to stderr."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    provide_folders()
    try:
        with stderr_without(_REMARKS):
            if name in {_KERAS, "tensorflow"}:  # TensorFlow imports Keras
                _import_keras(name)
            else:
                importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from error


def missing_packages(names: Sequence[str] = TRAINING) -> list[str]:
    """Return those of these packages that are not installed; none of them is imported."""
    return [name for name in names if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return sys.modules.get(name) is not None or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a finder refuses it, or it is barred in `sys.modules`
        return False


def pip_install(*wanted: str, extras: Iterable[str] = ()) -> str:
    """Return the command that adds packages, or extras of this project, to this environment.

    An environment of uv, as `make install` makes it, has no pip: another one on PATH would install elsewhere, and there
    the name of this project, which is not installed, would mean another one of the package index.
    """
    program = "pip" if _is_installed("pip") else "uv pip"
    project = f"'nucleus[{','.join(extras)}]'" if extras else ""
    return " ".join(filter(None, [program, "install", project, *wanted]))


def need(*names: str) -> None:
    """Raise `MissingPackageError` if one of these packages is not installed; none of them is imported."""
    missing = missing_packages(names)
    if missing:
        raise _missing(missing)


def missing_package(error: BaseException) -> MissingPackageError | None:
    """Return the error that says which extra to install, for the failed import of a package that an extra has."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return _missing([name]) if name in _EXTRAS else None


def _missing(names: Sequence[str]) -> MissingPackageError:
    extras = dict.fromkeys(_EXTRAS[name] for name in names if name in _EXTRAS)
    command = pip_install(*(name for name in names if name not in _EXTRAS), extras=extras)
    what, are = ("the package", "it is") if len(names) == 1 else ("the packages", "they are")
    text = f"Expected {what} {', '.join(names)}, which this needs; {are} not installed. Run: {command}"
    if "train" in extras and sys.version_info >= _NO_TENSORFLOW_FROM:
        text += " with Python 3.13 or older, because there is no TensorFlow for newer ones"
    return MissingPackageError(text)


def _import_keras(name: str) -> None:
    """Import TensorFlow or Keras; a Keras that was not imported before gets the settings that this project needs.

    The user's `keras.json` and environment stay, and have no effect here.

    Raises:
        UsageError: Keras or TensorFlow cannot read the user's `keras.json`.
    """
    imported = _KERAS in sys.modules
    if not imported:
        _check_keras_file()
    os.environ.setdefault(_ONEDNN, "1")
    before = {variable: os.environ.pop(variable, None) for variable in _KERAS_VARIABLES}
    os.environ["KERAS_BACKEND"] = _BACKEND
    try:
        importlib.import_module(name)
    finally:
        for variable, value in before.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
    if not imported and _KERAS in sys.modules:
        config = importlib.import_module(_KERAS).config
        config.set_floatx(_FLOATX)
        config.set_epsilon(_EPSILON)
        config.set_image_data_format(_FORMAT)


def _check_keras_file() -> None:
    """Raise `UsageError` if the user's `keras.json` has a value with which Keras or TensorFlow cannot be imported."""
    path = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "keras.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # which both ignore
        return
    known = content if isinstance(content, dict) else {"(the whole)": content}
    wrong = [
        f"{key} {known[key]!r} in place of {words}"
        for key, (fits, words) in _KERAS_VALUES.items()
        if key in known and not fits(known[key])
    ]
    if wrong:
        raise UsageError(
            f"Expected settings that Keras can read in {path}; found {'; '.join(wrong)}. Correct or remove the file."
        )


def _check_keras(found: Any) -> None:
    """Check the settings of a Keras that may have been imported by someone else.

    Raises:
        UsageError: They are not those that this project needs.
    """
    config = found.config
    wanted = {
        "backend": (config.backend(), _BACKEND, f"set KERAS_BACKEND={_BACKEND} before Keras is imported"),
        "floatx": (config.floatx(), _FLOATX, f'call keras.config.set_floatx("{_FLOATX}")'),
        "image_data_format": (
            config.image_data_format(),
            _FORMAT,
            f'call keras.config.set_image_data_format("{_FORMAT}")',
        ),
    }
    wrong = [f"{name} {is_!r} in place of {must!r}: {fix}" for name, (is_, must, fix) in wanted.items() if is_ != must]
    if wrong:
        raise UsageError(
            f"Expected Keras as this package needs it; your program has imported it with {'; '.join(wrong)}. Or import "
            "nucleus, and use it, before Keras."
        )


@contextmanager
def stderr_without(remark: bytes) -> Iterator[int]:
    """Hold back stderr of this process, native code included; at the end print the lines that do not match `remark`.

    Args:
        remark: Regular expression that is searched for in each line.

    Yields:
        File descriptor of the real stderr, for what must be shown at once.
    """
    pattern = re.compile(remark)
    with _redirecting, tempfile.TemporaryFile() as written:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield kept
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                if not pattern.search(line):
                    os.write(2, line)


if not TYPE_CHECKING:
    keras, pandas, tf, wandb = (_LazyModule(name) for name in ("keras", "pandas", "tensorflow", "wandb"))
    ndimage, skimage = (_LazyModule(name) for name in ("scipy.ndimage", "skimage"))
    fastapi, prometheus_client, uvicorn = (_LazyModule(name) for name in SERVING if name != "python_multipart")
    anndata, zarr = _LazyModule("anndata"), _LazyModule("zarr")
    pa, pacsv = _LazyModule("pyarrow"), _LazyModule("pyarrow.csv")
    pads, pq = _LazyModule("pyarrow.dataset"), _LazyModule("pyarrow.parquet")
