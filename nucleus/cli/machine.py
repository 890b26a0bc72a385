"""`nucleus doctor`: whether everything that a run needs is there, and what puts right what is not."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

import job
import nucleus
from nucleus.cli.options import cluster_options, json_option
from nucleus.cli.output import note, print_json
from nucleus.errors import NucleusError

if TYPE_CHECKING:
    from rich.console import Console

    from nucleus.doctor import Finding, Gpus
    from nucleus.errors import NucleusError

__all__ = ["doctor", "store"]


_STORAGE_SECONDS = 6.0
"""A person waits for the answer, so the bucket has to be there now."""
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "bright_black"}


@click.command()
@partial(cluster_options, otherwise="RAY_ADDRESS, or the cluster that nucleus train would join")
@json_option
@click.pass_context
def doctor(ctx: click.Context, address: str | None, insecure: bool, as_json: bool) -> None:
    """Check packages, bucket, clock, conditional writes, encoder weights, Ray, GPU and W&B; say what puts them right.

    Nothing is started or downloaded. Exit status 1 if a check fails; a warning alone is no failure. One small object
    may be left in the bucket, models/.conditional-writes, as by the first publishing.
    """

    if ctx.find_root().params.get("storage_timeout") is None:
        nucleus.storage.set_storage_timeout(_STORAGE_SECONDS)
    show = _printer()
    findings = []
    for finding in _findings(address, insecure=insecure):
        findings.append(finding)
        if not as_json:
            show(finding)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    if any(finding.state == "failed" for finding in findings):
        ctx.exit(1)


def _findings(address: str | None, *, insecure: bool) -> "Iterator[Finding]":
    """What the checks find, made side by side, told in an order that does not change."""

    with ThreadPoolExecutor() as pool:
        wandb = pool.submit(nucleus.doctor.check_wandb)
        ray = pool.submit(job.check_ray, address, insecure=insecure)
        gpus = pool.submit(_gpus_here)
        yield nucleus.doctor.check_packages()
        yield from nucleus.doctor.check_storage()
        yield ray.result().finding
        yield nucleus.doctor.check_gpus(gpus.result(), ray.result().gpus)
        yield wandb.result()


def _gpus_here() -> "Gpus | NucleusError":

    try:
        return nucleus.doctor.gpus_here()
    except NucleusError as error:
        return error


def _printer() -> "Callable[[Finding], None]":
    """What shows a finding: on a terminal with its fix below it, to a pipe in one line."""
    from rich.console import Console

    console = Console(highlight=False)
    return (lambda finding: _show_finding(finding, console)) if console.is_terminal else _echo


def _echo(finding: "Finding") -> None:
    fix = f". {finding.fix}" if finding.fix else ""
    click.echo(f"{finding.state:<7}  {finding.check}: {finding.found}{fix}")


def _show_finding(finding: "Finding", console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=7)
    grid.add_column(width=18)
    grid.add_column()
    text = Text(finding.found)
    if finding.fix:
        text.append(f"\n{finding.fix}", style="bold")
    grid.add_row(Text(finding.state, style=_COLOURS[finding.state]), Text(finding.check), text)
    console.print(grid)


_DIR = click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("nucleus-store"),
    show_default=True,
    help="Holds the data.",
)


@click.group()
def store() -> None:
    """The embedded S3 server, on 127.0.0.1 only."""


@store.command()
@_DIR
@click.option("--port", type=click.IntRange(0, 65535), help="0 for any free one.  [default: the last used, else 9000]")
def start(folder: Path, port: int | None) -> None:
    """Start it, make the bucket `nucleus`, and print the lines to use it: eval "$(nucleus store start)"."""

    running = nucleus.storage.local_server.start(folder, port)
    nucleus.storage.local_server.make_bucket(running)
    note(f"S3 server on {running.endpoint}, data in {running.folder} (nucleus store stop --dir {folder} ends it)")
    settings = nucleus.storage.local_server.environment(running)
    endpoint = settings.pop("AWS_ENDPOINT_URL_S3")
    click.echo(f"export AWS_ENDPOINT_URL_S3={endpoint}")
    click.echo("export " + " ".join(f"{name}={value}" for name, value in settings.items()))


@store.command()
@_DIR
def stop(folder: Path) -> None:
    """Stop it; the data stays."""

    note("S3 server stopped" if nucleus.storage.local_server.stop(folder) else f"No S3 server runs on {folder}")


@store.command()
@_DIR
@json_option
@click.pass_context
def status(ctx: click.Context, folder: Path, as_json: bool) -> None:
    """Tell whether it runs; exit status 1 if not."""

    running = nucleus.storage.local_server.status(folder)
    if as_json:
        print_json({"running": running is not None, **(asdict(running) if running else {})})
    elif running:
        click.echo(f"running on {running.endpoint} (process {running.pid}), data in {running.folder}")
    else:
        click.echo(f"not running on {folder}. Run: nucleus store start --dir {folder}")
    if running is None:
        ctx.exit(1)
