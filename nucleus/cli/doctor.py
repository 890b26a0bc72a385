"""`nucleus doctor`: whether everything that a run needs is there, and what puts right what is not."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import click

from nucleus.cli.options import cluster_options, json_option

if TYPE_CHECKING:
    from rich.console import Console

    from nucleus.doctor.findings import Finding
    from nucleus.doctor.machine import Gpus
    from nucleus.errors import NucleusError

__all__ = ["doctor"]

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
    from nucleus.cli.output import print_json
    from nucleus.storage.retries import set_storage_timeout

    if ctx.find_root().params.get("storage_timeout") is None:
        set_storage_timeout(_STORAGE_SECONDS)
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
    from job.doctor import check_ray
    from nucleus.doctor.machine import check_gpus, check_packages
    from nucleus.doctor.storage import check_storage
    from nucleus.doctor.tracking import check_wandb

    with ThreadPoolExecutor() as pool:
        wandb = pool.submit(check_wandb)
        ray = pool.submit(check_ray, address, insecure=insecure)
        gpus = pool.submit(_gpus_here)
        yield check_packages()
        yield from check_storage()
        yield ray.result().finding
        yield check_gpus(gpus.result(), ray.result().gpus)
        yield wandb.result()


def _gpus_here() -> "Gpus | NucleusError":
    from nucleus.doctor.machine import gpus_here
    from nucleus.errors import NucleusError

    try:
        return gpus_here()
    except NucleusError as error:
        return error


def _printer() -> "Callable[[Finding], None]":
    """What shows a finding: on a terminal with its fix below it, to a pipe in one line."""
    from rich.console import Console

    console = Console(highlight=False)
    return (lambda finding: _show(finding, console)) if console.is_terminal else _echo


def _echo(finding: "Finding") -> None:
    fix = f". {finding.fix}" if finding.fix else ""
    click.echo(f"{finding.state:<7}  {finding.check}: {finding.found}{fix}")


def _show(finding: "Finding", console: "Console") -> None:
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
