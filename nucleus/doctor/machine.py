"""The checks of this machine: its packages and its GPUs."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from nucleus.doctor.apart import call_apart
from nucleus.doctor.findings import Finding, failed
from nucleus.errors import NucleusError
from nucleus.quiet import import_tensorflow
from nucleus.versions import PACKAGES, installed_versions

__all__ = ["Gpus", "check_gpus", "check_packages", "gpus_here", "tensorflow_gpus"]

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
    import_tensorflow()
    import tensorflow as tf  # noqa: PLC0415

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
