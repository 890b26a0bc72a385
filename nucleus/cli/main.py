"""Command line `nucleus`: its commands, imported on use, error messages with exit statuses, and standard files."""

import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

import click

import nucleus
from nucleus import __version__
from nucleus.cli.options import FiniteRange
from nucleus.errors import NucleusError, OutputError
from nucleus.lazy import missing_package
from nucleus.surroundings import ENDING_SIGNALS

__all__ = ["cli", "main"]

_NO_READER = 141
"""Exit status if nobody reads stdout any more, as behind `head`: 128 + SIGPIPE, as in a shell."""
_CLOSED = {errno.EPIPE, errno.EINVAL}
"""Errors of a pipe that nobody reads any more; the second is that of Windows."""
_ENDS = {"SIGINT": "Interrupted.", "SIGHUP": "Terminated: terminal closed."}
"""What a command says that a signal has ended, by the name of the signal."""

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
    "evaluate": ("nucleus.cli.evaluate", "evaluate", "Evaluate a model on a dataset."),
    "predict": ("nucleus.cli.predict", "predict", "Segment, count and measure nuclei in images."),
    "serve": ("nucleus.cli.serve", "serve", "Look at images and correct nuclei in the browser; segment by HTTP."),
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
                click.echo(_ENDS.get(signal.Signals(number).name, "Terminated."), err=True)
            raise click.exceptions.Exit(128 + number) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # of any library: a full disk, a file in place of a folder, missing permissions
            found = None if ctx.params.get("debug") else missing_package(error) or nucleus.storage.failed_write(error)
            if found is None and (ctx.params.get("debug") or not isinstance(error, OSError)):
                raise
            click.echo(f"Error: {found or error}", err=True)
            raise click.exceptions.Exit(1) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nucleus")
@click.option("--debug", is_flag=True, help="Show tracebacks and the logs of Ray and its workers.")
@click.option(
    "--storage-timeout",
    type=FiniteRange(1, 86_400),
    metavar="SECONDS",
    help="How long to retry requests to the bucket that fail temporarily.  [default: 120]",
)
def cli(debug: bool, storage_timeout: float | None) -> None:  # noqa: ARG001  debug is read from the context
    """Find cell nuclei in microscope images: datasets in a bucket, training on Ray, versioned models, segmentation."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if storage_timeout is not None:
        nucleus.storage.set_storage_timeout(storage_timeout)


class _Stdout(io.TextIOWrapper):
    """stdout that ends the process when nobody reads it any more, and raises `OutputError` if it cannot be written."""

    def write(self, text: str) -> int:
        with self._checked():
            return super().write(text)

    def flush(self) -> None:
        with self._checked():
            super().flush()

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _discard(self.fileno())  # or the end of the process would try again
            if error.errno in _CLOSED:
                raise SystemExit(_NO_READER) from error
            raise OutputError(
                f"Expected to write the results to stdout; found an obstacle: {error.strerror}. They are incomplete. "
                "Name another file, or make room on its disk, and repeat the command."
            ) from error


class _Stderr(io.TextIOWrapper):
    """stderr that loses what cannot be written: no run is lost for want of its messages."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
            super().flush()
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _discard(descriptor: int) -> None:
    """Have a descriptor refer to the null device, also in processes that this one starts."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    if null != descriptor:
        os.close(null)
    os.set_inheritable(descriptor, True)


def _open_standard_files() -> None:
    """Open the null device in place of closed standard files, and handle errors of stdout and stderr.

    Without it, the next file that is opened would become stdout or stderr, and messages would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            _discard(descriptor)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115  stays open
    out, err = _raw(sys.stdout, 1), _raw(sys.stderr, 2)
    sys.stdout = _Stdout(io.BufferedWriter(out), *_coding(sys.stdout), line_buffering=out.isatty())
    sys.stderr = _Stderr(io.BufferedWriter(err), *_coding(sys.stderr))


def _raw(file: TextIO | None, descriptor: int) -> io.RawIOBase:
    """Return the file below a text file: on Windows, one of a console writes any character, a descriptor does not."""
    buffer: Any = io.FileIO(descriptor, "w", closefd=False) if file is None else file.buffer
    raw: io.RawIOBase = getattr(buffer, "raw", buffer)  # with `python -u` nothing is buffered
    return raw


def _coding(file: TextIO | None) -> tuple[str | None, str | None]:
    """Return the encoding of a file, and how it treats characters that the encoding lacks: they end no command."""
    if file is None or file.errors == "strict":
        return (None if file is None else file.encoding), "backslashreplace"
    return file.encoding, file.errors


_ended_by: list[int] = []
"""Signals that have ended this process; Ray raises a plain KeyboardInterrupt instead of that of `_end`."""


def _end(number: int, _frame: FrameType | None) -> None:
    """End the command as Ctrl-C does, so that temporary files are removed and processes ended."""
    _ended_by.append(number)
    raise KeyboardInterrupt(number)


def main() -> None:
    """Run the command line, and end the process with its exit status.

    Other signals that ask it to end, unless they are ignored, end it as Ctrl-C does.
    """
    _open_standard_files()
    for number in ENDING_SIGNALS[1:]:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    try:
        try:
            cli(prog_name="nucleus")
        finally:
            sys.stdout.flush()
    except NucleusError as error:  # of stdout, outside a command
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
