"""`submit_start`: from `nucleus submit` to the first epoch's line, against `nucleus train` on the same cluster."""

import os
import secrets
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.measure import generated_dataset, report, temporary_store
from tests.ray_nodes import started_head

_ROUNDS = 3
_SETTINGS = {
    "dataset": "bench",
    "model": "bench",
    "workers": "2",
    "input.crop": "64",
    "input.batch_size": "4",
    "input.tile": "64",
    "input.overlap": "16",
    "optimizer.epochs": "1",
    "optimizer.steps_per_execution": "1",
    "network.encoder": "plain",
    "network.weights": "none",
    "network.freeze_encoder": "false",
    "tracking.wandb": "disabled",
    "optimizer.warmup_steps": "0",
}
_FIRST = "epoch 1/"


def submit_start() -> None:
    """Time both in turn; an epoch is two steps."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found: dict[str, list[float]] = {"train": [], "submit": []}
    with temporary_store() as root:
        generated_dataset(root, 16, side=64)
        with started_head(2, {}) as (address, dashboard):
            where = {"train": ({"RAY_ADDRESS": address}, ()), "submit": ({}, ("--address", dashboard))}
            for number in range(_ROUNDS):
                for side in sorted(where, reverse=number % 2 == 0):
                    found[side].append(_until_first_epoch(side, f"{side}-{number}", *where[side]))
    medians = {side: statistics.median(seconds) for side, seconds in found.items()}
    report("submit_start", medians["submit"] / medians["train"], **found)


def _until_first_epoch(side: str, run: str, environment: dict[str, str], options: tuple[str, ...]) -> float:
    settings = [text for key, value in _SETTINGS.items() for text in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "nucleus", side, "demo", "--run", run, *settings, *options]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    taken = None
    for line in process.stdout:
        if _FIRST in line and taken is None:
            taken = time.perf_counter() - started
    if process.wait() or taken is None:
        raise RuntimeError(f"nucleus {side} ended with status {process.returncode}")
    return taken
