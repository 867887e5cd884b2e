"""Run a server of another program on the loopback interface for as long as it is needed.

The server gets a process group of its own, writes to a log, and ends with this process, also if
this process is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.terminal.logs import mask_secrets_in_file
from orchestrator.terminal.stop import POLL_SECONDS, stop_requested
from orchestrator.workspace.errors import RunFailed, UserError

HOST = "127.0.0.1"
START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 2.0

# A child of the shell reads a pipe that this process alone holds open. The pipe ends with this
# process, also by SIGKILL; then the whole group is killed.
_WITH_PARENT = 'exec 3<&0; { read _ <&3; kill -KILL 0; } & exec "$@" 3<&- </dev/null'
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens addresses of this machine, without a proxy that the environment names."""


@dataclass(frozen=True, kw_only=True)
class LocalServer:
    """A server that runs."""

    name: str
    """What messages call it, such as `MLflow's server`."""
    url: str
    """Address of the server, without a slash at the end."""
    log: Path
    """The file that it prints to."""
    process: subprocess.Popen[bytes]

    def wait_until_healthy(self, *, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Wait until the server answers, or a stop is requested.

        Raises:
            RunFailed: If the server ends, or does not answer in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while not stop_requested():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise self.failure()
            try:
                with _OPENER.open(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_SECONDS)

    def failure(self) -> RunFailed:
        """Return the error that says how the server ended, or that it does not answer."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        exit_code = self.process.poll()
        state = "did not answer in time" if exit_code is None else f"ended ({exit_code})"
        last_line = f"; its last line: {lines[-1].strip()}" if lines else ""
        return RunFailed(f"{self.name} {state}{last_line}; see {self.log}")


@contextmanager
def local_server(
    name: str,
    arguments: Sequence[str],
    *,
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[LocalServer]:
    """Start a server for a block of code; afterwards it and its children have ended.

    Args:
        name: What messages call it.
        arguments: Arguments of this Python, such as `-m mlflow server`.
        port: Where it listens; see `check_port`.
        log: The file that it prints to.
        environment: Variables beside those of this process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["sh", "-c", _WITH_PARENT, "sh", sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            # Python imports from the current directory first, which may be a shared workspace.
            cwd=sys.prefix,
            start_new_session=True,
        )
    with process:  # Closes the pipe.
        try:
            yield LocalServer(name=name, url=f"http://{HOST}:{port}", log=log, process=process)
        finally:
            stop_group(process)
            mask_secrets_in_file(log)


def stop_group(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and its children: SIGTERM first, then SIGKILL those that have not ended."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # All have ended.
            os.killpg(server.pid, signal_number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT_SECONDS)


def check_port(port: int) -> None:
    """Raise `UserError` if a port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"port {port} cannot be used ({reason}); try --port {port + 1}"
            ) from None
