"""Start MLflow's server for a workspace and print links to its runs, sweeps and charts.

The server runs on the loopback interface, with one worker and without its job runner (half a
gigabyte instead of three). If `MLFLOW_TRACKING_URI` names a remote server, only links are printed.
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.reporting.results import newest_sweep
from orchestrator.terminal.logs import mask_secrets_in_file
from orchestrator.terminal.stop import POLL_SECONDS, stop_on_signals, stop_requested
from orchestrator.tracking.chart_view import ChartView
from orchestrator.tracking.store import MEASUREMENTS
from orchestrator.tracking.tracker import open_tracking
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.layout import Workspace

HOST = "127.0.0.1"
DEFAULT_PORT = 5000
LOG_NAME = "mlflow-server.log"
START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 2.0
MAX_SWEEPS_SHOWN = 5


def serve(
    workspace: Workspace,
    *,
    port: int = DEFAULT_PORT,
    say: Callable[[str], None] = print,
    should_stop: Callable[[], bool] = stop_requested,
) -> None:
    """Serve MLflow's pages until a stop is requested; then return normally.

    Args:
        say: Called with each line for the user, links included.
        should_stop: Called a few times a second.

    Raises:
        UserError: If the port is taken, or the store cannot be opened.
        RunFailed: If the server does not start, or a remote one does not answer.
    """
    with suppress(UserError):  # There is no sweep yet.
        if (page := workspace.sweeps / newest_sweep(workspace) / "front.html").is_file():
            say(f"newest sweep: {page.as_uri()}")
    tracking = open_tracking(workspace, warn=say)
    if tracking.copied:
        raise UserError(str(tracking.copied))
    if tracking.store.is_remote:
        lines = tracking.links(tracking.store.public_uri, overview(), MAX_SWEEPS_SHOWN)
        if not lines:
            raise RunFailed(
                f"there are no pages to show: nothing answers at {tracking.store.public_uri} "
                "(MLFLOW_TRACKING_URI); start that server, or unset the variable to see the "
                "workspace's own runs"
            )
        for line in lines:
            say(line)
        return
    check_port(port)
    url = f"http://{HOST}:{port}"
    say(f"starting MLflow on {url} (takes some seconds)")
    log = workspace.logs / LOG_NAME
    with stop_on_signals(), _start(workspace, tracking.store.uri, port) as server:
        try:
            _wait_until_healthy(server, url, log)
            for line in tracking.links(url, overview(), MAX_SWEEPS_SHOWN):
                say(line)
            say("Ctrl-C stops the server")
            while server.poll() is None and not should_stop():
                time.sleep(POLL_SECONDS)
            if server.poll() is not None:
                raise _failed(server, log)
        finally:
            stop_group(server)
            mask_secrets_in_file(log)


def overview() -> ChartView:
    """Return a view of all trainings, the newest first: what they are, their quality and cost.

    Those of sweeps stand in it as the others do.
    """
    metrics = (
        "quality/accuracy", "quality/bits_per_byte", "validation/loss",
        "cost/evaluations", "cost/decode_ms_per_token",
    )  # fmt: skip
    params = ("method", "schedule", "learning_rate", "seed")
    return ChartView(
        key="runs",
        name="Training runs",
        run_filter=" and ".join(f"tags.`iiet.kind` != '{k}'" for k in ("sweep", *MEASUREMENTS)),
        order_by="attributes.start_time",
        is_ascending=False,
        columns=[f"metrics.{name}" for name in metrics] + [f"params.{name}" for name in params],
    )


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


def stop_group(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and its children: SIGTERM first, then SIGKILL those that have not ended."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # All have ended.
            os.killpg(server.pid, how)
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT_SECONDS)


# A child of the shell reads a pipe that this process alone holds open. The pipe ends with this
# process, also by SIGKILL; then the whole group is killed.
_WITH_PARENT = 'exec 3<&0; { read _ <&3; kill -KILL 0; } & exec "$@" 3<&- </dev/null'


def _start(workspace: Workspace, uri: str, port: int) -> subprocess.Popen[bytes]:
    command = [
        *("sh", "-c", _WITH_PARENT, "sh"),
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
        *("--host", HOST, "--port", str(port)),
        *("--no-serve-artifacts", "--default-artifact-root", workspace.artifacts.as_uri()),
    ]
    environment = {
        **os.environ,
        # Not an argument: other users can read those, and the address may hold a password.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    workspace.logs.mkdir(parents=True, exist_ok=True)
    with (workspace.logs / LOG_NAME).open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # Python imports from the current directory first; no file of a shared workspace.
            cwd=sys.prefix,
            start_new_session=True,
        )


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    # The address is local: do not use a proxy from the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while not stop_requested():
        if server.poll() is not None or time.monotonic() > deadline:
            raise _failed(server, log)
        try:
            with opener.open(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_SECONDS)


def _failed(server: subprocess.Popen[bytes], log: Path) -> RunFailed:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    state = "did not answer in time" if server.poll() is None else f"ended ({server.returncode})"
    last = f"; its last line: {lines[-1].strip()}" if lines else ""
    return RunFailed(f"MLflow's server {state}{last}; see {log}")
