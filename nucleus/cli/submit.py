"""`nucleus submit`: a training run as a job of a Ray cluster that is reached by HTTP."""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nucleus.cli.jobs import end_as, open_client
from nucleus.cli.options import check_run_options, cluster_options, json_option, run_options

if TYPE_CHECKING:
    from job.dry_run import DryRun
    from job.jobs import Job

__all__ = ["submit"]

_INTERRUPTED = 130


@click.command()
@run_options
@cluster_options
@click.option("--detach", is_flag=True, help="Do not wait for the job's end; print its id.")
@click.option("--dry-run", is_flag=True, help="Say what would be started and whether there is room; start nothing.")
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
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train by RECIPE as `nucleus train` does, as a job of the Ray cluster at --address.

    The cluster has this project's dependencies and, by the AWS chain of its machines, its own rights to the bucket:
    no key of yours is sent. Its log goes to stderr; the exit status is the job's. Ctrl-C asks whether to stop it.
    """
    from job.plan import new_run_name
    from job.recipes import recipe_path
    from job.submission import prepare
    from nucleus.cli.output import note, print_json
    from nucleus.config.recipe import read_recipe

    check_run_options(settings, run, resume)
    client = open_client(address, insecure=insecure)
    path = recipe_path(recipe)
    content = read_recipe(path, settings)
    name = resume or run or new_run_name(content.model)
    job = new_run_name(name) if resume else name  # a run may be resumed again and again
    arguments = ["--resume" if resume else "--run", name, *(f"--set={text}" for text in settings)]
    arguments += ["--single-writer"] if single_writer else []
    with tempfile.TemporaryDirectory(prefix="nucleus-submit-") as folder:
        verbose = bool(ctx.find_root().params.get("debug"))
        submission = prepare(path, job, arguments, Path(folder), verbose=verbose)
        if dry_run:
            _show(_dry_run(content, resume, submission, client), as_json=as_json)
            return
        submission.start(client)
    told = {"job": job, "run": name, "address": client.get_address()}
    note(f"submitted {job} to {client.get_address()}")
    if detach:
        print_json(told) if as_json else click.echo(job)
        return
    found = _followed(client, job)
    print_json({**told, "status": found.status}) if as_json else click.echo(f"{job} {found.status}")
    end_as(found)


def _followed(client: Any, job: str) -> "Job":
    """Pass on a job's log to its end. Ctrl-C asks what is to become of the job."""
    from job.jobs import follow, stop_job
    from nucleus.cli.output import note

    try:
        return follow(client, job, lambda text: click.echo(text, nl=False, err=True))
    except KeyboardInterrupt:
        if sys.stdin.isatty() and _is_to_stop(job):
            note(f"Stopping {job}; it saves a checkpoint first")
            return stop_job(client, job)
        note(f"{job} goes on. See: nucleus jobs logs --follow {job}; to stop it: nucleus jobs stop {job}")
        raise click.exceptions.Exit(_INTERRUPTED) from None


def _is_to_stop(job: str) -> bool:
    choice = click.Choice(["detach", "stop"])
    try:
        return str(click.prompt(f"\n{job}: detach or stop", type=choice, default="detach", err=True)) == "stop"
    except click.Abort:
        return False


def _dry_run(content: Any, resume: str | None, submission: Any, client: Any) -> "DryRun":
    from job.dashboard import rooms_of
    from job.dry_run import dry_run
    from job.plan import load_plan
    from nucleus.storage.bucket import Bucket
    from nucleus.storage.uri import bucket_from_environment

    if resume is None:
        return dry_run(content, content.dataset, submission, rooms_of(client))
    plan = load_plan(Bucket(bucket_from_environment(content.bucket)), resume)
    return dry_run(plan.recipe, plan.dataset, submission, rooms_of(client))


def _show(found: "DryRun", *, as_json: bool) -> None:
    from nucleus.cli.output import note, print_json, print_table

    if as_json:
        print_json(asdict(found))
        return
    print_table(("what", "value"), [(name.replace("_", " "), _words(value)) for name, value in asdict(found).items()])
    note("nothing was started")


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {each:g}" if isinstance(each, float) else f"{name} {each}" for name, each in value.items()
        )
    return "nothing" if value is None else str(value)
