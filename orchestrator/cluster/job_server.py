"""Ray's job server: submit a command, follow its output, list jobs, stop one.

A job is a command that runs on the cluster's head, in a copy of the working directory, with the
head's environment. It goes on when the connection to it is lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.cluster.environment import prepare_for_server
from orchestrator.cluster.working_directory import WorkingDirectory, write_archive
from orchestrator.workspace.errors import RunFailed, UserError, first_line, quoted

STOP_SECONDS = 180
"""How long a stopped job may take to write its checkpoint before it is killed."""
CONNECT_SECONDS = 10.0
READY_SECONDS = 60.0
"""How long a head that has just started may take until it runs jobs."""
POLL_SECONDS = 0.5
KILL_SECONDS = 30.0
"""How long a killed job takes to be recorded as stopped, at most."""
FINISHED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """A command that was submitted."""

    id: str
    command: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None
    """None while it runs, and if it was stopped or could not start."""
    message: str
    """What Ray says about the status."""
    started: float | None
    """Seconds since 1970."""
    ended: float | None

    @property
    def is_finished(self) -> bool:
        return self.status in FINISHED


class JobServer:
    """The job server of a cluster."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            UserError: If no job server answers, it refuses the token, or Ray lacks its client.
        """
        self.address = _checked_address(address)
        _check_reachable(self.address)
        prepare_for_server()
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard_sdk", "job.sdk"):  # They set levels of their own.
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        # Ray lets these variables win over an address that is named.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        with self._errors_explained():
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        command: Sequence[str],
        *,
        directory: WorkingDirectory,
        environment: Mapping[str, str],
        name: str,
    ) -> str:
        """Start a command in a copy of the working directory; return the job's id.

        Args:
            environment: Variables of the command and of its workers on all nodes.
            name: What the id begins with.
        """
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **environment}
        with tempfile.TemporaryDirectory() as folder, self._errors_explained():
            archive = Path(folder) / "working-directory.zip"
            write_archive(directory, archive)
            return self._submit_when_ready(
                entrypoint=shlex.join(command),
                submission_id=f"{name}-{secrets.token_hex(3)}",
                runtime_env={"working_dir": str(archive), "env_vars": variables},
            )

    def _submit_when_ready(self, **request: Any) -> str:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                return str(self._client.submit_job(**request))
            except RuntimeError as error:
                # The agent that starts jobs comes up after the server.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)

    def find(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            UserError: If there is no job of this id.
        """
        if not re.fullmatch(r"[\w.-]+", job_id):
            raise self._unknown(job_id)
        with self._errors_explained(job_id):
            return _job(self._client.get_job_info(job_id))

    def jobs(self) -> list[Job]:
        """Return the submitted jobs, the newest first."""
        with self._errors_explained():
            found = [_job(job) for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.started or 0.0, reverse=True)

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Write a job's output from its beginning until it ends; return the finished job.

        Raises:
            UserError: If there is no job of this id.
            RunFailed: If the connection is lost; the job goes on.
        """

        async def write_all() -> None:
            async for lines in self._client.tail_job_logs(job_id):
                write(lines)

        self.find(job_id)
        try:
            asyncio.run(write_all())
            job = self.find(job_id)
        except Exception as error:
            raise self._lost(job_id, first_line(error)) from error
        if not job.is_finished:
            raise self._lost(job_id, "its output ended early")
        return job

    def stop(self, job_id: str) -> Job:
        """Ask a job to stop, and wait until it has; return the finished job.

        Raises:
            UserError: If there is no job of this id.
            RunFailed: If it still runs after all the time that it has.
        """
        self.find(job_id)
        with self._errors_explained(job_id):
            self._client.stop_job(job_id)
        deadline = time.monotonic() + STOP_SECONDS + KILL_SECONDS
        while not (job := self.find(job_id)).is_finished:
            if time.monotonic() > deadline:
                raise RunFailed(f"the job {job_id} does not stop ({job.message})")
            time.sleep(POLL_SECONDS)
        return job

    def _unknown(self, job_id: str) -> UserError:
        return UserError(
            f"the job server at {self.address} has no job {quoted(job_id)}; "
            "`iiet-orch jobs list` lists them"
        )

    def _lost(self, job_id: str, reason: str) -> RunFailed:
        return RunFailed(
            f"the connection to the job server was lost ({reason}); the job goes on, and "
            f"`iiet-orch jobs logs {job_id}` follows it again"
        )

    @contextmanager
    def _errors_explained(self, job_id: str | None = None) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UserError(
                f"the job server at {self.address} asks for a token, and {_token_state()} "
                f"({first_line(error)}); set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file"
            ) from None
        except OSError as error:
            raise _unreachable(self.address, first_line(error)) from None
        except RuntimeError as error:
            if job_id and "status code 404" in str(error):
                raise self._unknown(job_id) from None
            if "returned 404" in str(error):
                raise _unreachable(self.address, "another server does") from None
            if "ray[default]" in str(error):
                raise UserError(
                    "Ray's job client is not installed; type pip install 'iiet-orch[cluster]'"
                ) from None
            raise RunFailed(f"the job server at {self.address}: {first_line(error)}") from error


def _checked_address(address: str) -> str:
    if "://" not in address:
        address = f"http://{address}"
    if not re.fullmatch(r"https?://[^/\s]+/?", address):
        raise UserError(
            f"--server {quoted(address)} is no address of a job server, such as http://HOST:8265"
        )
    return address.rstrip("/")


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing answers; Ray's own requests have no time limit."""
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return  # Such as 401; Ray's client says what is wrong.
    except (OSError, ValueError) as error:
        raise _unreachable(address, str(getattr(error, "reason", error))) from None


def _unreachable(address: str, reason: str) -> UserError:
    return UserError(
        f"no job server answers at {address} ({reason}); name its address by --server, open a "
        "tunnel to it, or start the head with `ray start --head` where ray[default] is installed "
        "(pip install 'iiet-orch[cluster]')"
    )


def _token_state() -> str:
    return "it refuses this one" if os.environ.get("RAY_AUTH_MODE") == "token" else "none is set"


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        command=details.entrypoint,
        status=str(details.status.value),
        exit_code=details.driver_exit_code,
        message=(details.message or "").strip(),
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
    )
