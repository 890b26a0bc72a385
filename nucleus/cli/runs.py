"""`nucleus runs`: the training runs in the bucket: list, show and compare."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import nucleus
from nucleus.cli.compare import check_contenders, picture_option, show_comparison
from nucleus.cli.options import json_option, project_bucket
from nucleus.cli.output import note, print_json, print_scores, print_table, warn
from nucleus.cli.progress_bars import show_progress
from nucleus.text import MISSING, commit_text, epochs_text, moment_text, score_text, time_text, value_text

if TYPE_CHECKING:
    from nucleus.runs.listing import DamagedRun, StoredRun
    from nucleus.storage.bucket import Bucket

__all__ = ["runs"]

_SETTINGS = (
    "network.encoder",
    "network.heads",
    "input.crop",
    "input.batch_size",
    "optimizer.learning_rate",
    "optimizer.precision",
    "optimizer.monitor",
    "seed",
)
"""What `show` tells of a recipe; `--json` has all of it."""
_CELLS: "tuple[tuple[str, Callable[[StoredRun | DamagedRun, dict[str, Any]], str]], ...]" = (
    ("run", lambda _, row: row["run"]),
    ("model", lambda _, row: value_text(row["model"])),
    ("state", lambda _, row: row["state"]),
    ("epochs", lambda _, row: epochs_text(row["epochs"] or 0, row["epochs_asked"])),
    ("val mAP", lambda _, row: score_text(row["val_map"])),
    ("test mAP", lambda _, row: score_text(row["test_map"])),
    ("dataset", lambda _, row: row["dataset"].rpartition("/")[2] if row["dataset"] else MISSING),
    ("begun (UTC)", lambda run, _: moment_text(run.begun)),
    ("last write", lambda run, _: moment_text(run.written)),
)
"""The columns of the list."""


@click.group()
def runs() -> None:
    """Training runs in the bucket NUCLEUS_BUCKET, those that go on, were stopped or have ended."""


@runs.command("list")
@click.option("--model", metavar="NAME", help="Only runs of this model.")
@click.option("--group", metavar="GROUP", help="Only runs of this group, such as a sweep.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the N newest.")
@json_option
def list_(model: str | None, group: str | None, limit: int | None, as_json: bool) -> None:
    """List the runs, the newest first.

    State: `published as NAME@N`; `finished` is a sweep's trial that was not published;
    `no record`: it goes on, was stopped or failed, or ended before runs left records; its last write may tell.
    `val mAP` is that of the epoch whose weights were best by the recipe's monitor, before the thresholds were tuned.
    """

    found = nucleus.runs.list_runs(project_bucket("runs/"), model=model, group=group, limit=limit, warn=warn)
    rows = [_row(run) for run in found]
    if as_json:
        print_json(rows)
        return
    if not rows:
        note("No runs." if model is None and group is None else "No such runs.")
    cells = [[cell(run, row) for _, cell in _CELLS] for run, row in zip(found, rows, strict=True)]
    print_table([title for title, _ in _CELLS], cells)


@runs.command()
@click.argument("run")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Download its report, and what W&B lacks, to here."
)
@json_option
def show(run: str, out: Path | None, as_json: bool) -> None:
    """Show what RUN is, where it stands, what it reached and cost, and where everything is."""

    bucket = project_bucket("runs/")
    found = nucleus.runs.find_run(bucket, run, warn)
    if out is not None:
        with show_progress("download the report") as advance:
            nucleus.runs.download_report(bucket, run, out, advance)
    if as_json:
        print_json(_document(bucket, found, out))
        return
    _print_run(bucket, found)
    if out is not None:
        note(f"report: {out}")


@runs.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@picture_option
@json_option
def compare(runs: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Compare runs: scores, recipes, datasets and cost. Differences are to the first."""

    check_contenders(runs, runs, out, "runs")
    found = nucleus.runs.find_runs(project_bucket("runs/"), runs, warn)
    show_comparison([nucleus.runs.of_run(run) for run in found], out, as_json)


