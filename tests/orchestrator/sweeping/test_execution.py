"""A sweep says what was stopped early and why, and goes on with it when asked to stop nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from changed_trials import with_job

from iiet.cost import inference_cost
from orchestrator.evaluation import decode_timing as benchmark
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.asha import asha_trials, record_early_stop, stored_early_stop
from orchestrator.sweeping.execution import STOPPED_TAG, SweepOutcome, run_sweep
from orchestrator.sweeping.trial_queue import TrialQueue
from orchestrator.tracking import NestedRun, Tracking
from orchestrator.workspace.layout import open_workspace


class FakeTracking:
    """Stands for MLflow, and for the sweep's run in it."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.metrics: dict[str, float] = {}
        self.mirrored: list[Path] = []
        self.ended: list[tuple[str, str]] = []

    def run(self, key: str, **_: Any) -> FakeTracking:
        return self

    def log_nested(self, runs: Sequence[NestedRun], *, parent: FakeTracking) -> None:
        assert parent is self
        self.ended += [(run.key, run.status) for run in runs]

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.tags |= tags

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self.metrics |= values

    def log_journal(self, folder: Path) -> None:
        self.mirrored.append(folder)

    def log_dataset(self, *_: Any) -> None:
        pass

    def log_text(self, *_: Any) -> None:
        pass

    def finish(self, *_: Any) -> None:
        pass


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
    tracking = FakeTracking()

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
    assert better.label in tracking.tags[STOPPED_TAG]
    assert tracking.metrics == {"sweep/trainings_saved": pytest.approx(0.25)}
    assert len(tracking.mirrored) == 1, "the front over time, from what was found finished"
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
    tracking, settings = FakeTracking(), resolve_settings({}, [])
    run_sweep(tiny_plan, settings, open_workspace(tmp_path), tracking=cast("Tracking", tracking))
    job = tiny_plan.trials[-1].job
    assert job
    num_tokens = job.recipe.num_steps * job.recipe.num_tokens_per_step
    forward = inference_cost(tiny_plan.trials[0].model).forward_flops_per_token
    assert tracking.metrics["sweep/teacher_tokens"] == num_tokens
    assert tracking.metrics["sweep/teacher_flops"] == num_tokens * forward
