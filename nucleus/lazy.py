"""Lazy imports of heavy libraries: imported at first use, without the log messages of their native code.

TensorFlow takes seconds to import, and most commands do not need it. A module that does has
`from nucleus.lazy import tf` at its top; TensorFlow is imported when the module first uses an attribute. scikit-image
and SciPy are here because each worker of a run would import them before its first step, and needs them later. With
`from __future__ import annotations` its types can be used in annotations.
"""

import importlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nucleus.surroundings import provide_folders

if TYPE_CHECKING:
    import keras
    import pandas
    import skimage
    import tensorflow as tf
    import wandb
    from scipy import ndimage

__all__ = ["keras", "ndimage", "pandas", "skimage", "stderr_without", "tf", "wandb"]

_REMARKS = rb"^(WARNING: All log messages before absl|[IW]0000 |To enable the following instructions)"


_redirecting = threading.RLock()
"""Held while stderr is held back: two threads at once would put it back in the wrong order, and lose what follows."""


class _LazyModule:
    """A module that is imported when one of its attributes is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if self._name not in sys.modules:
            _import_quietly(self._name)
        return getattr(importlib.import_module(self._name), attribute)  # waits for another thread's import


def _import_quietly(name: str) -> None:
    """Import a module, and hide TensorFlow's usual log messages among its output to stderr."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    provide_folders()
    with stderr_without(_REMARKS):
        importlib.import_module(name)


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
