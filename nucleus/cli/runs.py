"""`nucleus runs`: the training runs in the bucket: list, show and compare."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
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
"""Keys of the recipe that `show` prints; `--json` has all of them."""
_COLUMNS: "tuple[tuple[str, Callable[[dict[str, Any]], str]], ...]" = (
    ("run", lambda row: row["run"]),
    ("model", lambda row: value_text(row["model"])),
    ("state", lambda row: row["version"] or row["state"]),
    ("epochs", lambda row: epochs_text(row["epochs"] or 0, row["epochs_asked"])),
    ("epoch mAP", lambda row: score_text(row["best_epoch_map"])),
    ("val mAP", lambda row: score_text(row["val_map"])),
    ("test mAP", lambda row: score_text(row["test_map"])),
    ("dataset", lambda row: row["dataset"].rpartition("/")[2] if row["dataset"] else MISSING),
    ("begun (UTC)", lambda row: _minute(row["begun"])),
    ("last write", lambda row: _minute(row["last_write"])),
    ("details", lambda row: row["details"]),
)
"""The columns of the list."""
_ON_TERMINAL = ("run", "state", "epochs", "epoch mAP", "test mAP")
"""Those that a terminal of 80 columns has room for."""


@click.group()
def runs() -> None:
    """Training runs in the bucket NUCLEUS_BUCKET, whatever their state."""


@runs.command("list")
@click.option("--model", metavar="NAME", help="Only runs of this model.")
@click.option("--group", metavar="GROUP", help="Only runs of this group, such as a sweep.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the N newest.")
@json_option
def list_(model: str | None, group: str | None, limit: int | None, as_json: bool) -> None:
    """List the runs, the newest first.

    State: NAME@N is published as that version; `running`; `stopped`, which can go on; `failed`; `lost`: it ran, and its
    driver was not heard of for 5 minutes; `finished`, a sweep's trial that is not published; `unknown`: an older
    version of this package trained it. `epoch mAP` is the validation mAP of the best epoch, `val mAP` that of the same
    weights after the thresholds were tuned, as `nucleus models list` shows it.
    """

    found = nucleus.runs.list_runs(project_bucket(nucleus.runs.RUNS), model=model, group=group, limit=limit, warn=warn)
    rows = [_row(run) for run in found]
    if as_json:
        print_json(rows)
        return
    if not rows:
        note("No runs." if model is None and group is None else "No such runs.")
    terminal = sys.stdout.isatty()
    columns = [(title, cell) for title, cell in _COLUMNS if title in _ON_TERMINAL or not terminal]
    print_table([title for title, _ in columns], [[cell(row) for _, cell in columns] for row in rows])
    if terminal and rows:
        left_out = ", ".join(title for title, _ in _COLUMNS if title not in _ON_TERMINAL)
        note(f"Left out: {left_out}. A pipe or --json has all; nucleus runs show RUN tells more of one.")


@runs.command()
@click.argument("run")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Download its report, and what W&B lacks, to here."
)
@json_option
def show(run: str, out: Path | None, as_json: bool) -> None:
    """Show what RUN is, where it stands, what it reached and cost, and where everything is."""

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
    """Compare runs: scores, recipes, datasets and cost. Differences are to the first."""

    check_compared(runs, runs, out, "runs")
    found = nucleus.runs.find_runs(project_bucket(nucleus.runs.RUNS), runs, warn)
    show_comparison([nucleus.runs.of_run(run) for run in found], out, as_json)


def _row(run: "StoredRun | DamagedRun") -> dict[str, Any]:
    """A run in the list, for machines; None is what is not known."""

    plan = run.plan
    scores = ("monitor", "best_epoch", "best_score", "best_epoch_map", "val_map", "test_map")
    row: dict[str, Any] = {
        "run": run.run,
        "model": plan and plan.model,
        "group": plan and plan.group,
        "state": "damaged",
        **dict.fromkeys(("version", "since", "host", "process", "last_heard", "cause", "details")),
        **dict.fromkeys(("epochs", "epochs_asked", *scores)),
        "dataset": plan and plan.dataset,
        "begun": run.begun.isoformat(),
        "last_write": run.written.isoformat(),
    }
    if isinstance(run, nucleus.runs.DamagedRun):
        return row | {"details": " ".join(run.problem.split())}
    best, status = run.best, run.status
    done, asked = run.epochs
    return row | {
        **asdict(status),
        "last_heard": status.last_heard and status.last_heard.isoformat(),
        "details": status.text,
        "epochs": done or None,
        "epochs_asked": asked,
        "monitor": run.monitor,
        "best_epoch": best and int(best["epoch"]),
        "best_score": best and best[run.monitor],
        "best_epoch_map": best and best.get("val_map"),
        "val_map": run.metrics.get("val", {}).get("all", {}).get("map"),
        "test_map": run.metrics.get("test", {}).get("all", {}).get("map"),
    }


def _minute(moment: str) -> str:
    return moment_text(datetime.fromisoformat(moment))


def _document(bucket: "Bucket", run: "StoredRun", out: Path | None) -> dict[str, Any]:
    """Everything known about a run, for machines."""
    record = run.record
    return {
        **_row(run),
        "recipe": run.plan.settings,
        "encoder_weights": run.plan.weights.model_dump(),
        "metrics": run.metrics,
        "history": run.history,
        "record": record and record.model_dump(mode="json", exclude={"recipe", "metrics", "history"}),
        "places": _places(bucket, run),
        "report": str(out.absolute()) if out is not None else None,
    }


def _places(bucket: "Bucket", run: "StoredRun") -> dict[str, str]:
    """Places in the bucket of what a run has left; only what is there."""

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
    for name, place in _places(bucket, run).items():  # in lines, where a table would cut what is too long
        click.echo(f"{name}: {place}")


def _scores(split: str, kind: str, scores: "Mapping[str, float]") -> list[str]:
    """A row of the table of scores; old runs lack some."""
    images = f"{scores['images']:.0f}" if "images" in scores else MISSING
    return [split, kind, images, *(score_text(scores.get(metric)) for metric, _ in nucleus.metrics.HEADLINES)]


def _facts(run: "StoredRun") -> list[tuple[str, Any]]:
    """Facts about a run: what it is, where it stands and what it cost; None is what is not known."""

    record, best = run.record, run.best
    facts: list[tuple[str, Any]] = [
        ("run", run.run),
        ("model", run.model),
        ("group", run.plan.group),
        ("state", run.status.text),
        ("gate", record and record.gate),
        ("dataset", run.plan.dataset.rpartition("/")[2]),
        ("encoder weights", run.plan.weights.source),
        *((key, nucleus.runs.setting(run.plan.settings, key)) for key in _SETTINGS),
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
