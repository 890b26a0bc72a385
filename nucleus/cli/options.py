"""Options and arguments that several commands share, and their checks."""

import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

import nucleus
from nucleus.errors import UsageError
from nucleus.surroundings import check_can_train
from nucleus.text import number_or_text

if TYPE_CHECKING:
    from nucleus.registry.versions import PulledModel
    from nucleus.storage.bucket import Bucket

__all__ = [
    "FiniteRange",
    "check_anonymous",
    "check_run_options",
    "check_shared_model",
    "cluster_options",
    "engine_option",
    "json_option",
    "number_or_word",
    "out_option",
    "project_bucket",
    "pulled_model",
    "run_options",
    "single_writer_option",
    "training_command",
    "workers_option",
]


Command = TypeVar("Command", bound=Callable[..., Any])


class FiniteRange(click.FloatRange):
    """A range of numbers to which neither NaN nor infinity belongs."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number of a text. Fails as click does if it is not in the range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
single_writer_option = click.option(
    "--single-writer",
    is_flag=True,
    help="For a server without conditional writes. Only safe while nobody else writes to the bucket.",
)
out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder on this machine. The report and the TensorBoard events of a run go to DIR/RUN/.",
    metavar="DIR",
)


def engine_option(command: Command) -> Command:
    """Add `--engine` to a command."""
    from nucleus.config.names import EngineChoice  # noqa: PLC0415  pydantic is slow, and `main` imports this module

    return click.option(
        "--engine",
        type=click.Choice(get_args(EngineChoice)),
        default="auto",
        show_default=True,
        help="What computes the network; auto is TensorFlow if it sees a GPU or the version has no model.onnx, else "
        "ONNX Runtime.",
    )(command)


def training_command(command: Command) -> Command:
    """Make a command refuse to run on Windows, where nothing is trained; its `--help` works there too."""

    @wraps(command)
    def checked(*arguments: Any, **options: Any) -> Any:
        check_can_train(click.get_current_context().command_path)
        return command(*arguments, **options)

    return checked  # type: ignore[return-value]  # it takes what `command` takes


def workers_option(otherwise: str) -> Callable[[Command], Command]:
    """Return the option `--workers`; `otherwise` describes what happens without it."""
    return click.option(
        "--workers",
        type=click.IntRange(1),
        metavar="N",
        help=f"Number of workers on the Ray cluster.  [default: {otherwise}]",
    )


def _with(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def run_options(command: Command) -> Command:
    """Add RECIPE, `--set`, `--run`, `--resume` and `--single-writer` to a command."""
    return _with(
        command,
        click.argument("recipe", required=False),
        click.option(
            "--set",
            "settings",
            metavar="KEY=VALUE",
            multiple=True,
            help="Change a key of the recipe, such as optimizer.epochs=3. Can be repeated.",
        ),
        click.option("--run", metavar="NAME", help="Name of the run.  [default: model name, date and time]"),
        click.option(
            "--resume",
            metavar="RUN",
            help="Continue this run with the recipe that it started with. RECIPE is not needed; another is refused.",
        ),
        single_writer_option,
    )


def cluster_options(command: Command, *, otherwise: str = "RAY_ADDRESS, or http://127.0.0.1:8265") -> Command:
    """Add `--address` and `--insecure` to a command; `otherwise` describes the default address."""
    return _with(
        command,
        click.option(
            "--address",
            metavar="URL",
            help=f"Dashboard of the Ray cluster.  [default: {otherwise}]",
        ),
        click.option(
            "--insecure", is_flag=True, help="Allow plain HTTP to another machine, and a cluster without a token."
        ),
    )


def check_run_options(recipe: str | None, settings: tuple[str, ...], run: str | None, resume: str | None) -> None:
    """Raise a usage error for a wrong combination of `run_options` or a wrong name."""
    if recipe is None and resume is None:
        raise click.UsageError("Missing argument 'RECIPE'. Only --resume RUN works without one.")
    if run and resume:
        raise click.UsageError("--run names a new run, --resume an existing one; give one of them")
    if settings and recipe is None:
        raise click.UsageError("--resume uses the recipe that the run started with; leave out --set")
    for name in (run, resume):
        if name:
            nucleus.config.check_name(name, "run")


def project_bucket(below: str, *, single_writer: bool = False) -> "Bucket":
    """Return the bucket of NUCLEUS_BUCKET after a check that its prefix `below` can be listed.

    Raises:
        NucleusError: The name is wrong, or the bucket cannot be read.
    """
    bucket = nucleus.storage.Bucket(nucleus.storage.bucket_from_environment(), single_writer=single_writer)
    bucket.check(below)
    return bucket


def pulled_model(model: str | None, bucket: str | None = None) -> "PulledModel":
    """Return a verified model as `nucleus.registry.find_model` finds it, with a progress bar.

    Args:
        model: NAME[@REF], a URI or a folder; None and `nuclei` mean the model that comes along.
        bucket: URI of the bucket; by default, that of NUCLEUS_BUCKET.
    """
    from nucleus.cli.progress_bars import show_progress  # noqa: PLC0415  rich is slow, and `main` imports this module

    return nucleus.registry.find_model(model, bucket, show_progress)


def number_or_word(_context: click.Context, _option: click.Parameter, value: str | None) -> int | str | None:
    """Return the number that an option gives in digits, or its text."""
    return None if value is None else number_or_text(value)


def check_anonymous(anonymous: bool, *, in_bucket: bool) -> None:
    """Raise `UsageError` if images are to be read without credentials, and none of them is in a bucket."""
    if anonymous and not in_bucket:
        raise UsageError("Expected images in a bucket for --anonymous; found files, which need no credentials.")


def check_shared_model(model: str | None, what: str) -> None:
    """Raise `UsageError` for a folder: workers on other machines get a model from the bucket or from their package."""
    if model is not None and not nucleus.registry.is_included(model) and nucleus.registry.is_pulled(model):
        raise UsageError(f"Expected NAME[@REF] for {what}, because each worker pulls the model; found {model}.")
