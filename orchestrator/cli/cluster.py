"""Commands that run other commands on a cluster: submit a job, list, follow and stop jobs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from orchestrator.cli.app import app
from orchestrator.cli.help import Application
from orchestrator.cli.json_output import JsonOption, print_json
from orchestrator.terminal.layout import print_line
from orchestrator.workspace.errors import UserError, quoted

if TYPE_CHECKING:
    from orchestrator.cluster.job_server import Job, JobServer

NOT_ON_A_CLUSTER = ("submit", "jobs", "manifest", "ui")
"""Commands for the machine where a person sits."""
WORDS_LAST: dict[str, Any] = {"allow_interspersed_args": False}
"""Options after the first word belong to the command that it names."""

CommandArgument = Annotated[
    list[str],
    typer.Argument(metavar="COMMAND", help="A command of iiet-orch with its options."),
]
ServerOption = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", show_envvar=False, help="Address of Ray's job server."
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]
DEFAULT_SERVER = "http://127.0.0.1:8265"

jobs = Application(no_args_is_help=True, help="List, follow and stop the jobs of a cluster.")
app.add_typer(jobs, name="jobs", rich_help_panel="Clusters")


@app.command(rich_help_panel="Clusters", context_settings=WORDS_LAST)
def submit(
    command: CommandArgument,
    server: ServerOption = DEFAULT_SERVER,
    name: Annotated[
        str | None,
        typer.Option(help="What the job's id begins with (default: the command)."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Environment variable that the job gets from here."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show the job's output until it ends.")
    ] = True,
) -> None:
    """Run a command as a job of a Ray cluster, in a copy of the working directory.

    Example: iiet-orch submit --server http://head:8265 sweep demo --workspace /shared/work
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,60}", name):
        raise UserError(f"--name {quoted(name)}: a job's name has letters, digits and . - _")
    from orchestrator.pipelines import submitting

    job_id = submitting.submit(
        command,
        server=server,
        workspace=parse_command(command)["workspace"],
        name=name,
        variables=env or [],
        say=lambda text: print_line(Console(), text),
    )
    if follow:
        _follow(_connect(server), job_id)


@jobs.command("list")
def list_jobs(server: ServerOption = DEFAULT_SERVER, as_json: JsonOption = False) -> None:
    """List the submitted jobs, the newest first.

    Example: iiet-orch jobs list
    """
    found = _connect(server).jobs()
    if as_json:
        print_json({"jobs": [asdict(job) for job in found]})
        return
    console = Console(highlight=False)
    console.print(_table(found) if found else "no jobs")


@jobs.command("logs")
def show_logs(job: JobArgument, server: ServerOption = DEFAULT_SERVER) -> None:
    """Show a job's output until it ends, and exit with its exit code.

    Example: iiet-orch jobs logs ID
    """
    _follow(_connect(server), job)


@jobs.command("stop")
def stop_job(job: JobArgument, server: ServerOption = DEFAULT_SERVER) -> None:
    """Stop a job after it has saved its state; submitting it again resumes.

    Example: iiet-orch jobs stop ID
    """
    console = Console(highlight=False)
    connection = _connect(server)
    if not connection.find(job).is_finished:
        print_line(console, f"waiting for {job} to save its state")
    print_line(console, f"{job}: {connection.stop(job).status}")


def parse_command(words: Sequence[str]) -> dict[str, Any]:
    """Check the words of a command, without running it, and return its options by name.

    Prints and exits like the command itself if they are wrong, or ask for its help.

    Raises:
        UserError: If the command is not for a cluster.
    """
    if words[0] in NOT_ON_A_CLUSTER:
        raise UserError(f"`iiet-orch {words[0]}` does not run on a cluster; name another command")
    group: Any = typer.main.get_command(app.reduced_to(words))
    context = group.make_context("iiet-orch", list(words))
    name, command, rest = group.resolve_command(context, list(words))
    options: dict[str, Any] = command.make_context(name, rest, parent=context).params
    return options


def _connect(server: str) -> JobServer:
    from orchestrator.cluster.job_server import JobServer

    return JobServer(server)


def _follow(connection: JobServer, job_id: str) -> None:
    from orchestrator.pipelines import submitting

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    raise typer.Exit(submitting.follow(connection, job_id, write))


def _table(found: Sequence[Job]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("job", "status", "started"):
        table.add_column(title, no_wrap=True)
    table.add_column("command", overflow="fold")
    for job in found:
        started = datetime.fromtimestamp(job.started) if job.started else None
        table.add_row(
            job.id,
            job.status.lower(),
            f"{started:%Y-%m-%d %H:%M}" if started else "",
            job.command.removeprefix("iiet-orch "),
        )
    return table
