"""`nucleus train`: a training run on the Ray cluster at hand."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from nucleus.registry.manifest import ModelManifest

__all__ = ["print_published", "train"]


@click.command()
@click.argument("recipe")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a key, such as optimizer.epochs=3.")
@click.option("--run", metavar="NAME", help="Name of the run.  [default: the model's name and the moment]")
@click.option("--resume", metavar="RUN", help="Go on with this run, by the recipe that it began with.")
@click.option("--json", "as_json", is_flag=True, help="Print the published version's manifest as JSON.")
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    settings: tuple[str, ...],
    run: str | None,
    resume: str | None,
    as_json: bool,
) -> None:
    """Train by RECIPE (a TOML file, or the name of one that comes along: demo, dsb2018-cpu, dsb2018-long, dsb2018-gpu).

    Uses the Ray cluster of RAY_ADDRESS or this machine, or starts one for the run.
    """
    from job.train import RunOptions, recipe_path
    from job.train import resume as resume_run
    from job.train import train as train_run
    from nucleus.cli.output import TrainingDisplay, print_json
    from nucleus.cli.quiet import import_tensorflow
    from nucleus.config.names import check_name
    from nucleus.config.recipe import read_recipe

    if run and resume:
        raise click.UsageError("--run names a new run and --resume an old one; give one of them")
    if resume and settings:
        raise click.UsageError("--resume goes on by the recipe that the run began with; leave out --set")
    content = read_recipe(recipe_path(recipe), settings)
    if run:
        check_name(run, "run")
    import_tensorflow()
    options = RunOptions(run=run, verbose=bool(ctx.find_root().params.get("debug")))
    with TrainingDisplay() as display:
        if resume:
            manifest = resume_run(check_name(resume, "run"), content.bucket, options, display)
        else:
            manifest = train_run(content, options, display)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
    else:
        print_published(manifest)


def print_published(manifest: "ModelManifest") -> None:
    """What was published, and how to use it."""
    from nucleus.cli.output import print_scores

    print_scores(manifest.origin.metrics)
    click.echo(f"published {manifest.model}@{manifest.version} (run {manifest.origin.run})")
    click.echo(f"use it: nucleus predict IMAGES --model {manifest.model}@{manifest.version} --out DIR")
