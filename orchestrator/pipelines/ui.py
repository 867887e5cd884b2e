"""Start MLflow's server for a workspace and print links to its runs, sweeps and charts.

The server runs on the loopback interface, with one worker and without its job runner (half a
gigabyte instead of three). If `MLFLOW_TRACKING_URI` names a remote server, only links are printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from orchestrator.records.metrics import ACCURACY, BITS_PER_BYTE, DECODE_MS, NFE
from orchestrator.records.tracked_run import SWEEP_TAG
from orchestrator.reporting.results import newest_sweep
from orchestrator.terminal.server import HOST, check_port, local_server
from orchestrator.terminal.stop import POLL_SECONDS, stop_on_signals, stop_requested
from orchestrator.tracking.chart_view import ChartView
from orchestrator.tracking.store import MEASUREMENTS
from orchestrator.tracking.tracker import open_tracking
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.journal import VALIDATION_METRIC
from orchestrator.workspace.layout import Workspace

DEFAULT_PORT = 5000
LOG_NAME = "mlflow-server.log"
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
    with suppress(UserError):  # There may be no sweep yet.
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
    say(f"starting MLflow on http://{HOST}:{port} (takes some seconds)")
    running = local_server(
        "MLflow's server",
        server_arguments(workspace, port),
        port=port,
        log=workspace.logs / LOG_NAME,
        environment=_environment(tracking.store.uri),
    )
    with stop_on_signals(), running as server:
        server.wait_until_healthy()
        for line in tracking.links(server.url, overview(), MAX_SWEEPS_SHOWN):
            say(line)
        say("Ctrl-C stops the server")
        while server.process.poll() is None and not should_stop():
            time.sleep(POLL_SECONDS)
        if server.process.poll() is not None:
            raise server.failure()


def overview() -> ChartView:
    """Return a chart view of all trainings, the newest first, with quality and cost.

    It includes the trainings of sweeps.
    """
    columns = (
        *(f"metrics.{name}" for name in (ACCURACY, BITS_PER_BYTE)),
        f"tags.{SWEEP_TAG}",  # Trials of different sweeps may have one name.
        *(f"metrics.{name}" for name in (NFE, VALIDATION_METRIC, DECODE_MS)),
        *(f"params.{name}" for name in ("method", "schedule", "learning_rate", "seed")),
    )
    return ChartView(
        key="runs",
        name="Training runs",
        run_filter=" and ".join(f"tags.`iiet.kind` != '{k}'" for k in ("sweep", *MEASUREMENTS)),
        order_by="attributes.start_time",
        is_ascending=False,
        columns=columns,
    )


def server_arguments(workspace: Workspace, port: int) -> list[str]:
    """Return the arguments of the Python that runs MLflow's server."""
    arguments = ["-m", "mlflow", "server", "--workers", "1"]
    arguments += ["--host", HOST, "--port", str(port)]
    arguments += ["--no-serve-artifacts", "--default-artifact-root", workspace.artifacts.as_uri()]
    return arguments


def _environment(uri: str) -> dict[str, str]:
    return {
        # Not an argument, which other users can read: the address may contain a password.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
