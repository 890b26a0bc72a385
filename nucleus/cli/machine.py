"""`nucleus doctor` and `nucleus store`: checks of this machine, and its embedded S3 server."""

import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

import job
import nucleus
from nucleus.cli.options import cluster_options, json_option, training_command
from nucleus.cli.output import note, print_json
from nucleus.errors import NucleusError
from nucleus.storage import local_server
from nucleus.surroundings import TRAINS_HERE

if TYPE_CHECKING:
    from job.cluster_check import Gpus
    from nucleus.doctor import Finding

__all__ = ["doctor", "store"]


_STORAGE_SECONDS = 6.0
"""Storage timeout of `doctor`: short, because a person waits for the result."""
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "bright_black"}
_DIR = click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("nucleus-store"),
    show_default=True,
    help="Folder of the server's data.",
)


@click.command()
@partial(cluster_options, otherwise="RAY_ADDRESS, or the cluster that nucleus train would use")
@json_option
@click.pass_context
def doctor(ctx: click.Context, address: str | None, insecure: bool, as_json: bool) -> None:
    """Check packages, model, service, disks, bucket, clock, writes, weights, Ray, GPU, engine, W&B; explain fixes.

    Nothing is started or downloaded. The exit status is 1 if a check fails; warnings do not count. The check of
    conditional writes leaves one small object in the bucket, models/.conditional-writes.
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
    """Run the checks concurrently and yield their findings in a fixed order."""
    cache = nucleus.doctor.check_cache()  # before others change the environment
    with ThreadPoolExecutor() as pool:
        wandb = pool.submit(nucleus.doctor.check_wandb)
        trains = TRAINS_HERE and not nucleus.lazy.missing_packages()
        ray = pool.submit(job.check_ray, address, insecure=insecure) if trains else None
        gpus = pool.submit(_gpus_here) if trains else None
        engine = pool.submit(nucleus.doctor.check_engine)
        yield nucleus.doctor.check_packages()
        yield nucleus.doctor.check_model()
        yield nucleus.doctor.check_service()
        yield cache
        yield from nucleus.doctor.check_disks()
        yield from nucleus.doctor.check_storage()
        if ray and gpus:
            yield ray.result().finding
            yield job.check_gpus(gpus.result(), ray.result().gpus)
        else:
            yield from map(nucleus.doctor.not_installed, ("Ray", "GPU"))
        yield engine.result()
        yield wandb.result()


def _gpus_here() -> "Gpus | NucleusError":
    try:
        return job.gpus_here()
    except NucleusError as error:
        return error


def _printer() -> "Callable[[Finding], None]":
    """Return the function that shows a finding: in a terminal with the fix below it, otherwise in one line."""
    console = Console(highlight=False)
    return (lambda finding: _show_finding(finding, console)) if console.is_terminal else _echo


def _echo(finding: "Finding") -> None:
    fix = f". {finding.fix}" if finding.fix else ""
    click.echo(f"{finding.state:<7}  {finding.check}: {finding.found}{fix}")


def _show_finding(finding: "Finding", console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=7)
    grid.add_column(width=18)
    grid.add_column()
    text = Text(finding.found)
    if finding.fix:
        text.append(f"\n{finding.fix}", style="bold")
    grid.add_row(Text(finding.state, style=_COLOURS[finding.state]), Text(finding.check), text)
    console.print(grid)


@click.group()
def store() -> None:
    """Embedded S3 server, reachable on 127.0.0.1 only."""


@store.command()
@_DIR
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port; 0 for any free one.  [default: the last one used, else 9000]"
)
@training_command
def start(folder: Path, port: int | None) -> None:
    """Start the server, create the bucket `nucleus` and print the variables for using it.

    To set them in a shell: eval "$(nucleus store start)"
    """
    running = local_server.start(folder, port)
    local_server.make_bucket(running)
    stop_it = f"nucleus store stop --dir {shlex.quote(str(folder))}"
    note(f"S3 server on {running.endpoint}, data in {running.folder} (to stop it: {stop_it})")
    settings = {name: shlex.quote(value) for name, value in local_server.environment(running).items()}
    endpoint = settings.pop("AWS_ENDPOINT_URL_S3")
    click.echo(f"export AWS_ENDPOINT_URL_S3={endpoint}")
    click.echo("export " + " ".join(f"{name}={value}" for name, value in settings.items()))


@store.command()
@_DIR
@training_command
def stop(folder: Path) -> None:
    """Stop the server; the data stays."""
    note("S3 server stopped" if local_server.stop(folder) else f"No S3 server runs on {folder}")


@store.command()
@_DIR
@json_option
@click.pass_context
@training_command
def status(ctx: click.Context, folder: Path, as_json: bool) -> None:
    """Show whether the server runs; the exit status is 1 if not."""
    running = local_server.status(folder)
    if as_json:
        print_json({"running": running is not None, **(asdict(running) if running else {})})
    elif running:
        click.echo(f"running on {running.endpoint} (process {running.pid}), data in {running.folder}")
    else:
        click.echo(f"not running on {folder}. Run: nucleus store start --dir {shlex.quote(str(folder))}")
    if running is None:
        ctx.exit(1)
