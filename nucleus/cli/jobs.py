"""`nucleus submit` and `nucleus jobs`: training runs as jobs of a Ray cluster."""

import shlex
import signal
import sys
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

import nucleus
from job import job_api
from job import submit as job_submission
from nucleus.cli.options import check_run_options, cluster_options, json_option, run_options, training_command
from nucleus.cli.output import note, print_json, print_table
from nucleus.errors import StorageError, UriError

if TYPE_CHECKING:
    from job.job_api import Job
    from job.submit import DryRun
    from nucleus.config.recipe import Recipe

__all__ = ["jobs", "submit"]

_CHECK_SECONDS = 5.0
"""Longest time for which `submit` asks a bucket that does not answer: this machine may not reach it."""


@click.group()
def jobs() -> None:
    """Jobs that `nucleus submit` has started on a Ray cluster."""


@jobs.command("list")
@cluster_options
@json_option
@training_command
def list_command(address: str | None, insecure: bool, as_json: bool) -> None:
    """List the jobs that the cluster still has a record of, newest first."""
    found = job_api.all_jobs(_open_client(address, insecure=insecure))
    if as_json:
        print_json([asdict(job) for job in found])
        return
    columns = ("job", "status", "started", "seconds", "exit status")
    print_table(columns, [(j.job, j.status, _text(j.started), _text(j.seconds), _text(j.exit_code)) for j in found])


@jobs.command()
@click.argument("job")
@cluster_options
@json_option
@training_command
def status(job: str, address: str | None, insecure: bool, as_json: bool) -> None:
    """Show the status of JOB."""
    _show_job(job_api.find_job(_open_client(address, insecure=insecure), job), as_json=as_json)


@jobs.command()
@click.argument("job")
@click.option("--follow", "-f", is_flag=True, help="Follow the log until the job ends; exit with the job's status.")
@cluster_options
@json_option
@training_command
def logs(job: str, follow: bool, address: str | None, insecure: bool, as_json: bool) -> None:
    """Print the log of JOB."""
    client = _open_client(address, insecure=insecure)
    if follow and not as_json:
        _exit_as(job_api.follow(client, job, lambda text: click.echo(text, nl=False)))
        return
    found = job_api.follow(client, job, lambda _: None) if follow else job_api.find_job(client, job)
    log = job_api.job_log(client, job)
    if as_json:
        print_json({"job": job, "status": found.status, "log": log})
    else:
        click.echo(log, nl=False)
    if follow:
        _exit_as(found)


@jobs.command()
@click.argument("job")
@cluster_options
@json_option
@training_command
def stop(job: str, address: str | None, insecure: bool, as_json: bool) -> None:
    """Stop JOB after it has saved a checkpoint. To continue: nucleus submit --resume RUN."""
    client = _open_client(address, insecure=insecure)
    stopped = job_api.stop_job(client, job)
    _show_job(stopped, as_json=as_json)
    _say_how_to_continue(stopped, client)


def _open_client(address: str | None, *, insecure: bool) -> Any:
    """Return a client of the cluster's job API, after the checks of `job_client`."""
    where = job_api.cluster_address(address)
    job_api.check_address(where, insecure=insecure)
    return job_api.job_client(where, insecure=insecure)


def _say_how_to_continue(job: "Job", client: Any) -> None:
    """Print the command that continues the run of a stopped job; the run's name is in the job's command."""
    run = next((run for flag, run in pairwise(shlex.split(job.entrypoint)) if flag in {"--run", "--resume"}), None)
    if job.status == "STOPPED" and run:
        note(f"to continue: nucleus submit --resume {run} {job_api.cluster_flags(client)}")


def _exit_as(job: "Job") -> None:
    """Exit with the status of a job that has ended."""
    if job.status != "SUCCEEDED":
        raise click.exceptions.Exit(job.exit_code or 1)


def _show_job(job: "Job", *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(job))
        return
    print_table(("what", "value"), [(name.replace("_", " "), _text(value)) for name, value in asdict(job).items()])


def _text(value: object) -> str:
    return "-" if value is None else str(value)


