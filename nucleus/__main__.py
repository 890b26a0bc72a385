"""`python -m nucleus`: the command line, also of a submitted job."""

import sys
from pathlib import Path


def _leave_out_current_folder() -> None:
    """Take the current folder off `sys.path`, unless this package is there: a `job.py` in it is not this project's."""
    root = str(Path(__file__).resolve().parents[1])
    if sys.path and not sys.flags.safe_path and str(Path(sys.path[0]).resolve()) != root:
        del sys.path[0]


_leave_out_current_folder()

from nucleus.cli.main import main  # noqa: E402  only now

main()
