"""`nucleus models compare`, and the tables and picture that it shares with `nucleus runs compare`."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import nucleus
from nucleus.cli.options import json_option, project_bucket
from nucleus.cli.output import note, print_json, print_table, warn
from nucleus.errors import UsageError
from nucleus.text import MISSING, commit_text, epochs_text, moment_text, score_text, time_text, value_text

if TYPE_CHECKING:
    from nucleus.runs.comparison import ComparedRun

__all__ = ["check_compared", "compare_models", "picture_option", "show_comparison"]


_MOST = 26
"""Largest number of compared runs: one per letter of the alphabet."""
_MOST_DIFFERENCES = 3
"""Largest number of runs, besides the first, whose differences fit on a terminal of 80 columns."""

Command = TypeVar("Command", bound=Callable[..., Any])


def picture_option(command: Command) -> Command:
    """The option `--out FILE.png`, for a picture of the curves."""
    option = click.option(
        "--out",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write a picture of the curves to this PNG file.",
    )
    return option(command)


@click.command("compare")
@click.argument("models", nargs=-1, required=True, metavar="MODEL MODEL...")
@picture_option
@json_option
def compare_models(models: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Compare model versions, each NAME[@REF]: scores, recipes and datasets.

    Differences are relative to the first. The versions may be of different models.
    """
    references = [nucleus.config.parse_reference(model, "model") for model in models]
    check_compared(models, models, out, "versions, such as dsb2018@1 dsb2018@2")
    bucket = project_bucket(nucleus.registry.MODELS)
    numbers = [nucleus.registry.resolve_version(bucket, reference) for reference in references]
    names = [f"{reference.name}@{number}" for reference, number in zip(references, numbers, strict=True)]
    check_compared(models, names, out, "versions, such as dsb2018@1 dsb2018@2")
    manifests = [
        nucleus.registry.read_version(bucket, reference.name, number)
        for reference, number in zip(references, numbers, strict=True)
    ]
    show_comparison(
        [
            nucleus.runs.of_version(manifest, nucleus.runs.history_of_version(bucket, manifest))
            for manifest in manifests
        ],
        out,
        as_json,
    )


def check_compared(given: Sequence[str], meant: Sequence[str], out: Path | None, what: str) -> None:
    """Check the arguments of a comparison.

    Args:
        given: Names as typed.
        meant: Full name for each.
        out: File of the picture; None for no picture.
        what: Noun for the error messages.

    Raises:
        UsageError: There are too few or too many names, a name is repeated, or the picture is not a PNG file.
    """
    if len(given) < 2 or len(given) > _MOST:
        raise UsageError(f"Expected two or more {what} (at most {_MOST}); found {len(given)}.")
    first: dict[str, str] = {}
    for text, name in zip(given, meant, strict=True):
        if name in first:
            both = f"{text} was given twice" if text == first[name] else f"{first[name]} and {text} are both {name}"
            raise UsageError(f"Expected different {what}; {both}.")
        first[name] = text
    if out is not None and out.suffix.lower() != ".png":
        raise UsageError(f"Expected --out to be a PNG file, such as curves.png; found {out}.")


def show_comparison(runs: "Sequence[ComparedRun]", out: Path | None, as_json: bool) -> None:
    """Print tables or JSON, warn if test scores do not compare, and write the picture."""
    warning = nucleus.runs.datasets_warning(runs)
    if warning:
        warn(warning)
    if as_json:
        names = [run.name for run in runs]
        different = nucleus.runs.recipe_differences(runs)
        print_json(
            {
                "compared": [_document(run) for run in runs],
                "metrics": [{**asdict(row), "differences": row.differences} for row in nucleus.runs.score_rows(runs)],
                "recipe": {
                    key: {names[place]: value for place, value in values.items()} for key, values in different.items()
                },
                "test_scores_compare": warning is None,
            }
        )
    else:
        _print_legend(runs)
        _print_facts(runs)
        _print_metrics(runs)
        _print_recipes(runs)
    if out is not None:
        _write_picture(runs, out)


def _document(run: "ComparedRun") -> dict[str, Any]:
    """The JSON document of a run, without the metrics and recipe, which have sections of their own."""
    values = {key: value for key, value in asdict(run).items() if key not in {"metrics", "recipe", "history"}}
    return {**values, "epochs": len(run.history), "epochs_asked": run.epochs_asked, "best": run.best}