@click.command()
@run_options
@cluster_options
@click.option("--detach", is_flag=True, help="Print the job's id and return, without waiting for its end.")
@click.option("--dry-run", is_flag=True, help="Show what would be started and whether there is room; start nothing.")
@json_option
@click.pass_context
@training_command
def submit(
    ctx: click.Context,
    recipe: str | None,
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
    """Train with RECIPE, as `nucleus train` does, as a job of the Ray cluster at --address.

    The cluster needs this project's dependencies, and access to the bucket by its machines' own AWS credentials: your
    keys are not sent. The job's log goes to stderr; the exit status is the job's. Ctrl-C asks whether to stop the job
    or to detach from it.
    """
    check_run_options(recipe, settings, run, resume)
    path = nucleus.config.recipe_path(recipe) if recipe else None
    content = nucleus.config.read_recipe(path, settings) if path else None
    if content and resume:
        _compare(content, resume)
    client = _open_client(address, insecure=insecure)
    name = resume or run or nucleus.runs.new_run_name(content.model if content else "")
    job = nucleus.runs.new_run_name(name) if resume else name  # a run can be resumed more than once
    arguments = ["--resume" if resume else "--run", name, *(f"--set={text}" for text in settings)]
    arguments += ["--single-writer"] if single_writer else []
    if run:
        _check_name_is_free(run, content.bucket if content else None, client)
    with nucleus.storage.temporary_folder("submit") as folder:
        verbose = bool(ctx.find_root().params.get("debug"))
        submission = job_submission.prepare(path, job, arguments, folder, verbose=verbose)
        if dry_run:
            _show_dry_run(_dry_run(content, resume, submission, client), as_json=as_json)
            return
        submission.start(client)
    submitted = {"job": job, "run": name, "address": client.get_address()}
    note(f"submitted {job} to {client.get_address()}")
    if detach:
        print_json(submitted) if as_json else click.echo(job)
        return
    found = _follow(client, job)
    print_json({**submitted, "status": found.status}) if as_json else click.echo(f"{job} {found.status}")
    _say_how_to_continue(found, client)
    _exit_as(found)


def _check_name_is_free(run: str, bucket: str | None, client: Any) -> None:
    """Raise `JobError` if a run of this name exists, where this machine can see it: the job itself checks it too."""
    patience = nucleus.storage.storage_timeout()
    nucleus.storage.set_storage_timeout(min(patience, _CHECK_SECONDS))
    try:
        found = nucleus.storage.Bucket(nucleus.storage.bucket_from_environment(bucket))
        nucleus.runs.check_new_run(found, run, f"nucleus submit --resume {run} {job_api.cluster_flags(client)}")
    except UriError:  # only the cluster knows its bucket
        return
    except StorageError as error:
        note(f"Whether there is a run {run} already could not be seen from here; the job will check it. {error}")
    finally:
        nucleus.storage.set_storage_timeout(patience)


def _compare(content: "Recipe", run: str) -> None:
    """Refuse another recipe than that of a run to resume. Without access to the bucket, the job does it."""
    try:
        bucket = nucleus.storage.Bucket(nucleus.storage.bucket_from_environment(content.bucket))
        plan = nucleus.runs.load_plan(bucket, run)
    except StorageError as error:
        note(f"The recipe is compared with that of {run} on the cluster; the bucket cannot be read here: {error}")
        return
    for text in nucleus.runs.check_same_recipe(plan, content):
        note(f"The run keeps what it started with; ignored: {text}")


def _follow(client: Any, job: str) -> "Job":
    """Show a job's log until its end. Ctrl-C asks whether to stop the job or to detach."""
    try:
        return job_api.follow(client, job, lambda text: click.echo(text, nl=False, err=True))
    except KeyboardInterrupt as error:
        if not error.args and sys.stdin.isatty() and _asked_to_stop(job):  # it has arguments after SIGTERM
            note(f"Stopping {job}; it saves a checkpoint first")
            return job_api.stop_job(client, job)
        where = job_api.cluster_flags(client)
        note(f"{job} continues. Its log: nucleus jobs logs --follow {job} {where}")
        note(f"To stop it: nucleus jobs stop {job} {where}")
        raise click.exceptions.Exit(128 + int((error.args or [signal.SIGINT])[0])) from None


def _asked_to_stop(job: str) -> bool:
    choice = click.Choice(["detach", "stop"])
    try:
        return str(click.prompt(f"\n{job}: detach or stop", type=choice, default="detach", err=True)) == "stop"
    except click.Abort:
        return False


def _dry_run(content: Any, resume: str | None, submission: Any, client: Any) -> "DryRun":
    if resume is None:
        return job_submission.dry_run(content, content.dataset, submission, job_api.capacities_of(client))
    uri = nucleus.storage.bucket_from_environment(content.bucket if content else None)
    plan = nucleus.runs.load_plan(nucleus.storage.Bucket(uri), resume)
    return job_submission.dry_run(plan.recipe, plan.dataset, submission, job_api.capacities_of(client))


def _show_dry_run(found: "DryRun", *, as_json: bool) -> None:
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
