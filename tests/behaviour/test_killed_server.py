"""A server that is killed in the middle of a sweep and started again empty gets all by `sync`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_runs import end_trials, finished
from mlflow import MlflowClient

from orchestrator.pipelines.syncing import sync
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.report import write_sweep_report
from orchestrator.reporting.results import StoredSweep
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.run import run_plan
from orchestrator.tracking.tracker import open_tracking
from orchestrator.training.job import finished_outcome
from orchestrator.training.trainer import run_job
from orchestrator.workspace.layout import Workspace, open_workspace

pytestmark = pytest.mark.long

TIMES = ("per_second", "seconds", "memory", "_ms_", "speed_up", "utilization")
"""Parts of the names of metrics that differ from run to run."""


@contextmanager
def server(folder: Path, port: int) -> Iterator[Callable[[], None]]:
    """Serve MLflow's pages from a folder at a port; yields what kills the server."""
    folder.mkdir()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--artifacts-destination", f"{folder}/artifacts"),
    ]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def kill() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    try:
        while True:
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield kill
    finally:
        kill()


def sweep(plan: SweepPlan, workspace: Workspace, told: list[str]) -> None:
    """Run a sweep whose trials are trained here, and write its report."""
    settings = resolve_settings({})
    tracking = open_tracking(workspace, warn=told.append)
    outcome = run_plan(plan, settings, workspace, tracking=tracking)
    assert len(outcome.results) == len(plan.trials)
    found = StoredSweep(name=plan.name, key=plan.key, results=outcome.results)
    write_sweep_report(workspace, found, tracking=lambda: tracking)


def shown(uri: str) -> dict[str, Any]:
    """Return what a store shows, without times and ids."""

    def is_same_always(name: str) -> bool:
        return not any(part in name for part in TIMES)

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("iiet-orch")
    ids, found = [experiment.experiment_id], dict[str, Any]()
    for run in client.search_runs(ids):
        tags = {n: v for n, v in run.data.tags.items() if n.startswith("iiet.")}
        tags.pop("iiet.mirrored_bytes", None)
        kind, key = tags["iiet.kind"], tags["iiet.key"]
        curves = {
            name: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)]
            for name in filter(is_same_always, run.data.metrics)
        }
        found[f"{kind} {key}"] = {
            "name": run.info.run_name,
            "status": run.info.status,
            "params": run.data.params,
            "tags": tags,
            "all tags": sorted(run.data.tags),
            "metrics": sorted(run.data.metrics),
            "curves": curves,
            "files": sorted(f.path for f in client.list_artifacts(run.info.run_id, "front")),
            "data": [data.dataset.digest for data in run.inputs.dataset_inputs],
            "is nested": "mlflow.parentRunId" in run.data.tags,
        }
    models = client.search_logged_models(ids)
    found["models"] = sorted(
        (
            model.tags["iiet.key"], model.name, str(model.status), sorted(model.params.items()),
            sorted({(p.key, p.dataset_digest or "") for p in model.metrics or ()}),
        )
        for model in models
    )  # fmt: skip
    found["views"] = sorted(name for name in experiment.tags if "sharedViewState" in name)
    return found


def test_an_empty_server_shows_the_same_as_one_that_was_never_killed(
    tiny_plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after: list[Callable[[], None]] = []

    order: list[Trial] = []

    def end(trial: Trial) -> Trial:
        order.append(trial)
        if len(order) == 1 + len(tiny_plan.trials) // 2:
            [each() for each in after]
        checkpoint = trial.checkpoint
        if trial.job:
            run_job(trial.job)
            outcome = finished_outcome(trial.job)
            assert outcome
            checkpoint = outcome.checkpoint
        return finished(trial, 0.5 - 0.01 * len(order), checkpoint)

    end_trials(monkeypatch, end)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    workspace, told = open_workspace(tmp_path), list[str]()
    sweep(tiny_plan, workspace, told)
    expected = shown(workspace.tracking_uri)
    assert told == []
    assert len(expected) == len(tiny_plan.trials) + 3
    assert len(expected["models"]) == len(tiny_plan.trials)

    for trial in tiny_plan.trials:
        trial.result_path.unlink()
        if trial.job:
            shutil.rmtree(trial.folder)
    for folder in (workspace.sweeps, workspace.tracked):
        shutil.rmtree(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    order.clear()
    with server(tmp_path / "first", port) as kill:
        after.append(kill)
        sweep(tiny_plan, workspace, told)
    assert len(told) == 1
    assert "iiet-orch ui --sync" in told[0]
    with server(tmp_path / "second", port):
        for _ in range(2):
            sync(workspace=workspace)
            assert shown(workspace.tracking_uri) == expected
