"""`nucleus`: the commands by name, and how errors reach the person at the keyboard."""

import importlib
import os
from typing import Any

import click

import nucleus
from nucleus import __version__
from nucleus.errors import NucleusError

__all__ = ["cli", "main"]

# Command: (module, attribute, help). The help stands here so that `nucleus --help` imports none of them.
_COMMANDS = {
    "demo": ("nucleus.cli.demo", "demo", "The whole way in one go, on an S3 server on this machine."),
    "store": ("nucleus.cli.machine", "store", "The embedded S3 server."),
    "data": ("nucleus.cli.data", "data", "Datasets in the bucket."),
    "weights": ("nucleus.cli.models", "weights", "Encoder weights in the bucket."),
    "train": ("nucleus.cli.training", "train", "Train by a recipe on Ray and publish the model."),
    "submit": ("nucleus.cli.jobs", "submit", "The same as a job of a Ray cluster elsewhere."),
    "sweep": ("nucleus.cli.training", "sweep", "Train with different settings and publish the best."),
    "jobs": ("nucleus.cli.jobs", "jobs", "Jobs on that cluster: list, status, logs, stop."),
    "doctor": ("nucleus.cli.machine", "doctor", "Check all that a run needs, and name what puts it right."),
    "runs": ("nucleus.cli.runs", "runs", "Training runs in the bucket: list, show, compare."),
    "models": ("nucleus.cli.models", "models", "Versioned models in the bucket."),
    "evaluate": ("nucleus.cli.evaluate", "evaluate", "Metrics of a model on a dataset."),
    "predict": ("nucleus.cli.predict", "predict", "Segment, count and measure nuclei in images."),
}


class _Commands(click.Group):
    """Imports a command's module when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NucleusError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            raise click.exceptions.Exit(error.exit_code) from error
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk, a file where a folder should be, missing rights
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            raise click.exceptions.Exit(1) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nucleus")
@click.option("--debug", is_flag=True, help="Show tracebacks and the logs of Ray and its workers.")
@click.option(
    "--storage-timeout",
    type=click.FloatRange(1, 86_400),
    metavar="SECONDS",
    help="Ask the bucket again for so long when it fails for the moment.  [default: 120]",
)
def cli(debug: bool, storage_timeout: float | None) -> None:  # noqa: ARG001  debug is read from the context
    """Find cell nuclei in microscope images: data in a bucket, training on Ray, versioned models, segmentation."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if storage_timeout is not None:
        nucleus.storage.set_storage_timeout(storage_timeout)


def main() -> None:
    """Run the command line."""
    cli(prog_name="nucleus")
