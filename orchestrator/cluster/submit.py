"""Run a command as a job of a Ray cluster, through Ray's own `JobSubmissionClient`.

Ray copies the working directory to the cluster's head and starts the command there, with the head's
environment. `ray job list`, `ray job logs` and `ray job stop` do the rest.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.terminal.stop import SIGNALS, signal_handlers
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError, first_line


def run_as_job(
    words: Sequence[str], *, server: str, name: str, variables: Mapping[str, str], follow: bool,
    write: Callable[[str], Any],
) -> int:  # fmt: skip
    """Submit `iiet-orch` with these words; return the exit code of the job, or 0 unless `follow`.

    The job's id begins with `name`. `write` gets it, and with `follow` the job's output.

    Raises:
        UserError: If no job server answers at `server`, or it refuses the job.
        Interrupted: After Ctrl-C or SIGTERM; the job keeps running.
        RunFailed: If the job did not start, or the connection is lost.
    """
    has_token = any(map(os.environ.get, ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")))
    if has_token or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # As `ray start` does.
    os.environ["RAY_API_SERVER_ADDRESS"] = server  # Ray prefers it to an address that is named.
    from ray.job_submission import JobSubmissionClient

    for logger in [*logging.Logger.manager.loggerDict]:
        if logger.startswith("ray."):
            logging.getLogger(logger).setLevel(logging.WARNING)  # Some set levels of their own.
    # How long Ray waits for a stopped job to save its state; its own default is three seconds.
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": "3600", **variables}
    try:
        client = JobSubmissionClient(server)
        job: str = client.submit_job(
            entrypoint=shlex.join(["iiet-orch", *words]),
            submission_id=f"{name}-{secrets.token_hex(3)}",
            runtime_env={"working_dir": str(Path.cwd()), "env_vars": environment},
        )
    except Exception as error:
        # Ray's message says what is wrong: no server, no token, no `ray[default]`, too large.
        raise UserError(f"--server {server} takes no job: {first_line(error)}") from None
    again = f"type `ray job logs --follow {job}` to see its output, `ray job stop {job}` to stop it"
    write(f"job {job}; {again}\n")
    if not follow:
        return 0

    async def show() -> None:
        async for lines in client.tail_job_logs(job):
            write(lines)

    again = f"the job {job} keeps running; {again}"
    try:
        with signal_handlers(SIGNALS, signal.default_int_handler):
            asyncio.run(show())
            found = client.get_job_info(job)
    except KeyboardInterrupt:
        raise Interrupted(again) from None
    except Exception as error:
        raise RunFailed(f"the connection is lost ({first_line(error)}); {again}") from error
    if found.status.value == "STOPPED":
        return 130
    if found.driver_exit_code is None:
        raise RunFailed(f"the job {job} did not start: {(found.message or '').strip()}")
    return int(found.driver_exit_code)
