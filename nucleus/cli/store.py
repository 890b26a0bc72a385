"""`nucleus store`: the embedded S3 server."""

from dataclasses import asdict
from pathlib import Path

import click

from nucleus.cli.options import json_option

__all__ = ["store"]

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
    from nucleus.cli.output import note
    from nucleus.storage import server

    running = server.start(folder, port)
    server.make_bucket(running)
    note(f"S3 server on {running.endpoint}, data in {running.folder} (nucleus store stop --dir {folder} ends it)")
    settings = server.environment(running)
    endpoint = settings.pop("AWS_ENDPOINT_URL_S3")
    click.echo(f"export AWS_ENDPOINT_URL_S3={endpoint}")
    click.echo("export " + " ".join(f"{name}={value}" for name, value in settings.items()))


@store.command()
@_DIR
def stop(folder: Path) -> None:
    """Stop it; the data stays."""
    from nucleus.cli.output import note
    from nucleus.storage import server

    note("S3 server stopped" if server.stop(folder) else f"No S3 server runs on {folder}")


@store.command()
@_DIR
@json_option
@click.pass_context
def status(ctx: click.Context, folder: Path, as_json: bool) -> None:
    """Tell whether it runs; exit status 1 if not."""
    from nucleus.cli.output import print_json
    from nucleus.storage import server

    running = server.status(folder)
    if as_json:
        print_json({"running": running is not None, **(asdict(running) if running else {})})
    elif running:
        click.echo(f"running on {running.endpoint} (process {running.pid}), data in {running.folder}")
    else:
        click.echo(f"not running on {folder}. Run: nucleus store start --dir {folder}")
    if running is None:
        ctx.exit(1)
