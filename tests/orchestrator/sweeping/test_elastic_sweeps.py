"""A sweep that trains one set of weights for all of its schedules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_trials import with_items

from orchestrator.evaluation.measuring import heldout_loss
from orchestrator.models.load import load_model
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.reporting.report import write_sweep_report
from orchestrator.reporting.results import StoredSweep
from orchestrator.settings import resolve_settings
from orchestrator.sweeping import trial as trial_module
from orchestrator.sweeping.plan import exact_cost, students_plan
from orchestrator.sweeping.states import RunningSweep, trial_states
from orchestrator.sweeping.trial import run_trial

SMALL = [
    "sweep.elastic=true",
    "distillation.training.num_steps=3",
    "distillation.training.num_tokens_per_step=64",
    "distillation.training.num_validation_tokens=64",
]


@pytest.fixture
def plan_of(students, table) -> Callable[..., SweepTrials]:
    def make(*assignments: str) -> SweepTrials:
        return students_plan(replace(students(*SMALL, *assignments), influence=table))

    return make


def test_weights_are_trained_once_and_measured_under_each_schedule(plan_of, space, monkeypatch):
    def measure(trial: Trial, *_: Any) -> Trial:
        decoder = load_model(Path(str(trial.checkpoint)), schedule=trial.model.corrections)
        loss = heldout_loss(decoder, Path(trial.suite.tokens_folder))
        return trial.with_numbers("quality", {"validation_loss": loss})

    monkeypatch.setattr(trial_module, "measure_trial", measure)
    plan = plan_of()
    results = [result for trial in plan.trials[1:] if (result := run_trial(trial))]
    assert len({result.numbers["quality/validation_loss"] for result in results}) == 4
    assert len({result.checkpoint for result in results}) == 1
    assert len(list(space.trials.glob("*/done.json"))) == 1
    planned_again = plan_of()
    monkeypatch.setattr(trial_module, "measure_trial", pytest.fail)
    assert [run_trial(trial) for trial in planned_again.trials[1:]] == results


def order_of(plan: SweepTrials, *, fails: bool) -> tuple[list[str], RunningSweep]:
    """Run a queue of the unfinished trials, each as soon as it can start; return their order."""
    queue = RunningSweep(plan, trial_states(plan, resolve_settings({}).sweep))
    order = list[str]()
    running = list[Trial]()
    while not queue.is_over:
        while trial := queue.take():
            order.append(trial.label)
            running.append(trial)
        if queue.is_over:
            break
        order.append("|")  # All that can start has started.
        trial = running.pop(0)
        if trial.job and not fails:
            name = f"step_{trial.job.recipe.num_steps:08d}"
            (trial.job.folder / name).mkdir(parents=True, exist_ok=True)
        has_failed = bool(trial.job) and fails
        if not has_failed:
            trial.write(trial.result_path)
        queue.on_end(trial.key, None if has_failed else trial, "no luck" if has_failed else "")
    return order, queue


def test_schedules_wait_for_the_training_of_their_weights(plan_of):
    plan = plan_of()
    order, queue = order_of(plan, fails=True)
    assert order == ["teacher", "2,1, elastic", "|", "|"]
    assert queue.failures["0,0, elastic"]

    order, queue = order_of(plan, fails=False)
    served = ["1,1, elastic", "1,0, elastic", "0,0, elastic"]
    assert order == ["2,1, elastic", "|", *served, "|", "|", "|"]
    assert queue.failures == {}
    for trial in plan.trials[2:]:
        trial.result_path.unlink()
    order, _ = order_of(plan, fails=False)
    assert order[:3] == served, "the weights are there, and nothing waits"


def evaluation(share: float, name: str = "task") -> EvaluationResult:
    right = (np.arange(200) < 200 * share).astype(float)
    result = TaskResult(
        name=name,
        version="1",
        num_items=200,
        num_fewshot=0,
        metrics={"acc": float(right.mean())},
        items=[f"item {number}" for number in range(200)],
        values={"acc": right.tolist()},
    )
    return EvaluationResult(results={name: result})


def measured(trial: Trial, accuracy: float) -> Trial:
    trial = trial.with_numbers("cost", exact_cost(trial.model, trial.model))
    return trial.with_numbers("quality", {"accuracy": accuracy})


@pytest.mark.slow
def test_one_report_of_two_sweeps_holds_elastic_weights_and_students(plan_of, space):
    sweeps = []
    for name, plan in (("elastic", plan_of()), ("students", plan_of("sweep.elastic=false"))):
        results = []
        items = {}
        for trial in plan.trials:
            accuracy = 0.6 if trial.schedule == (0, 0) and not trial.is_elastic else 0.8
            results.append(measured(trial, accuracy))
            items[trial.key] = evaluation(accuracy)
        stored = with_items(space, results, items)
        sweeps.append(StoredSweep(name=name, key=name, results=stored))

    report = write_sweep_report(space, *sweeps)
    by_name = {row["label"]: row for row in report.front.rows}
    schedules = ("2,1", "1,1", "1,0", "0,0")
    trained_labels = {name for schedule in schedules for name in (schedule, f"{schedule}, elastic")}
    assert by_name.keys() == {"teacher", *trained_labels}
    stored = json.loads((report.folder / "front.json").read_text("utf-8"))
    assert {row["name"] for row in stored["results"]} == by_name.keys()
    quality = report.front.axes.quality
    to_full = {
        name: report.front.intervals[row["key"], quality, "teacher"]
        for name, row in by_name.items()
        if name != "teacher"
    }
    assert to_full["0,0, elastic"].value == to_full["0,0, elastic"].high == 0
    assert to_full["0,0"].low < to_full["0,0"].value == pytest.approx(-0.2)
    assert to_full["0,0"].high < 0
