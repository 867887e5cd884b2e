"""A full disk or an unreachable MLflow during a sweep: finished work is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.evaluation import decode_timing as benchmark
from orchestrator.pipelines.syncing import sync
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.results import StoredSweep
from orchestrator.reporting.sweep_report import write_sweep_report
from orchestrator.settings import SweepSettings, resolve_settings
from orchestrator.sweeping.execution import run_sweep
from orchestrator.sweeping.trial_queue import TrialQueue
from orchestrator.tracking import Tracking
from orchestrator.tracking.store import Store
from orchestrator.workspace.layout import open_workspace


@pytest.mark.long
def test_a_full_disk_fails_a_trial_with_its_reason_and_the_others_continue(
    tiny_plan: SweepPlan, ray_session: None, tmp_path: Path
) -> None:
    from orchestrator.cluster.ray_tune import TrialContext, run_trials

    victim, other = tiny_plan.trials[1:3]

    def run(parameters: dict[str, Any], context: TrialContext) -> dict[str, Any]:
        import resource

        from orchestrator.sweeping import trial_run

        trial_run.measure_trial = lambda trial, _: trial.with_numbers("quality", {"accuracy": 0.5})
        # No file may grow beyond this, as on a disk that is full.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        room = 4096 if parameters["is_full"] else limits[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            return {"state": trial_run.run_trial(Trial.model_validate(parameters["trial"])).state}
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def reports(is_full: bool) -> list[Any]:
        given = {
            trial.key: {
                "trial": trial.model_dump(mode="json"),
                "is_full": is_full and trial is victim,
            }
            for trial in (victim, other)
        }
        sweep = SweepSettings(max_failures_per_trial=1)
        ended = run_trials(run, given, tmp_path / "s", sweep)
        return [ended[key] for key in given]

    failed, made = reports(is_full=True)
    assert failed.result is None
    assert "File too large" in failed.error
    assert made.result == {"state": "made"}
    assert victim.result() is None
    again, found = reports(is_full=False)
    assert again.result == {"state": "made"}, again.error
    assert found.result == {"state": "found"}


def finish(trial: Trial) -> None:
    measured = {"numbers": {"quality/accuracy": 0.5, "train/flops": 1}}
    trial.model_copy(update=measured).write(trial.result_path)


@pytest.mark.slow
def test_mlflow_down_at_any_time_gives_a_warning_and_gets_the_records_later(
    tiny_plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, is_down, connect = open_workspace(tmp_path), [False], Store.connect

    def connect_if_up(store: Store) -> Any:
        if is_down[0]:
            raise ConnectionRefusedError("nobody answers")
        return connect(store)

    def run_rounds(then: Callable[[], None]) -> Callable[..., None]:
        def run(rounds: TrialQueue, waiting: list[Trial], _: None) -> None:
            for number, trial in enumerate(waiting):
                finish(trial)
                rounds.watch([trial])
                rounds.on_end(trial, "made", "")
                if number == 1:
                    then()

        return run

    monkeypatch.setattr(Store, "connect", connect_if_up)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(benchmark, "SWEEP_PROMPT_TOKENS", 4)
    monkeypatch.setattr(benchmark, "SWEEP_NEW_TOKENS", 2)
    for when in ("start", "middle", "end"):
        for trial in tiny_plan.trials:
            trial.result_path.unlink(missing_ok=True)
        is_down[0] = when == "start"

        def go_down(when: str = when) -> None:
            is_down[0] |= when == "middle"

        monkeypatch.setattr(TrialQueue, "run", run_rounds(go_down))
        plan = tiny_plan.model_copy(update={"key": f"down at {when}", "name": f"down-{when}"})
        told: list[str] = []
        tracking = Tracking(workspace, warn=told.append)
        settings = resolve_settings({})
        outcome = run_sweep(plan, settings, workspace, tracking=tracking)
        assert len(outcome.results) == len(plan.trials), "no trial knows"
        is_down[0] = True
        found = StoredSweep(name=plan.name, key=plan.key, results=outcome.results)
        written = write_sweep_report(workspace, found, tracking=tracking)
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
