"""`make gpu-check`: what a GPU does with this package, in a table whose rows appear as they are measured.

Each part runs in a process of its own (`tests.benchmarks.gpu_parts`), so one that fails, hangs or fills the GPU's
memory costs only itself, and a check that is killed has printed what it had. Without a GPU it runs with small sizes:
that shows that the check works, and nothing about speed.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tests.benchmarks.gpu_parts import PARTS

_MINUTES = 8
_SHORTEST = 5.0
"""Seconds below which a part is not started."""
_PATIENCE = 10.0
"""Seconds for a part to end what it has started."""
_WIDTHS = (46, 12, 14, 12)


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Images, such as stage1_train.zip.")
@click.option("--weights", type=click.Path(exists=True, path_type=Path), help="Encoder weights for the recipe.")
@click.option("--recipe", default="dsb2018-gpu", show_default=True, help="The recipe that is measured.")
@click.option("--only", "only", multiple=True, type=click.Choice(list(PARTS)), help="Only this part; several times.")
@click.option("--budget", type=float, default=60.0 * _MINUTES, show_default=True, help="Seconds for all parts.")
@click.option("--small/--full", default=None, help="Sizes; by default small without a GPU.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each row.")
def main(
    data: Path | None,
    weights: Path | None,
    recipe: str,
    only: tuple[str, ...],
    budget: float,
    small: bool | None,
    as_json: bool,
) -> None:
    """Measure what a GPU does with this package; print a table."""
    ends, failures = time.monotonic() + budget, 0
    options: dict[str, Any] = {"data": _text(data), "weights": _text(weights), "recipe": recipe, "small": small}
    if not as_json:
        click.echo(_line(("what", "measured", "", "goal")))
    for part in only or PARTS:
        for row in _rows(part, options, ends):
            failures += "failed" in row
            click.echo(json.dumps({"part": part, **row}) if as_json else _row(part, row))
    sys.exit(1 if failures else 0)


def _text(path: Path | None) -> str | None:
    return str(path.absolute()) if path else None


def _rows(part: str, options: dict[str, Any], ends: float) -> Iterator[dict[str, Any]]:
    """Run a part, and yield its rows as they appear; the last says why if it failed or had no time."""
    if ends - time.monotonic() < _SHORTEST:
        again = f"make gpu-check GPU_CHECK='--only {part}'"
        yield {"what": "not run", "failed": f"the budget is used up; run: {again}"}
        return
    command = _command(part, options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said: list[str] = []
        listener = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        listener.start()
        try:
            yield from _read(process, ends)
            status: str | None = None if process.wait() == 0 else f"exit status {process.returncode}"
        except TimeoutError:
            status = "the budget is used up"
        finally:
            _end(process)
        listener.join(timeout=1)
        if status is not None:
            last = next((line.strip() for line in reversed(said) if line.strip()), "")
            yield {"what": "not finished", "failed": f"{status} {last}".strip()}


def _end(process: subprocess.Popen[str]) -> None:
    """End a part with what it has started: a server, a cluster. Nothing happens to one that has ended."""
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def _command(part: str, options: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.gpu_parts", part, json.dumps(options)]


def _read(process: subprocess.Popen[str], ends: float) -> Iterator[dict[str, Any]]:
    """Yield the rows that a process prints. Raises `TimeoutError` at the end of the budget."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def listen() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, ends - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        if line.startswith("{"):  # libraries print too
            yield json.loads(line)


def _row(part: str, row: dict[str, Any]) -> str:
    what = f"{part}: {row['what']}"
    if "failed" in row:
        return f"{what:{_WIDTHS[0]}} failed: {row['failed']}"
    value = row["value"]
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _line((what, shown, row.get("unit", ""), row.get("goal", "")))


def _line(cells: tuple[str, str, str, str]) -> str:
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the part that runs too
    main()
