"""What a check has found, and what puts it right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from nucleus import errors
from nucleus.config.recipe import NetworkOptions, TrackingOptions
from nucleus.errors import ClockError, NucleusError, UsageError
from nucleus.lazy import tf
from nucleus.provenance import PACKAGES, installed_versions
from nucleus.registry.encoder_weights import list_weights
from nucleus.storage.bucket import Bucket, check_conditional_writes
from nucleus.storage.s3_errors import endpoint
from nucleus.storage.uri import bucket_from_environment
from nucleus.tracking.wandb_run import check_tracking, tracking_mode

__all__ = [
    "Finding",
    "Gpus",
    "State",
    "call_apart",
    "check_gpus",
    "check_packages",
    "check_storage",
    "check_wandb",
    "failed",
    "gpus_here",
    "skipped",
    "tensorflow_gpus",
]


State = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        check: Its name.
        state: `ok`; `warning`, where the work goes on but not as one may think; `failed`, where it cannot; `skipped`,
            where another check has to be put right first.
        found: What it found.
        fix: What puts it right; None if nothing has to be.
    """

    check: str
    state: State
    found: str
    fix: str | None = None


def failed(check: str, error: NucleusError) -> Finding:
    """A check that ended in an error: its message's first sentence is what was found, the rest is the fix."""
    found, _, fix = str(error).partition(". ")
    return Finding(check, "failed", found.rstrip("."), fix or None)


def skipped(check: str, first: str) -> Finding:
    """A check that cannot be made before the check `first` is put right."""
    return Finding(check, "skipped", f"not looked at: {first} comes first")


_GPU = "GPU"
_HIDING = "CUDA_VISIBLE_DEVICES"
_NVIDIA_SECONDS = 10.0
_TENSORFLOW_SECONDS = 60.0


def check_packages() -> Finding:
    """Tell the versions that a run would have here."""
    found = installed_versions()
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    missing = [name for name in PACKAGES if name not in found]
    if missing:
        return Finding("packages", "failed", f"{', '.join(missing)} not installed; found {text}", "Run: make install.")
    return Finding("packages", "ok", text)


@dataclass(frozen=True)
class Gpus:
    """The NVIDIA GPUs of this machine.

    Attributes:
        names: Those that the driver lists.
        seen: How many of them TensorFlow can use.
        cuda: Whether this TensorFlow is made for them.
    """

    names: tuple[str, ...]
    seen: int = 0
    cuda: bool = True


def gpus_here() -> Gpus:
    """Ask the driver, and TensorFlow only where that lists any: it takes seconds.

    Raises:
        NucleusError: The driver or TensorFlow fails.
    """
    names = _listed_by_the_driver()
    if not names:
        return Gpus(names)
    told = call_apart(tensorflow_gpus, who="TensorFlow", seconds=_TENSORFLOW_SECONDS)
    return Gpus(names, told["seen"], told["cuda"])


def tensorflow_gpus() -> dict[str, Any]:
    """How many GPUs TensorFlow sees, and whether it is made for any."""

    return {"seen": len(tf.config.list_physical_devices("GPU")), "cuda": tf.test.is_built_with_cuda()}


def check_gpus(here: Gpus | NucleusError, of_cluster: float) -> Finding:
    """Say whether a run can use the GPUs that there are.

    Args:
        here: Those of this machine, or why nobody knows.
        of_cluster: How many the Ray cluster has.
    """
    if isinstance(here, NucleusError):
        return failed(_GPU, here)
    if not here.names and of_cluster:
        return Finding(_GPU, "ok", f"none on this machine; the Ray cluster has {of_cluster:g}")
    if not here.names:
        return Finding(_GPU, "warning", "none; training runs on CPUs", "Train by a recipe for CPUs, as dsb2018-cpu.")
    text = f"{len(here.names)} of this machine ({here.names[0]}), of which TensorFlow sees {here.seen}"
    if here.seen == len(here.names):
        return Finding(_GPU, "ok", text)
    return Finding(_GPU, "warning" if here.seen else "failed", text, _way_to_gpus(here))


def _way_to_gpus(here: Gpus) -> str:
    hidden = os.environ.get(_HIDING)
    if not here.cuda:
        return "This TensorFlow is one for CPUs. Run: make install EXTRA=gpu."
    if hidden is not None:
        return f"{_HIDING}={hidden!r} hides them. Run: unset {_HIDING}."
    return "CUDA's libraries or a newer driver are missing. Run: make install EXTRA=gpu, and look at nvidia-smi."


