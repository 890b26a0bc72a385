"""`nucleus submit`: a training run as a job of a Ray cluster that is reached by HTTP."""

import tempfile
from pathlib import Path

import click

from nucleus.cli.options import check_run_options, json_option, run_options

__all__ = ["submit"]


@click.command()
@run_options
@click.option(
    "--address", metavar="URL", help="The cluster's dashboard.  [default: RAY_ADDRESS, or http://127.0.0.1:8265]"
)
@click.option("--insecure", is_flag=True, help="Allow plain HTTP to another machine, and a cluster without a token.")
@click.option("--detach", is_flag=True, help="Do not wait for the job's end; print its id.")
@json_option
@click.pass_context
def submit(
    ctx: click.Context,
    recipe: str,
    settings: tuple[str, ...],
    run: str | None,
    resume: str | None,
    single_writer: bool,
    address: str | None,
    insecure: bool,
    detach: bool,
    as_json: bool,
) -> None:
    """Train by RECIPE as `nucleus train` does, as a job of the Ray cluster at --address.

    The cluster has this project's dependencies and, by the AWS chain of its machines, its own rights to the bucket:
    no key of yours is sent. Its log goes to stderr; the exit status is the job's.
    """
    from job.dashboard import check_address, cluster_address, job_client
    from job.plan import new_run_name
    from job.recipes import recipe_path
    from job.submission import follow, prepare
    from nucleus.cli.output import note, print_json
    from nucleus.config.recipe import read_recipe

    check_run_options(settings, run, resume)
    where = cluster_address(address)
    check_address(where, insecure=insecure)
    path = recipe_path(recipe)
    model = read_recipe(path, settings).model
    name = resume or run or new_run_name(model)
    job = new_run_name(name) if resume else name  # a run may be resumed again and again
    arguments = ["--resume" if resume else "--run", name, *(f"--set={text}" for text in settings)]
    arguments += ["--single-writer"] if single_writer else []
    client = job_client(where, insecure=insecure)
    with tempfile.TemporaryDirectory(prefix="nucleus-submit-") as folder:
        verbose = bool(ctx.find_root().params.get("debug"))
        prepare(path, job, arguments, Path(folder), verbose=verbose).start(client)
    told = {"job": job, "run": name, "address": where}
    note(f"submitted {job} to {where}")
    if detach:
        print_json(told) if as_json else click.echo(job)
        return
    details = follow(client, job, lambda text: click.echo(text, nl=False, err=True))
    status = str(details.status)
    if as_json:
        print_json({**told, "status": status})
    else:
        click.echo(f"{job} {status}")
    if status != "SUCCEEDED":
        raise click.exceptions.Exit(details.driver_exit_code or 1)
