"""Keep TensorFlow's start-up remarks off the terminal; it has no setting for those it makes while it is imported."""

import os
import re
import sys
import tempfile

__all__ = ["import_tensorflow"]

_REMARKS = re.compile(rb"^(WARNING: All log messages before absl|[IW]0000 |To enable the following instructions)")


def import_tensorflow() -> None:
    """Import TensorFlow; what it writes to stderr meanwhile is shown unless it is one of the usual remarks."""
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            import tensorflow  # noqa: F401, PLC0415
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                if not _REMARKS.match(line):
                    os.write(2, line)
