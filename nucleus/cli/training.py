"""`nucleus train` and `nucleus sweep`: training runs on a Ray cluster, and the table of their results."""

import importlib.util
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import click

import job
import nucleus
from nucleus.cli.options import check_run_options, out_option, run_options, single_writer_option, training_command
from nucleus.cli.output import print_facts, print_json, print_scores, print_table, warn
from nucleus.cli.progress_bars import TrainingDisplay
from nucleus.errors import NucleusError, StorageError

if TYPE_CHECKING:
    from job.sweep import SweepResult
    from nucleus.registry.manifest import ModelManifest
    from nucleus.runs.plan import RunFolder, RunPlan
    from nucleus.storage.bucket import Bucket

__all__ = ["print_published", "short_path", "sweep", "train"]


_WANDB = "https://wandb.ai"
"""Address of W&B without WANDB_BASE_URL."""


@click.command()
@run_options
@out_option
@click.option("--json", "as_json", is_flag=True, help="Print the published version's manifest as JSON.")
@click.pass_context
@training_command
def train(
    ctx: click.Context,
    recipe: str | None,
    settings: tuple[str, ...],
    run: str | None,
    resume: str | None,
    single_writer: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Train by RECIPE (a TOML file, or a shipped recipe: demo, dsb2018-cpu, dsb2018-long, dsb2018-gpu, nuclei).

    Uses the Ray cluster of RAY_ADDRESS or one on this machine, or starts one for the run. --resume needs no RECIPE; if
    one is given, it must be the one that the run started with. Ctrl-C saves a checkpoint and stops; a second one ends
    the run at once.
    """
    check_run_options(recipe, settings, run, resume)
    content = nucleus.config.read_recipe(nucleus.config.recipe_path(recipe), settings) if recipe else None
    bucket = content.bucket if content else None
    verbose = bool(ctx.find_root().params.get("debug"))
    options = job.RunOptions(run=run, verbose=verbose, single_writer=single_writer, folder=out)
    if run:
        nucleus.runs.check_new_run(options.bucket(bucket), run, f"nucleus train --resume {run}")
    with TrainingDisplay() as display:
        if content is None or resume:
            manifest = job.resume(str(resume), bucket, options, display, content)
        else:
            manifest = job.train(content, options, display)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
    else:
        print_published(manifest, options.local_folder, bucket)


@click.command()
@click.argument("recipe")
@click.option(
    "--over",
    multiple=True,
    required=True,
    metavar="KEY=V1,V2,...",
    help="Train with each value, such as optimizer.learning_rate=1e-4,1e-3; with several keys, every combination.",
)
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a key for all trials.")
@click.option("--name", metavar="NAME", help="Name of the sweep.  [default: name of the model, date and time]")
@click.option(
    "--at-once",
    type=click.IntRange(1),
    metavar="N",
    help="Parallel trials at most.  [default: as many as fit]",
)
@single_writer_option
@out_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
@training_command
def sweep(
    ctx: click.Context,
    recipe: str,
    over: tuple[str, ...],
    settings: tuple[str, ...],
    name: str | None,
    at_once: int | None,
    single_writer: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Train by RECIPE several times with different settings (Ray Tune), and publish only the best run.

    The best run has the highest gate.metric on the validation split. All runs are one group in W&B.
    """
    path = nucleus.config.recipe_path(recipe)
    trials = [
        job.Trial(each, nucleus.config.read_recipe(path, [*settings, *each]))
        for each in nucleus.config.combinations(over)
    ]
    generated = nucleus.runs.new_run_name(trials[0].recipe.model[:36])  # short enough for the suffix -01
    sweep_name = nucleus.config.check_name(name, "sweep") if name else generated
    verbose = bool(ctx.find_root().params.get("debug"))
    options = job.RunOptions(verbose=verbose, single_writer=single_writer, folder=out)
    with TrainingDisplay() as display:
        found = job.sweep(sweep_name, trials, options, display, at_once)
    if as_json:
        published = found.published.model_dump(mode="json")
        print_json({"sweep": sweep_name, "trials": [asdict(each) for each in found.outcomes], "published": published})
    else:
        _print_sweep(found, options.local_folder, trials[0].recipe.bucket)


def _print_sweep(found: "SweepResult", runs: Path, bucket: str | None) -> None:
    for outcome in found.outcomes:
        if outcome.error is not None:
            warn(f"{outcome.run} ({' '.join(outcome.settings)}) did not finish: {outcome.error}")
    metric = found.published.origin.recipe["gate"]["metric"]
    print_table(
        ("run", "settings", f"val {metric}"),
        [
            (each.run, " ".join(each.settings), "failed" if each.score is None else f"{each.score:.4f}")
            for each in found.outcomes
        ],
    )
    print_published(found.published, runs, bucket)


def print_published(
    manifest: "ModelManifest",
    runs: Path,
    bucket_uri: str | None = None,
    more: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Print the scores of a published version, then a table of the locations of all results and of the next commands.

    Locations that cannot be read are left out with a warning, because the version is published.

    Args:
        manifest: Manifest of the version.
        runs: Folder on this machine with the reports of runs, in `<run>/`.
        bucket_uri: Bucket of the recipe; None for that of the environment.
        more: Rows for further results of the command.
    """
    print_scores(manifest.origin.metrics)
    bucket = nucleus.storage.Bucket(nucleus.storage.bucket_from_environment(bucket_uri))
    version = f"{manifest.model}@{manifest.version}"
    rows: dict[str, object] = {
        "published": f"{version} at {bucket.uri / nucleus.registry.version_prefix(manifest.model, manifest.version)}"
    }
    try:
        rows |= _places(manifest, bucket, runs / manifest.origin.run)
    except (NucleusError, OSError) as error:
        warn(f"{version} is published; the locations of the run's other results could not be read: {error}")
    changes = nucleus.registry.before_and_after(manifest.origin, manifest.origin.recipe["gate"]["metric"])
    print_facts({**rows, **changes, **more, **_commands(manifest)}, ("what", "where"))


def _places(manifest: "ModelManifest", bucket: "Bucket", folder: Path) -> dict[str, object]:
    """A row per result of the run, with a location that its reader can open."""
    plan = nucleus.runs.load_plan(bucket, manifest.origin.run)
    home = nucleus.runs.RunFolder(bucket, plan.run)
    rows: dict[str, object] = {**_alias(manifest, bucket, plan), "run": str(home.uri())}
    if job.is_submitted_job():  # the log is read on another machine
        return rows | {
            "report": str(home.uri(nucleus.runs.REPORT_FOLDER, nucleus.runs.REPORT_PAGE)),
            "TensorBoard": str(home.uri(nucleus.tracking.TENSORBOARD_FOLDER)),
            "W&B": _wandb(manifest, plan, here=False),
            "download": f"nucleus runs show {plan.run} --out DIR",
        }
    return rows | {
        "report": short_path(folder / nucleus.runs.REPORT_FOLDER / nucleus.runs.REPORT_PAGE),
        "TensorBoard": _tensorboard(home, folder),
        "W&B": _wandb(manifest, plan, here=True),
    }


def _commands(manifest: "ModelManifest") -> dict[str, str]:
    """Rows with the next commands."""
    version = f"{manifest.model}@{manifest.version}"
    rows = {"predict": f"nucleus predict IMAGES --model {version} --out results/"}
    if manifest.version > 1:
        rows["compare"] = f"nucleus models compare {manifest.model}@{manifest.version - 1} {version}"
    return rows


def _alias(manifest: "ModelManifest", bucket: "Bucket", plan: "RunPlan") -> dict[str, str]:
    """The row for the recipe's alias: whether it moved, and why."""
    gate = plan.recipe.gate
    if not gate.enabled:
        return {gate.alias: "not moved: gate.enabled = false"}
    decision = nucleus.registry.read_decision(bucket, manifest.model, manifest.version)
    if decision is None:
        return {gate.alias: f"not judged. Run: nucleus models alias {manifest.model}@{manifest.version} {gate.alias}"}
    return {decision.alias: decision.outcome}


def _tensorboard(home: "RunFolder", folder: Path) -> str:
    """Download the run's event file to this machine, and return the command that shows it."""
    file = nucleus.tracking.EVENTS_FILE
    try:
        home.bucket.download(home.key(file), folder / file)
    except (StorageError, OSError) as error:  # the version is published
        return f"{home.uri(file)} (not downloaded: {error})"
    missing = "" if importlib.util.find_spec("tensorboard") else f"  ({nucleus.lazy.pip_install('tensorboard')})"
    return f"tensorboard --logdir {shlex.quote(str(short_path((folder / file).parent)))}{missing}"


def _wandb(manifest: "ModelManifest", plan: "RunPlan", *, here: bool) -> str:
    """The run's page in W&B, or the command that sends its offline files, from this machine (`here`) or the bucket."""
    mode = manifest.origin.wandb_mode or plan.wandb_mode  # W&B may have failed during the run
    if mode == "disabled":
        return "off"
    if mode == "online":
        project, _, run = (manifest.origin.wandb_run or plan.run).rpartition("/")
        return f"{os.environ.get('WANDB_BASE_URL', _WANDB).rstrip('/')}/{project}/runs/{run}"
    files = nucleus.tracking.offline_files(Path(plan.wandb_dir), plan.run) if here else []
    if files:
        return nucleus.tracking.sync_command([short_path(file.parent) for file in files])
    options, attempts = ("", "offline-run-*") if plan.wandb_mode == "offline" else ("--include-online ", "*run-*")
    return f"nucleus runs show {plan.run} --out DIR; wandb sync {options}DIR/{nucleus.runs.WANDB_FOLDER}/{attempts}"


def short_path(path: Path) -> Path:
    """Return a path relative to the current folder if it is below it, and if that folder still exists."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return path
    return path.relative_to(here) if path.is_relative_to(here) else path
