"""A sweep says what was stopped early and why, and goes on with it when asked to stop nothing."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
from changed_trials import with_job
from fake_tracking import FakeTracking

from iiet.cost import inference_cost
from orchestrator.evaluation import decode_timing as benchmark
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.asha import asha_trials, record_early_stop, stored_early_stop
from orchestrator.sweeping.execution import STOPPED_TAG, SweepOutcome, run_sweep
from orchestrator.sweeping.trial_queue import TrialQueue
from orchestrator.tracking import Tracking
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import open_workspace


class SweepTracking(FakeTracking):
    """Stands for MLflow, with what the sweep's own run shows."""

    @property
    def sweep(self) -> TrackedRun:
        [run] = [run for run in self.runs.values() if run.kind == "sweep"]
        return run

    @property
    def metrics(self) -> dict[str, float]:
        return {name: value for name, value, _ in self.sweep.points}

    @property
    def ended(self) -> list[tuple[str, str]]:
        trials = [run for run in self.runs.values() if run.parent]
        assert all(run.parent == self.sweep.key for run in trials)
        return [(run.key, run.status) for run in trials]


def finish(trial: Trial) -> None:
    measured = {"numbers": {"quality/accuracy": 0.5, "train/flops": 1}}
    trial.model_copy(update=measured).write(trial.result_path)


def test_what_was_stopped_is_told_and_trained_on_without_stopping(
    tiny_plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, better = tiny_plan.trials[1], tiny_plan.trials[2]
    rated = with_job(stopped, {"learning_rate": 1.0})
    better = better.model_copy(update={"job": rated.job})
    trials = (tiny_plan.trials[0], stopped, better, *tiny_plan.trials[3:])
    plan = tiny_plan.model_copy(update={"kind": "iterations", "trials": trials})
    for trial in trials:
        if trial is not stopped:
            finish(trial)
    asha = asha_trials(plan, resolve_settings({}, ["sweep.asha=true"]).sweep)
    record_early_stop(asha, stopped.key, 30, 5.0)
    stop = stored_early_stop(stopped, asha[stopped.key])
    assert stop is not None
    asked: list[str] = []
    monkeypatch.setattr(
        TrialQueue, "run", lambda self, waiting, _: asked.extend(trial.key for trial in waiting)
    )
    monkeypatch.setattr(benchmark, "SWEEP_PROMPT_TOKENS", 4)
    monkeypatch.setattr(benchmark, "SWEEP_NEW_TOKENS", 2)
    tracking = SweepTracking()

    def outcome_of(*assignments: str) -> SweepOutcome:
        settings = resolve_settings({}, assignments)
        workspace = open_workspace(tmp_path)
        return run_sweep(plan, settings, workspace, tracking=cast("Tracking", tracking))

    outcome = outcome_of("sweep.asha=true")
    assert asked == []
    assert outcome.stopped == {stopped.label: stop.text}
    assert outcome.failures == {}
    assert stopped.key not in {result.key for result in outcome.results}
    assert len(outcome.results) == len(trials) - 1
    assert better.label in tracking.sweep.tags[STOPPED_TAG]
    assert tracking.metrics == {"sweep/trainings_saved": pytest.approx(0.25)}
    assert tracking.sweep.journal is not None
    records, _ = read_journal(Path(tracking.sweep.journal))
    assert len(records) == 2, "the front over time, from what was found finished"
    finished = [(trial.key, "FINISHED") for trial in tiny_plan.trials if trial.result()]
    assert tracking.ended == [*finished, (stopped.key, "KILLED")]

    assert outcome_of().stopped == {}
    assert asked == [stopped.key]


def test_what_a_stored_teacher_costs_is_counted_once(
    tiny_plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(rounds: TrialQueue, waiting: list[Trial], _: None) -> None:
        assert all(trial.job and trial.job.teacher_cache for trial in waiting if trial.job)
        for trial in waiting:
            finish(trial)

    monkeypatch.setattr(TrialQueue, "run", run)
    monkeypatch.setattr(benchmark, "SWEEP_PROMPT_TOKENS", 4)
    monkeypatch.setattr(benchmark, "SWEEP_NEW_TOKENS", 2)
    tracking = SweepTracking()
    settings = resolve_settings({}, ["distillation.teacher_cache=true"])
    run_sweep(tiny_plan, settings, open_workspace(tmp_path), tracking=cast("Tracking", tracking))
    job = tiny_plan.trials[-1].job
    assert job
    num_tokens = job.recipe.num_steps * job.recipe.num_tokens_per_step
    forward = inference_cost(tiny_plan.trials[0].model).forward_flops_per_token
    assert tracking.metrics["sweep/teacher_tokens"] == num_tokens
    assert tracking.metrics["sweep/teacher_flops"] == num_tokens * forward
