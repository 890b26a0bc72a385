"""`nucleus models compare`, and what it shares with `nucleus runs compare`: contenders beside each other."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import nucleus
from nucleus.cli.options import json_option, project_bucket
from nucleus.cli.output import note, print_json, print_table, warn
from nucleus.errors import UsageError
from nucleus.text import MISSING, commit_text, epochs_text, score_text, time_text, value_text

if TYPE_CHECKING:
    from nucleus.runs.comparison import Contender

__all__ = ["check_contenders", "compare_models", "picture_option", "show_comparison"]


_MOST = 26
"""Contenders at most: the letters of the alphabet."""

Command = TypeVar("Command", bound=Callable[..., Any])


def picture_option(command: Command) -> Command:
    """`--out FILE.png`: the curves of all contenders."""
    option = click.option(
        "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write a picture of the curves to this PNG."
    )
    return option(command)


@click.command("compare")
@click.argument("models", nargs=-1, required=True, metavar="MODEL MODEL...")
@picture_option
@json_option
def compare_models(models: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Compare versions, each NAME[@REF]: scores, and what was different about recipe and dataset.

    Differences are to the first. Versions of different models compare too.
    """

    references = [nucleus.config.parse_reference(model, "model") for model in models]
    check_contenders(models, models, out, "versions, such as dsb2018@1 dsb2018@2")
    bucket = project_bucket("models/")
    numbers = [nucleus.registry.resolve_version(bucket, reference) for reference in references]
    names = [f"{reference.name}@{number}" for reference, number in zip(references, numbers, strict=True)]
    check_contenders(models, names, out, "versions, such as dsb2018@1 dsb2018@2")
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


def check_contenders(given: Sequence[str], meant: Sequence[str], out: Path | None, what: str) -> None:
    """Raise `UsageError` if these cannot be compared.

    Args:
        given: As they were typed.
        meant: What each stands for.
        out: The picture.
        what: What is compared, in words.
    """
    if len(given) < 2 or len(given) > _MOST:
        raise UsageError(f"Expected two or more {what} (at most {_MOST}); found {len(given)}.")
    first: dict[str, str] = {}
    for text, name in zip(given, meant, strict=True):
        if name in first:
            both = f"{text} was given twice" if text == first[name] else f"{first[name]} and {text} are both {name}"
            raise UsageError(f"Expected different {what}; {both}, and nothing differs from itself.")
        first[name] = text
    if out is not None and out.suffix.lower() != ".png":
        raise UsageError(f"Expected --out to name a PNG, such as curves.png; found {out}.")


def show_comparison(contenders: "Sequence[Contender]", out: Path | None, as_json: bool) -> None:
    """Tables or JSON on stdout, a warning if scores do not compare, and the picture."""

    apart = nucleus.runs.scored_apart(contenders)
    if apart:
        warn(apart)
    if as_json:
        names = [contender.name for contender in contenders]
        different = nucleus.runs.recipe_differences(contenders)
        print_json(
            {
                "contenders": [_document(contender) for contender in contenders],
                "metrics": [
                    {**asdict(row), "differences": row.differences} for row in nucleus.runs.score_rows(contenders)
                ],
                "recipe": {
                    key: {names[place]: value for place, value in values.items()} for key, values in different.items()
                },
                "test_scores_compare": apart is None,
            }
        )
    else:
        _print_legend(contenders)
        _print_facts(contenders)
        _print_metrics(contenders)
        _print_recipes(contenders)
    if out is not None:
        _write_picture(contenders, out)


def _document(contender: "Contender") -> dict[str, Any]:
    """A contender for machines; its metrics and recipe have places of their own."""
    said = {key: value for key, value in asdict(contender).items() if key not in {"metrics", "recipe", "history"}}
    return {**said, "epochs": len(contender.history), "epochs_asked": contender.epochs_asked, "best": contender.best}


