"""A sweep is watched in MLflow, interrupted and resumed, and no run is made twice."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from commands import Started, run_command, settings_options
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from small_size import SMALL

pytestmark = pytest.mark.long

SETTINGS = [
    *SMALL,
    "distillation.training.num_steps=150",
    "distillation.training.checkpoint_every_steps=20",
    "distillation.teacher_cache=false",
    "sweep.num_schedules=2",
]
SWEEP = ["sweep-threshold", "--name", "watched", *settings_options(SETTINGS)]


def trials(workspace: Path) -> list[Run]:
    """Return the runs of the sweep's trials and of the sweep, as MLflow's pages would show them."""
    if not (workspace / "mlflow.db").exists():
        return []
    try:
        client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
        experiment = client.get_experiment_by_name("iiet-orch")
        if experiment is None:
            return []
        return list(client.search_runs([experiment.experiment_id], "tags.`iiet.sweep` = 'watched'"))
    except MlflowException:
        return []  # The tables are being made.


def kind(run: Run) -> str:
    return str(run.data.tags["iiet.kind"])


def test_a_sweep_is_watched_interrupted_and_resumed(tmp_path: Path) -> None:
    place = ("--workspace", str(tmp_path))
    run_command("pretrain", "--local", *settings_options(SETTINGS), *place)
    process = Started(*SWEEP, *place)
    watched: list[Run] = []
    while not watched:
        assert process.poll() is None, process.communicate()[0]
        watched = [
            run
            for run in trials(tmp_path)
            if kind(run) == "trial"
            and run.info.status == "RUNNING"
            and {"train/loss", "train/learning_rate", "train/tokens_per_second", "train/memory_gb"}
            <= run.data.metrics.keys()
        ]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 130, printed
    states = {kind(run): run.info.status for run in trials(tmp_path)}
    assert states["sweep"] == "KILLED"
    assert "RUNNING" not in states.values()

    run_command(*SWEEP, *place)
    found = trials(tmp_path)
    assert {run.info.status for run in found} == {"FINISHED"}
    keys = [(kind(run), run.data.tags["iiet.key"]) for run in found]
    assert len(keys) == len(set(keys))
    [again] = [run for run in found if run.info.run_id == watched[0].info.run_id]
    assert again.info.start_time == watched[0].info.start_time
    assert again.info.end_time - again.info.start_time > 1000 * again.data.metrics["train/seconds"]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    history = client.get_metric_history(again.info.run_id, "train/loss")
    steps = [point.step for point in history]
    assert steps == sorted(set(steps))
    assert "quality/accuracy" in again.data.metrics
