"""A full disk or an unreachable MLflow during a sweep: finished work is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_runs import end_trials, finished
from list_queue import ListQueue, run_queue
from mlflow import MlflowClient

from orchestrator.cluster.tune import TrialFunction, TrialPlace
from orchestrator.pipelines.syncing import sync
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.report import write_sweep_report
from orchestrator.reporting.results import StoredSweep
from orchestrator.settings import SweepSettings, resolve_settings
from orchestrator.sweeping.run import run_plan
from orchestrator.tracking.store import Store
from orchestrator.tracking.tracker import Tracking
from orchestrator.workspace.layout import open_workspace


@pytest.mark.long
def test_a_full_disk_fails_a_trial_with_its_reason_and_the_others_continue(
    tiny_plan: SweepPlan, ray_session: None, tmp_path: Path
) -> None:
    victim, other = tiny_plan.trials[1:3]

    def limited(is_full: bool) -> TrialFunction:
        def run(trial: Trial, place: TrialPlace) -> Trial | None:
            import resource

            from orchestrator.sweeping import trial as module

            module.measure_trial = lambda one, _: one.with_numbers("quality", {"accuracy": 0.5})
            # No file may grow beyond this, as on a disk that is full.
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            room = 4096 if is_full and trial.key == victim.key else limits[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            try:
                return module.run_trial(trial, place)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        return run

    sweep = SweepSettings(max_failures_per_trial=1)
    ended = run_queue(ListQueue([victim, other]), limited(True), tmp_path, sweep)
    failed, made = ended[victim.key], ended[other.key]
    assert failed[0] is None
    assert "File too large" in failed[1]
    assert made[0] is not None
    assert victim.result() is None
    ended = run_queue(ListQueue([victim, other]), limited(False), tmp_path, sweep)
    assert ended[victim.key][0] is not None, ended
    assert ended[other.key] == made, "found, and not made again"


@pytest.mark.slow
def test_mlflow_down_at_any_time_gives_a_warning_and_gets_the_records_later(
    tiny_plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, is_down, connect = open_workspace(tmp_path), [False], Store.connect

    def connect_if_up(store: Store) -> Any:
        if is_down[0]:
            raise ConnectionRefusedError("nobody answers")
        return connect(store)

    monkeypatch.setattr(Store, "connect", connect_if_up)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for when in ("start", "middle", "end"):
        for trial in tiny_plan.trials:
            trial.result_path.unlink(missing_ok=True)
        is_down[0] = when == "start"

        def end(trial: Trial, when: str = when) -> Trial:
            is_down[0] |= when == "middle" and trial == tiny_plan.trials[2]
            return finished(trial)

        end_trials(monkeypatch, end)
        plan = tiny_plan.model_copy(update={"key": f"down at {when}", "name": f"down-{when}"})
        told: list[str] = []
        tracking = Tracking(workspace, warn=told.append)
        settings = resolve_settings({})
        outcome = run_plan(plan, settings, workspace, tracking=tracking)
        assert len(outcome.results) == len(plan.trials), "no trial knows"
        is_down[0] = True
        found = StoredSweep(name=plan.name, key=plan.key, results=outcome.results)
        written = write_sweep_report(workspace, found, tracking=lambda tracking=tracking: tracking)
        assert written.page is not None
        assert written.page.is_file()
        assert len(told) == 1, told

        is_down[0] = False
        sync(workspace=workspace)
        client = MlflowClient(workspace.tracking_uri)
        [run] = client.search_runs(["1"], f"tags.`iiet.key` = '{plan.key}'")
        assert run.info.status == "FINISHED"
        assert "sweep/hypervolume" in run.data.metrics
        assert "mlflow.note.content" in run.data.tags
        trials = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
        assert len(trials) == len(plan.trials)
        assert {trial.info.status for trial in trials} == {"FINISHED"}