def _print_legend(contenders: "Sequence[Contender]") -> None:
    """Which letter is whose: names may be too long to stand beside each other."""

    lettered = list(zip(_letters(contenders), contenders, strict=True))
    if all(contender.name == contender.run for contender in contenders):
        print_table(("", "run"), [(letter, contender.run) for letter, contender in lettered])
    else:
        print_table(("", "version", "run"), [(letter, one.name, one.run) for letter, one in lettered])


def _print_facts(contenders: "Sequence[Contender]") -> None:
    """What each is and cost; versions only where those known differ, and only what is known of at least one."""
    always: list[tuple[str, Callable[[Contender], Any]]] = [
        ("state", lambda one: one.state),
        ("dataset", lambda one: one.dataset.rpartition("/")[2]),
        ("encoder weights", lambda one: one.encoder_weights),
        ("epochs", lambda one: epochs_text(len(one.history), one.epochs_asked)),
        ("best epoch", lambda one: one.best and f"{one.best['epoch'] + 1:.0f}"),
        ("chosen by", lambda one: one.best and f"{one.monitor} {one.best[one.monitor]:.4f}"),
        ("begun (UTC)", lambda one: one.begun and one.begun[:16].replace("T", " ")),
        ("time", lambda one: time_text(one.seconds)),
        ("CPU time", lambda one: time_text(one.cpu_seconds)),
        ("GPU time", lambda one: time_text(one.gpu_seconds or None)),
        ("workers", lambda one: one.workers),
        ("device", lambda one: one.device),
    ]
    rows = [(title, [value(contender) for contender in contenders]) for title, value in always]
    packages = dict.fromkeys(package for contender in contenders for package in contender.versions)
    different = [("commit", [commit_text(contender.commit) for contender in contenders])]
    different += [(package, [contender.versions.get(package) for contender in contenders]) for package in packages]
    rows += [
        (title, values) for title, values in different if len({value for value in values if value is not None}) > 1
    ]
    known = [(title, values) for title, values in rows if any(value is not None for value in values)]
    click.echo()
    _print_beside(contenders, "what", [title for title, _ in known], [values for _, values in known])


def _print_metrics(contenders: "Sequence[Contender]") -> None:

    rows = nucleus.runs.score_rows(contenders)
    if not rows:
        note("No scores: none has ended.")
        return
    first, *others = _letters(contenders)
    columns = ["split", "kind", "metric", first]
    for letter in others:
        columns += [letter, f"{letter}-{first}"]
    cells = []
    for row in rows:
        line = [row.split, row.kind, row.title, score_text(row.values[0])]
        for value, difference in zip(row.values[1:], row.differences[1:], strict=True):
            line += [score_text(value), score_text(difference, "+")]
        cells.append(line)
    click.echo()
    print_table(columns, cells, title="Mean over images, by the best weights")


def _print_recipes(contenders: "Sequence[Contender]") -> None:

    different = nucleus.runs.recipe_differences(contenders)
    if not different:
        note("The recipes are the same.")
        return
    places = range(len(contenders))
    values = [[found.get(place, MISSING) for place in places] for found in different.values()]
    click.echo()
    _print_beside(contenders, "recipe", list(different), values, title="Where the recipes differ")


def _print_beside(
    contenders: "Sequence[Contender]",
    what: str,
    keys: Sequence[str],
    values: Sequence[Sequence[Any]],
    title: str | None = None,
) -> None:
    """A row for each key, with the value of each contender."""

    rows = [[key, *map(value_text, row)] for key, row in zip(keys, values, strict=True)]
    print_table([what, *_letters(contenders)], rows, title=title)


def _write_picture(contenders: "Sequence[Contender]", out: Path) -> None:

    for contender in contenders:
        if not contender.history:
            warn(f"{contender.name} has no history, and so no curves")
    nucleus.storage.write_atomic(out, nucleus.report.encode_figure(nucleus.report.draw_curves(contenders)))
    note(f"curves: {out}")


def _letters(contenders: Iterable[object]) -> list[str]:
    """How contenders are called in tables and in the picture."""
    return [chr(ord("A") + place) for place, _ in enumerate(contenders)]
