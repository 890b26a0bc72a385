"""Keep usual remarks of native libraries off the terminal; they have no setting for those they make at their start."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["import_tensorflow", "stderr_without"]

_TENSORFLOW = rb"^(WARNING: All log messages before absl|[IW]0000 |To enable the following instructions)"


def import_tensorflow() -> None:
    """Import TensorFlow; what it writes to stderr meanwhile is shown unless it is one of the usual remarks."""
    if "tensorflow" in sys.modules:
        return
    with stderr_without(_TENSORFLOW):
        import tensorflow  # noqa: F401, PLC0415


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
