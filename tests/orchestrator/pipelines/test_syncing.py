"""A workspace can be published again: an empty store gets all runs, a full one gets nothing new."""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fake_runs import end_trials, finished
from kept_progress import KeptProgress
from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrator.data.mixture import describe_data
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.syncing import sync
from orchestrator.records.tracked_run import NOTE_TAG, TrackedRun
from orchestrator.records.trial import Trial
from orchestrator.reporting.report import write_sweep_report
from orchestrator.reporting.results import StoredSweep
from orchestrator.settings import SETTINGS_NAME, resolve_settings, to_yaml
from orchestrator.sweeping.run import run_trials
from orchestrator.training.run_locks import lock_run_folder
from orchestrator.training.trainer import run_job
from orchestrator.training.watching import RunMonitor
from orchestrator.workspace.journal import Journal, now_ms, recorded_times
from orchestrator.workspace.layout import Workspace, open_workspace


def stored_runs(database: Path) -> dict[tuple[str, str], Run]:
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("iiet-orch")
    runs = client.search_runs([experiment.experiment_id])
    by_kind_and_key = {(run.data.tags["iiet.kind"], run.data.tags["iiet.key"]): run for run in runs}
    assert len(by_kind_and_key) == len(runs), "a run was made twice"
    return by_kind_and_key


def points(database: Path) -> list[Any]:
    query = (
        "SELECT t.value, m.key, m.step, m.value, m.timestamp FROM metrics m "
        "JOIN tags t ON t.run_uuid = m.run_uuid AND t.key = 'iiet.key' ORDER BY 1, 2, 3, 5"
    )
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def train(trial: Trial) -> None:
    journal = Journal(Path(trial.folder))
    journal.event("started")
    for step in range(1, 4):
        journal.metrics(step, {"train/loss": 5.0 - step, "train/learning_rate": 1e-3})
    journal.event("finished")
    journal.close()


def last_checkpoint(trial: Trial) -> str:
    return trial.checkpoint or f"{trial.folder}/step_00000003"


@pytest.fixture
def workspace(tiny_plan, tiny_job, tmp_path, monkeypatch) -> Workspace:
    """A pretraining, a student, a table, and a sweep in which one trial has failed."""
    workspace = open_workspace(tmp_path)
    settings = resolve_settings({})
    context = Context(workspace)
    job = tiny_job("runs/pre", num_steps=2)
    job.folder.mkdir(parents=True)
    (job.folder / SETTINGS_NAME).write_text(to_yaml(settings))
    student = tiny_job("trials/abc", num_steps=2, seed=1)
    for kind, trained in (("pretrain", job), ("distill", student)):
        monitor = RunMonitor({"iiet": trained}, context.tracking, context.progress)
        monitor.open_runs(kind, {"iiet": settings})
        with monitor:
            run_job(trained)
    picture = tmp_path / "influence.png"
    picture.write_bytes(b"a picture")
    context.log_measurement(
        TrackedRun.of(
            key="table",
            kind="influence",
            name="influence of pre",
            params={"checkpoint": workspace.runs / "pre", "num_tokens": 64},
            metrics={"unknown": math.nan},
            points=[("influence/layer_01", 0.5, 1), ("influence/layer_01", 0.25, 2)],
            dataset=describe_data(job.tokens_folder),
            files={"influence": [str(picture), str(tmp_path / "missing.png")]},
        ),
        now_ms() - 2000,
    )

    ended: list[Trial] = []

    def end(trial: Trial) -> Trial | str:
        if trial.job:
            train(trial)
        ended.append(trial)
        if len(ended) == 3:
            return "no space"
        sweep = finished(trial, 0.5 - 0.01 * len(ended), last_checkpoint(trial))
        # A file system's clock may lag by some ms, and here no work lies between start and result.
        os.utime(trial.result_path, ns=(time.time_ns(), time.time_ns()))
        return sweep

    end_trials(monkeypatch, end)
    outcome = run_trials(tiny_plan, settings, workspace, tracking=context.tracking)
    assert set(outcome.failures.values()) == {"no space"}
    sweep = StoredSweep(name=tiny_plan.name, key=tiny_plan.key, results=outcome.results)
    write_sweep_report(workspace, sweep, tracking=lambda: context.tracking)
    journal = Journal(workspace.sweeps / outcome.plan.name)
    journal.event("finished")
    journal.close()
    context.tracking.wait()
    return workspace


