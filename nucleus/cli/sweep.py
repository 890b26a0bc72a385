"""`nucleus sweep`: one recipe with different settings."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nucleus.cli.options import out_option, single_writer_option

if TYPE_CHECKING:
    from job.sweep import SweepResult

__all__ = ["sweep"]


@click.command()
@click.argument("recipe")
@click.option(
    "--over",
    multiple=True,
    required=True,
    metavar="KEY=V1,V2,...",
    help="Run with each of these values, as optimizer.learning_rate=1e-4,1e-3; of several keys every combination.",
)
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a key for all trials.")
@click.option("--name", metavar="NAME", help="Name of the sweep.  [default: the model's name and the moment]")
@click.option("--at-once", type=click.IntRange(1), metavar="N", help="Trials at once.  [default: as there is room]")
@single_writer_option
@out_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
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
    """Train by RECIPE several times with different settings (Ray Tune), and publish the best alone.

    The best is the one with the highest gate.metric on the validation split. All are one group in W&B.
    """
    from job.options import RunOptions
    from job.plan import new_run_name
    from job.recipes import recipe_path
    from job.sweep import Trial
    from job.sweep import sweep as run_sweep
    from nucleus.cli.output import print_json
    from nucleus.cli.training_display import TrainingDisplay
    from nucleus.config.combinations import combinations
    from nucleus.config.names import check_name
    from nucleus.config.recipe import read_recipe

    path = recipe_path(recipe)
    trials = [Trial(each, read_recipe(path, [*settings, *each])) for each in combinations(over)]
    sweep_name = check_name(name, "sweep") if name else new_run_name(trials[0].recipe.model[:36])  # with room for -01
    verbose = bool(ctx.find_root().params.get("debug"))
    options = RunOptions(verbose=verbose, single_writer=single_writer, folder=out)
    with TrainingDisplay() as display:
        found = run_sweep(sweep_name, trials, options, display, at_once)
    if as_json:
        published = found.published.model_dump(mode="json")
        print_json({"sweep": sweep_name, "trials": [asdict(each) for each in found.outcomes], "published": published})
    else:
        _print(found, options.local_folder, trials[0].recipe.bucket)


def _print(found: "SweepResult", runs: Path, bucket: str | None) -> None:
    from nucleus.cli.output import print_table, warn
    from nucleus.cli.summary import print_published

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
