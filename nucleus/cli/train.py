"""`nucleus train`: a training run on the Ray cluster at hand."""

from pathlib import Path

import click

from nucleus.cli.options import check_run_options, out_option, run_options

__all__ = ["train"]


@click.command()
@run_options
@out_option
@click.option("--json", "as_json", is_flag=True, help="Print the published version's manifest as JSON.")
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    settings: tuple[str, ...],
    run: str | None,
    resume: str | None,
    single_writer: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Train by RECIPE (a TOML file, or the name of one that comes along: demo, dsb2018-cpu, dsb2018-long, dsb2018-gpu).

    Uses the Ray cluster of RAY_ADDRESS or this machine, or starts one for the run.
    """
    from job.options import RunOptions
    from job.recipes import recipe_path
    from job.train import resume as resume_run
    from job.train import train as train_run
    from nucleus.cli.output import print_json
    from nucleus.cli.summary import print_published
    from nucleus.cli.training_display import TrainingDisplay
    from nucleus.config.recipe import read_recipe

    check_run_options(settings, run, resume)
    content = read_recipe(recipe_path(recipe), settings)
    verbose = bool(ctx.find_root().params.get("debug"))
    options = RunOptions(run=run, verbose=verbose, single_writer=single_writer, folder=out)
    with TrainingDisplay() as display:
        if resume:
            manifest = resume_run(resume, content.bucket, options, display)
        else:
            manifest = train_run(content, options, display)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
    else:
        print_published(manifest, options.local_folder, content.bucket)
