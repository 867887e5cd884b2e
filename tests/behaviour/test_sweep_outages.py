"""An unreachable MLflow during a sweep: finished work is kept, and shown later."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction
from typing import Any

import pytest
from fake_runs import end_trials, finished
from mlflow import MlflowClient
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from orchestrator.pipelines.syncing import sync
from orchestrator.records.trial import Trial
from orchestrator.reporting.report import write_sweep_report
from orchestrator.reporting.results import StoredSweep
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.run import run_trials
from orchestrator.tracking.tracker import Tracking
from orchestrator.workspace.layout import open_workspace


@pytest.mark.slow
def test_mlflow_down_at_any_time_gives_a_warning_and_gets_the_records_later(
    tiny_plan, tmp_path, monkeypatch
):
    workspace = open_workspace(tmp_path)
    is_down = [False]

    def if_up(method: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*arguments: Any, **options: Any) -> Any:
            if is_down[0]:
                raise ConnectionRefusedError("nobody answers")
            return method(*arguments, **options)

        return answer

    for name, method in [*vars(SqlAlchemyStore).items()]:
        if isfunction(method) and not name.startswith("_"):
            monkeypatch.setattr(SqlAlchemyStore, name, if_up(method))
    for when in ("start", "middle"):
        for trial in tiny_plan.trials:
            trial.result_path.unlink(missing_ok=True)
        is_down[0] = when == "start"

        def end(trial: Trial, when: str = when) -> Trial:
            is_down[0] |= when == "middle" and trial == tiny_plan.trials[2]
            return finished(trial)

        end_trials(monkeypatch, end)
        plan = tiny_plan.model_copy(update={"key": f"down at {when}", "name": f"down-{when}"})
        warnings: list[str] = []
        tracking = Tracking(workspace, warn=warnings.append)
        settings = resolve_settings({})
        outcome = run_trials(plan, settings, workspace, tracking=tracking)
        assert len(outcome.results) == len(plan.trials), "no trial knows"
        is_down[0] = True
        stored_sweep = StoredSweep(name=plan.name, key=plan.key, results=outcome.results)
        written = write_sweep_report(
            workspace, stored_sweep, tracking=lambda tracking=tracking: tracking
        )
        assert written.page.is_file()
        assert len(warnings) == 1, warnings

        is_down[0] = False
        sync(workspace=workspace)
        client = MlflowClient(workspace.tracking_uri)
        [run] = client.search_runs(["1"], f"tags.`iiet.key` = '{plan.key}'")
        assert run.info.status == "FINISHED"
        assert "front/size" in run.data.metrics
        assert "mlflow.note.content" in run.data.tags
        trials = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
        assert len(trials) == len(plan.trials)
        assert {trial.info.status for trial in trials} == {"FINISHED"}
