"""`nucleus jobs`: the jobs of a Ray cluster."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from nucleus.cli.options import cluster_options, json_option

if TYPE_CHECKING:
    from job.jobs import Job

__all__ = ["end_as", "jobs", "open_client"]


@click.group()
def jobs() -> None:
    """The jobs that `nucleus submit` has started on a Ray cluster."""


@jobs.command("list")
@cluster_options
@json_option
def list_command(address: str | None, insecure: bool, as_json: bool) -> None:
    """Every job that the cluster remembers, the newest first."""
    from job.jobs import all_jobs
    from nucleus.cli.output import print_json, print_table

    found = all_jobs(open_client(address, insecure=insecure))
    if as_json:
        print_json([asdict(job) for job in found])
        return
    columns = ("job", "status", "started", "seconds", "exit status")
    print_table(columns, [(j.job, j.status, _text(j.started), _text(j.seconds), _text(j.exit_code)) for j in found])


@jobs.command()
@click.argument("job")
@cluster_options
@json_option
def status(job: str, address: str | None, insecure: bool, as_json: bool) -> None:
    """How JOB is."""
    from job.jobs import find_job

    _show(find_job(open_client(address, insecure=insecure), job), as_json=as_json)


@jobs.command()
@click.argument("job")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job's end, and end as it does.")
@cluster_options
@json_option
def logs(job: str, follow: bool, address: str | None, insecure: bool, as_json: bool) -> None:
    """What JOB has written."""
    from job.jobs import find_job, job_log
    from job.jobs import follow as follow_job
    from nucleus.cli.output import print_json

    client = open_client(address, insecure=insecure)
    if follow and not as_json:
        end_as(follow_job(client, job, lambda text: click.echo(text, nl=False)))
        return
    found = follow_job(client, job, lambda _: None) if follow else find_job(client, job)
    log = job_log(client, job)
    if as_json:
        print_json({"job": job, "status": found.status, "log": log})
    else:
        click.echo(log, nl=False)
    if follow:
        end_as(found)


@jobs.command()
@click.argument("job")
@cluster_options
@json_option
def stop(job: str, address: str | None, insecure: bool, as_json: bool) -> None:
    """Let JOB save a checkpoint and stop; `nucleus submit RECIPE --resume RUN` goes on."""
    from job.jobs import stop_job

    _show(stop_job(open_client(address, insecure=insecure), job), as_json=as_json)


def open_client(address: str | None, *, insecure: bool) -> Any:
    """The job API of the cluster that the user means, if it lets nobody else in."""
    from job.dashboard import check_address, cluster_address, job_client

    where = cluster_address(address)
    check_address(where, insecure=insecure)
    return job_client(where, insecure=insecure)


def end_as(job: "Job") -> None:
    """Exit with the status of a job that is over."""
    if job.status != "SUCCEEDED":
        raise click.exceptions.Exit(job.exit_code or 1)


def _show(job: "Job", *, as_json: bool) -> None:
    from nucleus.cli.output import print_json, print_table

    if as_json:
        print_json(asdict(job))
        return
    print_table(("what", "value"), [(name.replace("_", " "), _text(value)) for name, value in asdict(job).items()])


def _text(value: object) -> str:
    return "-" if value is None else str(value)
