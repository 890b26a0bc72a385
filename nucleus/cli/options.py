"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import nucleus
from nucleus.cli.progress_bars import show_progress

if TYPE_CHECKING:
    from nucleus.registry.versions import PulledModel
    from nucleus.storage.bucket import Bucket

__all__ = [
    "check_run_options",
    "cluster_options",
    "is_pulled",
    "json_option",
    "out_option",
    "project_bucket",
    "pulled_model",
    "run_options",
    "single_writer_option",
    "workers_option",
]


Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
single_writer_option = click.option(
    "--single-writer", is_flag=True, help="Nobody else publishes: go on where the server ignores conditional writes."
)


out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder on this machine: each run's report and TensorBoard's events go to its DIR/RUN/.",
    metavar="DIR",
)


def workers_option(otherwise: str) -> Callable[[Command], Command]:
    """`--workers`: over how many workers of a cluster the work is spread; without it as `otherwise` says."""
    return click.option(
        "--workers",
        type=click.IntRange(1),
        metavar="N",
        help=f"Spread over so many workers of the Ray cluster at hand.  [default: {otherwise}]",
    )


def _with(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def run_options(command: Command) -> Command:
    """What names a run and what it does: RECIPE, `--set`, `--run`, `--resume`, `--single-writer`."""
    return _with(
        command,
        click.argument("recipe"),
        click.option(
            "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a key, as optimizer.epochs=3."
        ),
        click.option("--run", metavar="NAME", help="Name of the run.  [default: the model's name and the moment]"),
        click.option("--resume", metavar="RUN", help="Go on with this run, by the recipe that it began with."),
        single_writer_option,
    )


def cluster_options(command: Command, *, otherwise: str = "RAY_ADDRESS, or http://127.0.0.1:8265") -> Command:
    """Which Ray cluster is meant, and how careful to be: `--address`, `--insecure`; `otherwise` says the default."""
    return _with(
        command,
        click.option(
            "--address",
            metavar="URL",
            help=f"The cluster's dashboard.  [default: {otherwise}]",
        ),
        click.option(
            "--insecure", is_flag=True, help="Allow plain HTTP to another machine, and a cluster without a token."
        ),
    )


def check_run_options(settings: tuple[str, ...], run: str | None, resume: str | None) -> None:
    """Raise what is wrong with `run_options` together, or with a name."""

    if run and resume:
        raise click.UsageError("--run names a new run and --resume an old one; give one of them")
    if resume and settings:
        raise click.UsageError("--resume goes on by the recipe that the run began with; leave out --set")
    for name in (run, resume):
        if name:
            nucleus.config.check_name(name, "run")


def project_bucket(below: str, *, single_writer: bool = False) -> "Bucket":
    """The bucket that NUCLEUS_BUCKET names, once what lies below a prefix of it could be listed.

    Raises:
        NucleusError: What is wrong with the name, or with the bucket.
    """

    bucket = nucleus.storage.Bucket(nucleus.storage.bucket_from_environment(), single_writer=single_writer)
    bucket.check(below)
    return bucket


def is_pulled(model: str) -> bool:
    """Return whether a model is given as the folder that it was pulled to."""
    return (Path(model) / nucleus.registry.MANIFEST_FILE).is_file()


def pulled_model(model: str, bucket: str | None = None) -> "PulledModel":
    """Return a verified model: NAME[@REF], pulled into the cache (with a progress bar), or a pulled folder.

    Args:
        model: NAME[@REF] or the folder.
        bucket: URI of the bucket; by default, that of NUCLEUS_BUCKET.
    """
    if is_pulled(model):
        return nucleus.registry.read_pulled(Path(model))
    reference = nucleus.config.parse_reference(model, "model")
    registry = nucleus.storage.Bucket(nucleus.storage.bucket_from_environment(bucket))
    registry.check("models/")
    with show_progress(f"download {model}", "bytes") as advance:
        return nucleus.registry.pull_cached(registry, reference, advance)
