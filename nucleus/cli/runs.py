"""`nucleus runs`: list, show and compare the training runs in the bucket."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import nucleus
from nucleus.cli.compare import check_compared, picture_option, show_comparison
from nucleus.cli.options import json_option, project_bucket
from nucleus.cli.output import note, print_json, print_scores, print_table, warn
from nucleus.cli.progress_bars import show_progress
from nucleus.text import MISSING, commit_text, epochs_text, moment_text, score_text, time_text, value_text

if TYPE_CHECKING:
    from nucleus.runs.listing import StoredRun
    from nucleus.runs.run_rows import RunRow
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
"""Keys of the recipe that `show` prints; `--json` has all keys."""
_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("run", lambda row: row["run"]),
    ("model", lambda row: value_text(row["model"])),
    ("state", lambda row: row["version"] or row["state"]),
    ("epochs", lambda row: epochs_text(row["epochs"] or 0, row["epochs_asked"])),
    ("epoch mAP", lambda row: score_text(row["best_epoch_map"])),
    ("val mAP", lambda row: score_text(row["val_map"])),
    ("test mAP", lambda row: score_text(row["test_map"])),
    ("dataset", lambda row: row["dataset"].rpartition("/")[2] if row["dataset"] else MISSING),
    ("begun (UTC)", lambda row: moment_text(row["begun"])),
    ("last write", lambda row: moment_text(row["last_write"])),
    ("details", lambda row: row["details"]),
)
"""Columns of the list: title, and text of a row's cell."""
_UNTUNED = "(before the thresholds were tuned)"
_ON_TERMINAL = ("run", "state", "epochs", "epoch mAP", "test mAP")
"""Columns of the list that fit on a terminal of 80 columns."""


@click.group()
def runs() -> None:
    """Training runs in the bucket NUCLEUS_BUCKET, in any state."""


@runs.command("list")
@click.option("--model", metavar="NAME", help="Only runs of this model.")
@click.option("--group", metavar="GROUP", help="Only runs of this group, such as the name of a sweep.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the N newest.")
@json_option
def list_(model: str | None, group: str | None, limit: int | None, as_json: bool) -> None:
    """List the runs, newest first.

    The state is NAME@N (published as that version), `running`, `stopped` (can be resumed), `failed`, `lost` (running,
    but its driver has sent no heartbeat for 5 minutes), `finished` (a sweep's trial that was not published) or
    `unknown` (trained by an older version of this package). `epoch mAP` is the validation mAP of the best epoch, `val
    mAP` that of the same weights after the thresholds were tuned, as in `nucleus models list`.
    """
    found = nucleus.runs.list_runs(project_bucket(nucleus.runs.RUNS), model=model, group=group, limit=limit, warn=warn)
    rows = [_values(row) for row in found]
    if as_json:
        print_json(rows)
        return
    if not rows:
        note("No runs." if model is None and group is None else "No runs of this model or group.")
    terminal = sys.stdout.isatty()
    columns = [(title, cell) for title, cell in _COLUMNS if title in _ON_TERMINAL or not terminal]
    print_table([title for title, _ in columns], [[cell(row) for _, cell in columns] for row in rows])
    if terminal and rows:
        left_out = ", ".join(title for title, _ in _COLUMNS if title not in _ON_TERMINAL)
        note(f"Left out: {left_out}. To see all columns, use a pipe or --json. For one run: nucleus runs show RUN")


@runs.command()
@click.argument("run")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Download the report and the offline W&B files to this folder.",
)
@json_option
def show(run: str, out: Path | None, as_json: bool) -> None:
    """Show the settings, state, scores and cost of RUN, and the locations of its files."""
    bucket = project_bucket(nucleus.runs.RUNS)
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
    """Compare runs: scores, recipes, datasets and cost. Differences are relative to the first run."""
    check_compared(runs, runs, out, "runs")
    found = nucleus.runs.find_runs(project_bucket(nucleus.runs.RUNS), runs, warn)
    show_comparison([nucleus.runs.of_run(run) for run in found], out, as_json)


def _values(row: "RunRow") -> dict[str, Any]:
    """A row of the list as JSON values; None stands for an unknown one."""
    found = row.model_dump()
    moments = {name: found[name] and found[name].isoformat() for name in ("last_heard", "begun", "last_write")}
    return found | moments


def _document(bucket: "Bucket", run: "StoredRun", out: Path | None) -> dict[str, Any]:
    """The JSON document of a run."""
    record = run.record
    return {
        **_values(nucleus.runs.row_of_run(run)),
        "recipe": run.plan.settings,
        "encoder_weights": run.plan.weights.model_dump(),
        "start": run.plan.start and run.plan.start.model_dump(exclude={"scores"}),
        "mix": run.plan.mix,
        "metrics": run.metrics,
        "history": run.history,
        "record": record and record.model_dump(mode="json", exclude={"recipe", "metrics", "history"}),
        "places": _places(bucket, run),
        "report": str(out.absolute()) if out is not None else None,
    }


def _places(bucket: "Bucket", run: "StoredRun") -> dict[str, str]:
    """Addresses of a run's files in the bucket, without those that do not exist."""
    home = nucleus.runs.RunFolder(bucket, run.run)
    places = {"dataset": run.plan.dataset, "run": str(home.uri())}
    checkpoints = [name for name in run.folders if name.startswith(nucleus.runs.CHECKPOINT_PREFIX)]
    if checkpoints:
        places["last checkpoint"] = str(home.uri(checkpoints[-1]))
    if run.record is not None:
        places["report"] = str(home.uri(nucleus.runs.REPORT_FOLDER, nucleus.runs.REPORT_PAGE))
    others = (nucleus.tracking.TENSORBOARD_FOLDER, nucleus.runs.WANDB_FOLDER)
    places |= {name: str(home.uri(name)) for name in others if name in run.folders}
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
    for name, place in _places(bucket, run).items():  # not a table, which would truncate them
        click.echo(f"{name}: {place}")


def _facts(run: "StoredRun") -> list[tuple[str, Any]]:
    """Titles and values of a run's settings, state and cost; None stands for an unknown value."""
    record, best = run.record, run.best
    facts: list[tuple[str, Any]] = [
        ("run", run.run),
        ("model", run.model),
        ("group", run.plan.group),
        ("state", run.status.text),
        ("gate", record and record.gate),
        ("dataset", run.plan.dataset.rpartition("/")[2]),
        ("mix", ", ".join(f"{share:g} of {name.rpartition('/')[2]}" for name, share in run.plan.mix.items()) or None),
        ("start", run.plan.start and str(run.plan.start)),
        ("encoder weights", run.plan.weights.source),
        *((key, nucleus.runs.setting(run.plan.settings, key)) for key in _SETTINGS),
        ("epochs", epochs_text(*run.epochs)),
        ("best epoch", best and f"{best['epoch']:.0f}: {run.monitor} {best[run.monitor]:.4f} {_UNTUNED}"),
        ("begun (UTC)", moment_text(record.begun if record else run.begun)),
        ("last write", moment_text(run.written)),
    ]
    if record is not None:
        facts += [
            ("ended", moment_text(record.ended)),
            ("workers", f"{record.workers}{', each' if record.workers > 1 else ''} on {record.device}"),
            ("restarts", "; ".join(nucleus.report.restarts_of(record)) or None),
            ("CPU time", time_text(record.cpu_seconds)),
            ("GPU time", time_text(record.gpu_seconds or None)),
            ("commit", commit_text(record.commit)),
            ("versions", ", ".join(f"{name} {text}" for name, text in record.versions.items())),
            ("W&B", record.tracked),
        ]
    return facts
