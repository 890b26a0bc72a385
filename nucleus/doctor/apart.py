"""A function called in a process of its own: it may be slow, hang or talk, and what it holds is free afterwards.

Ray's client waits 40 s for a silent server, TensorFlow would keep the memory of the GPUs that it was asked about, and
both write remarks that no setting holds back.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from nucleus import errors
from nucleus.errors import NucleusError

__all__ = ["call_apart"]

_LONGEST_REMARK = 200


def call_apart(function: Callable[..., Any], *arguments: str, who: str, seconds: float) -> Any:
    """What a function returns.

    Args:
        function: One of a module's; what it returns can be written as JSON.
        arguments: For it.
        who: Whom it asks, for messages.
        seconds: How long it may take.

    Raises:
        NucleusError: What it raised, of the same class; or it took too long, or ended in another way.
    """
    command = [sys.executable, "-P", "-m", __name__, function.__module__, function.__name__, *arguments]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise NucleusError(
            f"Expected {who} to answer within {seconds:.0f} s; it did not. Try again, or restart it."
        ) from None
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise NucleusError(f"Expected an answer of {who}; found {last[:_LONGEST_REMARK]}")
    told = json.loads(done.stdout)
    if "error" in told:
        raise getattr(errors, told["kind"])(told["error"])
    return told["answer"]


def _tell(module: str, function: str, *arguments: str) -> None:
    with redirect_stdout(sys.stderr):
        try:
            told = {"answer": getattr(import_module(module), function)(*arguments)}
        except NucleusError as error:
            told = {"error": str(error), "kind": type(error).__name__}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    _tell(*sys.argv[1:])
