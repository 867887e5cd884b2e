"""Run a command as a job of a cluster: send the working directory, follow the job, stop it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.cluster.job_server import Job, JobServer
from orchestrator.cluster.working_directory import find_files
from orchestrator.terminal.formatting import format_bytes, format_count, join_names
from orchestrator.terminal.signals import SIGNALS, signal_handlers
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.folders import ENVIRONMENT_NAME

EXIT_CODE_STOPPED = 130
EXIT_CODE_NOT_FOUND = 127
"""The shell's, for a program that it does not find."""


def submit(
    words: Sequence[str],
    *,
    server: str,
    workspace: Path | None,
    name: str | None = None,
    variables: Sequence[str] = (),
    say: Callable[[str], None],
) -> str:
    """Start `iiet-orch` with these words as a job; return the job's id.

    Args:
        words: The command and its options.
        server: Address of the job server.
        workspace: What the command's own option says.
        name: What the id begins with (default: the command).
        variables: Names of environment variables of this process that the job gets.
        say: Called with a sentence about what was sent.

    Raises:
        UserError: If the workspace is not shared, a variable is not set, the working directory is
            too large, or no job server answers.
    """
    environment = {ENVIRONMENT_NAME: str(shared_workspace(workspace))}
    for variable in variables:
        if variable not in os.environ:
            raise UserError(f"--env {variable}: this variable is not set here")
        environment[variable] = os.environ[variable]
    directory = find_files(Path.cwd())
    job_id = JobServer(server).submit(
        ["iiet-orch", *words],
        directory=directory,
        environment=environment,
        name=name or words[0],
    )
    sent = f"{format_count(len(directory.files), 'file')}, {format_bytes(directory.num_bytes)}"
    say(f"job {job_id}, with the working directory ({sent})")
    if directory.left_behind:
        say(f"too large to be sent: {join_names([str(path) for path in directory.left_behind])}")
    return job_id


def shared_workspace(workspace: Path | None) -> Path:
    """Return the workspace of a command that runs on a cluster.

    Args:
        workspace: What the command's own option says (default: `IIET_WORKSPACE`).

    Raises:
        UserError: If it is not named by an absolute path; the command would write into a
            temporary copy of the working directory.
    """
    named = workspace or os.environ.get(ENVIRONMENT_NAME)
    if named and Path(named).is_absolute():
        return Path(named)
    found = f"got {named}" if named else "none is named"
    raise UserError(
        f"a command on a cluster needs a workspace that all its nodes see, by an absolute path "
        f"({found}); set {ENVIRONMENT_NAME}=/shared/folder, or add --workspace /shared/folder to "
        "the command"
    )


def follow(server: JobServer, job_id: str, write: Callable[[str], None]) -> int:
    """Write a job's output until it ends; return its exit code.

    Raises:
        Interrupted: After Ctrl-C or SIGTERM; the job goes on.
        RunFailed: If the job could not start, or the connection is lost.
    """
    try:
        with signal_handlers(SIGNALS, signal.default_int_handler):
            return _exit_code(server.follow(job_id, write))
    except KeyboardInterrupt:
        raise Interrupted(
            f"the job {job_id} goes on; `iiet-orch jobs logs {job_id}` follows it again, and "
            f"`iiet-orch jobs stop {job_id}` stops it"
        ) from None


def _exit_code(job: Job) -> int:
    if job.status == "STOPPED":
        return EXIT_CODE_STOPPED
    if job.exit_code is None:
        raise RunFailed(f"the job {job.id} did not start: {job.message}")
    if job.exit_code == EXIT_CODE_NOT_FOUND:
        raise UserError(
            f"the job {job.id} found no iiet-orch on the head; start Ray there in an environment "
            "in which this package is installed"
        )
    if job.exit_code < 0:
        raise RunFailed(f"the job {job.id} was ended by signal {-job.exit_code}")
    return job.exit_code
