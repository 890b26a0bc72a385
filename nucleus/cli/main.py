"""Command line `nucleus`: its commands, imported on use, and error messages with exit statuses."""

import importlib
import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

import click

import nucleus
from nucleus import __version__
from nucleus.errors import NucleusError

__all__ = ["cli", "main"]

_ENDS: dict[int, str] = {
    signal.SIGINT: "Interrupted.",
    signal.SIGTERM: "Terminated.",
    signal.SIGHUP: "Terminated: terminal closed.",
}
"""What a command says that a signal has ended: signal, then text."""

# Command: (module, attribute, help). The help is repeated here so that `nucleus --help` imports no command.
_COMMANDS = {
    "demo": ("nucleus.cli.demo", "demo", "Import, train, publish and predict in one go, on this machine."),
    "store": ("nucleus.cli.machine", "store", "Embedded S3 server: start, stop, status."),
    "data": ("nucleus.cli.data", "data", "Datasets in the bucket: import, list, show, verify."),
    "weights": ("nucleus.cli.models", "weights", "Encoder weights in the bucket: add, list."),
    "train": ("nucleus.cli.training", "train", "Train a model on Ray with a recipe, and publish it."),
    "submit": ("nucleus.cli.jobs", "submit", "Train as a job of a remote Ray cluster."),
    "sweep": ("nucleus.cli.training", "sweep", "Train with different settings, and publish the best model."),
    "jobs": ("nucleus.cli.jobs", "jobs", "Jobs of a remote Ray cluster: list, status, logs, stop."),
    "doctor": ("nucleus.cli.machine", "doctor", "Check everything that training needs, and explain how to fix it."),
    "runs": ("nucleus.cli.runs", "runs", "Training runs in the bucket: list, show, compare."),
    "models": ("nucleus.cli.models", "models", "Model versions in the bucket: list, show, pull, export and more."),
    "evaluate": ("nucleus.cli.predict", "evaluate", "Evaluate a model on a dataset."),
    "predict": ("nucleus.cli.predict", "predict", "Segment, count and measure nuclei in images."),
}


class _Commands(click.Group):
    """Command group that imports the module of a command when the command is used."""

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
        except KeyboardInterrupt as error:  # of Ctrl-C, or `_end`
            number = int((error.args or _ended_by or [signal.SIGINT])[-1])
            with suppress(OSError):  # the terminal may be gone
                click.echo(_ENDS.get(number, "Ended."), err=True)
            raise click.exceptions.Exit(128 + number) from error
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk, a file in place of a folder, missing permissions
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {nucleus.storage.failed_write(error) or error}", err=True)
            raise click.exceptions.Exit(1) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nucleus")
@click.option("--debug", is_flag=True, help="Show tracebacks and the logs of Ray and its workers.")
@click.option(
    "--storage-timeout",
    type=click.FloatRange(1, 86_400),
    metavar="SECONDS",
    help="How long to retry requests to the bucket that fail temporarily.  [default: 120]",
)
def cli(debug: bool, storage_timeout: float | None) -> None:  # noqa: ARG001  debug is read from the context
    """Find cell nuclei in microscope images: datasets in a bucket, training on Ray, versioned models, segmentation."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if storage_timeout is not None:
        nucleus.storage.set_storage_timeout(storage_timeout)


_ended_by: list[int] = []
"""Signals that have ended this process; Ray raises a plain KeyboardInterrupt instead of that of `_end`."""


def _end(number: int, _frame: FrameType | None) -> None:
    """End the command as Ctrl-C does, so that temporary files are removed and processes ended."""
    _ended_by.append(number)
    raise KeyboardInterrupt(number)


def main() -> None:
    """Run the command line. SIGTERM and SIGHUP, unless they are ignored, end it as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    cli(prog_name="nucleus")
