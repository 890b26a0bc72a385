"""Heavy libraries, imported at first use and without the usual remarks of their native code.

TensorFlow takes seconds to import and most commands never compute anything with it. A module that needs it says
`from nucleus.lazy import tf` at its top, and pays when it first touches an attribute, as Keras's own modules do. With
`from __future__ import annotations` its types can be named in annotations.
"""

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras
    import pandas
    import tensorflow as tf
    import wandb

__all__ = ["keras", "pandas", "stderr_without", "tf", "wandb"]

_REMARKS = rb"^(WARNING: All log messages before absl|[IW]0000 |To enable the following instructions)"


class _LazyModule:
    """A module that is imported when one of its attributes is first asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if self._name not in sys.modules:
            _import_quietly(self._name)
        return getattr(importlib.import_module(self._name), attribute)  # waits for another thread's import


def _import_quietly(name: str) -> None:
    """Import a module; what it writes to stderr meanwhile is shown unless it is one of TensorFlow's usual remarks."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with stderr_without(_REMARKS):
        importlib.import_module(name)


@contextmanager
def stderr_without(remark: bytes) -> Iterator[None]:
    """Hold back what this process, native code included, writes to stderr; at the end show the lines without `remark`.

    Args:
        remark: A regular expression, searched for in each line.
    """
    pattern = re.compile(remark)
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                if not pattern.search(line):
                    os.write(2, line)


if not TYPE_CHECKING:
    keras, pandas, tf, wandb = (_LazyModule(name) for name in ("keras", "pandas", "tensorflow", "wandb"))