def _listed_by_the_driver() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise NucleusError(
            f"Expected nvidia-smi to answer within {_NVIDIA_SECONDS:.0f} s; it did not. Restart the machine, or "
            "install the driver anew."
        ) from None
    lines = tuple(line.strip() for line in done.stdout.splitlines() if line.strip())
    if done.returncode == 0:
        return lines
    if any("no devices" in line.lower() for line in lines):
        return ()
    said = (*lines, *done.stderr.splitlines(), f"exit status {done.returncode}")[0].rstrip(".")
    raise NucleusError(f"Expected nvidia-smi to list GPUs; found {said!r}. Install the GPU's driver anew.")


_BUCKET, _CLOCK, _CONDITIONS, _WEIGHTS = "bucket", "clock", "conditional writes", "weights"
_REMARKABLE, _TOO_MUCH = 60.0, 300.0
"""Seconds; S3 refuses requests at 15 minutes, and clocks that drift get there."""
_SET_THE_CLOCK = "Run: timedatectl set-ntp true (for a container, on its host)."


def check_storage() -> Iterator[Finding]:
    """Look at the bucket of NUCLEUS_BUCKET and at what needs it, one after the other.

    As a first publisher does, it leaves one small object in the bucket: `models/.conditional-writes`.
    """
    try:
        bucket = Bucket(bucket_from_environment())
        ahead = bucket.seconds_ahead("models/")
    except ClockError as error:
        yield skipped(_BUCKET, _CLOCK)
        yield failed(_CLOCK, error)
        yield from (skipped(check, _CLOCK) for check in (_CONDITIONS, _WEIGHTS))
        return
    except NucleusError as error:
        yield failed(_BUCKET, error)
        yield from (skipped(check, _BUCKET) for check in (_CLOCK, _CONDITIONS, _WEIGHTS))
        return
    yield Finding(_BUCKET, "ok", f"{bucket.uri} at {endpoint()}")
    yield _clock(ahead)
    yield _conditional_writes(bucket)
    yield _weights(bucket)


def _clock(ahead: float | None) -> Finding:
    if ahead is None:
        return Finding(_CLOCK, "ok", "the server does not tell its own")
    apart = abs(ahead)
    text = f"{apart:.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if apart <= _REMARKABLE:
        return Finding(_CLOCK, "ok", text)
    return Finding(
        _CLOCK,
        "failed" if apart > _TOO_MUCH else "warning",
        f"{text}; S3 refuses requests from 900 s on",
        _SET_THE_CLOCK,
    )


def _conditional_writes(bucket: Bucket) -> Finding:
    try:
        check_conditional_writes(bucket)
    except NucleusError as error:
        return failed(_CONDITIONS, error)
    return Finding(_CONDITIONS, "ok", "the server honours If-None-Match and If-Match")


def _weights(bucket: Bucket) -> Finding:
    """A warning where there are none: the first run may still find them in Keras's cache, or download them."""
    encoder = NetworkOptions().encoder
    try:
        stored = list_weights(bucket, encoder)
    except NucleusError as error:
        return failed(_WEIGHTS, error)
    if stored:
        return Finding(_WEIGHTS, "ok", f"{bucket.uri / stored[-1].key} ({stored[-1].size / 1e6:.1f} MB)")
    return Finding(
        _WEIGHTS,
        "warning",
        f"none at {bucket.uri}/weights/{encoder}/; the first run takes them from Keras's cache or downloads them",
        "Where the internet cannot be reached, run: nucleus weights add FILE.",
    )


_WANDB = "W&B"
_SECONDS = 20.0
_NOT_SENT = {
    "offline": "offline, as WANDB_MODE says; `wandb sync` sends runs later",
    "disabled": "disabled, as WANDB_MODE says",
}
_UNKNOWN = Finding(
    _WANDB,
    "warning",
    "offline, and no key is at hand; each run is kept on disk",
    "To see runs online: wandb login, and WANDB_MODE=online. WANDB_MODE=offline says that it is meant so.",
)


def check_wandb() -> Finding:
    """Say what becomes of a run's metrics by WANDB_MODE, for a recipe that says nothing of it."""
    chosen = os.environ.get("WANDB_MODE")
    try:
        mode = tracking_mode(TrackingOptions())
        if chosen in _NOT_SENT:
            return Finding(_WANDB, "ok", _NOT_SENT[chosen])
        call_apart(check_tracking, "online", who="W&B", seconds=_SECONDS)
    except UsageError as error:
        return failed(_WANDB, error) if chosen else _UNKNOWN
    except NucleusError as error:
        return failed(_WANDB, error)
    return Finding(_WANDB, "ok", f"{mode}; a key is at hand" + ("" if chosen else ": WANDB_MODE=online sends runs"))


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