@pytest.mark.slow
def test_a_finished_workspace_is_published_in_an_empty_store_and_only_once(
    workspace, tiny_plan, tmp_path, monkeypatch
):
    database = tmp_path / "other.db"
    before = stored_runs(workspace.database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    result = sync(workspace=workspace)
    assert (result.trainings, result.sweeps) == (("pre",), (tiny_plan.name,))
    assert (result.students, result.measurements) == (("abc",), ("influence-table",))
    after = stored_runs(database)
    assert set(after) == set(before)
    assert len(after) == 4 + len(tiny_plan.trials)
    for place, run in before.items():
        new = after[place]
        assert new.info.status == run.info.status, place
        expected = pytest.approx(run.data.metrics, rel=0, abs=0, nan_ok=True)
        assert new.data.metrics == expected, place
        with_ids = {"mlflow.parentRunId", NOTE_TAG}
        shown = [{k: v for k, v in r.data.tags.items() if k not in with_ids} for r in (run, new)]
        assert shown[0] == shown[1]
        assert run.data.params == new.data.params
        assert new.info.end_time == run.info.end_time, place
        parent = new.data.tags.get("mlflow.parentRunId")
        assert (parent is None) == (place[0] in ("pretrain", "distill", "influence", "sweep"))
        assert new.info.run_name == run.info.run_name
    [sweep] = [run for (kind, _), run in after.items() if kind == "sweep"]
    start, end = recorded_times(workspace.sweeps / tiny_plan.name) or (0, 0)
    assert sweep.info.start_time == start
    assert start < sweep.info.end_time <= end
    assert f"run_uuid={sweep.info.run_id}" in sweep.data.tags[NOTE_TAG]
    table = after["influence", "table"]
    assert table.data.params["checkpoint"] == "runs/pre"
    files = MlflowClient(f"sqlite:///{database}").list_artifacts(table.info.run_id, "influence")
    assert [file.path for file in files] == ["influence/influence.png"]
    [failed] = [run for run in after.values() if run.info.status == "FAILED"]
    assert failed.data.tags[NOTE_TAG] == "**Failed:** No space"

    copied = points(database)
    assert len(copied) == len(set(copied))
    steps = [(row[0], row[2]) for row in copied if row[1] == "train/loss"]
    assert len(steps) == len(set(steps)) > 3
    sync(workspace=workspace)
    assert points(database) == copied
    assert stored_runs(database).keys() == after.keys()


def test_a_damaged_file_is_noted_and_the_others_are_published(tmp_path):
    workspace = open_workspace(tmp_path)
    (workspace.tracked / "sweep").mkdir(parents=True)
    readable = TrackedRun(key="whole", kind="trial", name="t", parent="sweep")
    readable.write(readable.path(workspace))
    (workspace.tracked / "sweep" / "trial-broken.json").write_text("{")
    (workspace.tracked / "registered").mkdir()
    (workspace.tracked / "registered" / "toy@best.json").write_text("{")
    progress = KeptProgress()
    sync(workspace=workspace, progress=progress)
    damaged = [note.split(" is not published: ")[0] for note in progress.notes]
    assert damaged == ["trial-broken", "toy@best"]
    assert stored_runs(workspace.database).keys() == {("trial", "whole"), ("sweep", "sweep")}


def test_what_was_killed_without_a_word_is_shown_as_killed_and_what_runs_is_left(tmp_path):
    workspace = open_workspace(tmp_path)
    for sweep, trial in (("dead", "killed"), ("live", "running"), ("live", "gone")):
        folder = workspace.trials / trial
        journal = Journal(folder)
        journal.metrics(1, {"train/loss": 2.0})
        journal.close()
        run = TrackedRun(
            key=trial, kind="trial", name=trial, parent=sweep, status="RUNNING",
            folder=str(folder), journal=str(folder),
        )  # fmt: skip
        run.write(run.path(workspace))
        sweep_run = TrackedRun(key=sweep, kind="sweep", name=sweep, status="RUNNING")
        sweep_run.write(sweep_run.path(workspace))
    shutil.rmtree(workspace.trials / "gone")
    with lock_run_folder(workspace.trials / "running"):
        assert sync(workspace=workspace).sweeps == ("sweep-dead",)
    stored = stored_runs(workspace.database)
    assert {key: run.info.status for (_, key), run in stored.items()} == {
        "dead": "KILLED", "killed": "KILLED",
    }  # fmt: skip
    times = recorded_times(workspace.trials / "killed")
    assert times is not None
    assert stored["trial", "killed"].info.end_time >= times[1]
    assert stored["trial", "killed"].data.metrics == {"train/loss": 2.0}