def _print_legend(runs: "Sequence[ComparedRun]") -> None:
    """Print the letter of each run, which heads the columns because names may be too long."""
    lettered = list(zip(_letters(runs), runs, strict=True))
    if all(run.name == run.run for run in runs):
        print_table(("", "run"), [(letter, run.run) for letter, run in lettered])
    else:
        print_table(("", "version", "run"), [(letter, one.name, one.run) for letter, one in lettered])


def _print_facts(runs: "Sequence[ComparedRun]") -> None:
    """Print state, settings and cost; commit and package versions only if they differ, and no row without a value."""
    always: list[tuple[str, Callable[[ComparedRun], Any]]] = [
        ("state", lambda one: one.state),
        ("dataset", lambda one: one.dataset.rpartition("/")[2]),
        ("encoder weights", lambda one: one.encoder_weights),
        ("epochs", lambda one: epochs_text(len(one.history), one.epochs_asked)),
        ("best epoch", lambda one: one.best and f"{one.best['epoch']:.0f}"),
        ("chosen by (before tuning)", lambda one: one.best and f"{one.monitor} {one.best[one.monitor]:.4f}"),
        ("begun (UTC)", lambda one: one.begun and moment_text(one.begun)),
        ("time", lambda one: time_text(one.seconds)),
        ("CPU time", lambda one: time_text(one.cpu_seconds)),
        ("GPU time", lambda one: time_text(one.gpu_seconds or None)),
        ("workers", lambda one: one.workers),
        ("device", lambda one: one.device),
    ]
    rows = [(title, [value(run) for run in runs]) for title, value in always]
    packages = dict.fromkeys(package for run in runs for package in run.versions)
    different = [("commit", [commit_text(run.commit) for run in runs])]
    different += [(package, [run.versions.get(package) for run in runs]) for package in packages]
    rows += [
        (title, values) for title, values in different if len({value for value in values if value is not None}) > 1
    ]
    known = [(title, values) for title, values in rows if any(value is not None for value in values)]
    click.echo()
    _print_beside(runs, "what", [title for title, _ in known], [values for _, values in known])


def _print_metrics(runs: "Sequence[ComparedRun]") -> None:
    rows = nucleus.runs.score_rows(runs)
    if not rows:
        note("No scores: no run has ended.")
        return
    first, *others = _letters(runs)
    with_differences = len(others) < _MOST_DIFFERENCES or not sys.stdout.isatty()
    columns, cells = ["split", "kind", "metric", first], []
    for letter in others:
        columns += [letter, f"{letter}-{first}"] if with_differences else [letter]
    for row in rows:
        line = [row.split, row.kind, row.title, score_text(row.values[0])]
        for value, difference in zip(row.values[1:], row.differences[1:], strict=True):
            line += [score_text(value), score_text(difference, "+")] if with_differences else [score_text(value)]
        cells.append(line)
    click.echo()
    print_table(columns, cells, title="Mean over images, by the best weights and the tuned thresholds")
    if not with_differences:
        note(f"Left out: the differences to {first}. To see them, use a pipe or --json.")


def _print_recipes(runs: "Sequence[ComparedRun]") -> None:
    different = nucleus.runs.recipe_differences(runs)
    if not different:
        note("The recipes are the same.")
        return
    places = range(len(runs))
    values = [[found.get(place, MISSING) for place in places] for found in different.values()]
    click.echo()
    _print_beside(runs, "recipe", list(different), values, title="Differences of the recipes")


def _print_beside(
    runs: "Sequence[ComparedRun]",
    what: str,
    keys: Sequence[str],
    values: Sequence[Sequence[Any]],
    title: str | None = None,
) -> None:
    """Print a table with one row per key and one column per run."""
    rows = [[key, *map(value_text, row)] for key, row in zip(keys, values, strict=True)]
    print_table([what, *_letters(runs)], rows, title=title)


def _write_picture(runs: "Sequence[ComparedRun]", out: Path) -> None:
    for run in runs:
        if not run.history:
            warn(f"{run.name} has no history, so its curves are missing")
    nucleus.storage.write_atomic(out, nucleus.report.encode_figure(nucleus.report.draw_curves(runs)))
    note(f"curves: {out}")


def _letters(runs: Iterable[object]) -> list[str]:
    """The letters of the runs in the tables and the picture."""
    return [chr(ord("A") + place) for place, _ in enumerate(runs)]