def _row(run: "StoredRun | DamagedRun") -> dict[str, Any]:
    """A run in the list, for machines; None is what is not known."""

    outline = run.outline
    row: dict[str, Any] = {
        "run": run.run,
        "model": outline and outline.recipe["model"],
        "group": outline and outline.group,
        "state": "damaged",
        "version": None,
        **dict.fromkeys(("epochs", "epochs_asked", "monitor", "best_epoch", "best_score", "val_map", "test_map")),
        "dataset": outline and outline.dataset,
        "begun": run.begun.isoformat(),
        "last_write": run.written.isoformat(),
    }
    if isinstance(run, nucleus.runs.DamagedRun):
        return row
    best = run.best
    done, asked = run.epochs
    return row | {
        "state": run.state,
        "version": run.published,
        "epochs": done or None,
        "epochs_asked": asked,
        "monitor": run.monitor,
        "best_epoch": best and int(best["epoch"]),
        "best_score": best and best[run.monitor],
        "val_map": best and best.get("val_map"),
        "test_map": run.metrics.get("test", {}).get("all", {}).get("map"),
    }


def _document(bucket: "Bucket", run: "StoredRun", out: Path | None) -> dict[str, Any]:
    """All that is known of a run, for machines."""
    record = run.record
    return {
        **_row(run),
        "recipe": run.outline.recipe,
        "encoder_weights": run.outline.weights.model_dump(),
        "metrics": run.metrics,
        "history": run.history,
        "record": record and record.model_dump(mode="json", exclude={"recipe", "metrics", "history"}),
        "places": _places(bucket, run),
        "report": str(out.absolute()) if out is not None else None,
    }


def _places(bucket: "Bucket", run: "StoredRun") -> dict[str, str]:
    """Where in the bucket what a run left is; only what is there."""

    home = bucket.uri / f"runs/{run.run}"
    places = {"dataset": run.outline.dataset, "run": str(home)}
    checkpoints = [name for name in run.folders if name.startswith("checkpoint")]
    if checkpoints:
        places["last checkpoint"] = str(home / checkpoints[-1])
    if run.record is not None:
        places["report"] = str(home / nucleus.runs.REPORT_FOLDER / nucleus.runs.REPORT_PAGE)
    places |= {name: str(home / name) for name in ("tensorboard", "wandb") if name in run.folders}
    if run.published:
        version = nucleus.config.parse_reference(run.published, "model")
        places["version"] = str(bucket.uri / nucleus.registry.version_prefix(version.name, int(version.ref)))
    return places


def _print_run(bucket: "Bucket", run: "StoredRun") -> None:

    known = [(title, value) for title, value in _facts(run) if value is not None]
    print_table(("what", "value"), [(title, value_text(value)) for title, value in known])
    if run.metrics:
        click.echo()
        print_scores(run.metrics)
    if run.record is not None:
        click.echo()
        print_table(("stage", "time"), [(stage.name, time_text(stage.seconds)) for stage in run.record.stages])
    click.echo()
    for name, place in _places(bucket, run).items():  # in lines, where a table would cut what is too long
        click.echo(f"{name}: {place}")


def _facts(run: "StoredRun") -> list[tuple[str, Any]]:
    """What a run is, where it stands and what it cost; None is what is not known."""

    record, best = run.record, run.best
    facts: list[tuple[str, Any]] = [
        ("run", run.run),
        ("model", run.model),
        ("group", run.outline.group),
        ("state", run.state),
        ("gate", record and record.gate),
        ("dataset", run.outline.dataset.rpartition("/")[2]),
        ("encoder weights", run.outline.weights.source),
        *((key, nucleus.runs.setting(run.outline.recipe, key)) for key in _SETTINGS),
        ("epochs", epochs_text(*run.epochs)),
        ("best epoch", best and f"{best['epoch'] + 1:.0f}: {run.monitor} {best[run.monitor]:.4f}"),
        ("begun (UTC)", record.begun[:16].replace("T", " ") if record else moment_text(run.begun)),
        ("last write", moment_text(run.written)),
    ]
    if record is not None:
        facts += [
            ("ended", record.ended[:16].replace("T", " ")),
            ("workers", f"{record.workers}, each on {record.device}"),
            ("CPU time", time_text(record.cpu_seconds)),
            ("GPU time", time_text(record.gpu_seconds or None)),
            ("commit", commit_text(record.commit)),
            ("versions", ", ".join(f"{name} {text}" for name, text in record.versions.items())),
            ("W&B", record.wandb_run),
        ]
    return facts
