"""`iiet-orch submit`: run another command on a Ray cluster."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.command import Command, build_app
from orchestrator.cli.session import Call
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import ENVIRONMENT_NAME, check_name_option


@Command(
    "submit",
    group="Clusters",
    workspace=None,
    has_json=False,
    # Options after the first word belong to the command that it names.
    context_settings={"allow_interspersed_args": False},
)
def submit(
    _call: Call,
    words: Annotated[list[str], typer.Argument(metavar="COMMAND")],
    server: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", show_envvar=False)
    ] = "http://127.0.0.1:8265",
    name: Annotated[str | None, typer.Option(callback=check_name_option)] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME")] = None,
    follow: bool = True,
) -> None:
    """Run a command as a job of a Ray cluster, in a copy of the working directory.

    Example: iiet-orch submit --server http://head:8265 sweep demo --workspace /shared/work

    Args:
        words: A command of iiet-orch with its options.
        server: Address of Ray's job server.
        name: What the job's id begins with (default: the command).
        env: Environment variable that the job gets from here.
        follow: Show the job's output until it ends.
    """
    server = server if "://" in server else f"http://{server}"
    if not re.fullmatch(r"https?://[^/\s]+/?", server):
        raise UserError(f"--server {server} is not an address such as http://HOST:8265")
    workspace = parse_command(words).get("workspace") or os.environ.get(ENVIRONMENT_NAME, "")
    if not Path(workspace).is_absolute():  # It would lie in the job's copy of the folder.
        raise UserError(
            "a command on a cluster needs a workspace that all its nodes see, by an absolute path "
            f"(got {workspace or 'none'}); set {ENVIRONMENT_NAME}=/shared/folder, or add "
            "--workspace /shared/folder to the command"
        )
    if missing := [variable for variable in env or () if variable not in os.environ]:
        raise UserError(f"--env {missing[0]}: this variable is not set here")
    from orchestrator.cluster.submit import run_as_job

    variables = {variable: os.environ[variable] for variable in env or ()}
    code = run_as_job(
        words,
        server=server,
        name=name or words[0],
        variables={ENVIRONMENT_NAME: str(workspace), **variables},
        follow=follow,
        write=lambda text: print(text, end="", file=sys.stdout, flush=True),
    )
    raise typer.Exit(code)


def parse_command(words: Sequence[str]) -> dict[str, Any]:
    """Check the words of a command without running it, and return its options by name.

    Raises:
        UserError: If the command is not for a cluster.
        SystemExit, click's UsageError: As the command itself, if they are wrong.
    """
    if words[0] in ("submit", "ui"):
        raise UserError(f"`iiet-orch {words[0]}` does not run on a cluster; name another command")
    group: Any = typer.main.get_command(build_app(words[0]))
    context = group.make_context("iiet-orch", list(words))
    name, found, rest = group.resolve_command(context, list(words))
    options: dict[str, Any] = found.make_context(name, rest, parent=context).params
    return options
