"""A sweep that trains one set of weights for all of its schedules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_tracking import FakeTracking
from sample_trials import sample_front

from orchestrator.evaluation.measuring import heldout_loss
from orchestrator.models.open import load_model
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.front import with_confidence
from orchestrator.reporting.report import write_sweep_report
from orchestrator.reporting.results import StoredSweep
from orchestrator.reporting.several_schedules import ELASTIC_TITLE, elastic_section
from orchestrator.settings import resolve_settings
from orchestrator.sweeping import trial as trial_module
from orchestrator.sweeping.plan import exact_cost, students_plan
from orchestrator.sweeping.run import LiveSweep, SweepQueue
from orchestrator.sweeping.trial import run_trial
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import Workspace

SMALL = [
    "sweep.elastic=true",
    "distillation.training.num_steps=3",
    "distillation.training.num_tokens_per_step=64",
    "distillation.training.num_validation_tokens=64",
]


@pytest.fixture
def plan_of(students, table) -> Callable[..., SweepPlan]:
    def make(*assignments: str) -> SweepPlan:
        return students_plan(replace(students(*SMALL, *assignments), influence=table))

    return make


def test_weights_are_trained_once_and_measured_under_each_schedule(plan_of, space, monkeypatch):
    def measure(trial: Trial, _: str) -> Trial:
        decoder = load_model(Path(str(trial.checkpoint)), schedule=trial.model.corrections)
        loss = heldout_loss(decoder, Path(trial.suite.tokens_folder))
        return trial.with_numbers("quality", {"validation_loss": loss})

    monkeypatch.setattr(trial_module, "measure_trial", measure)
    plan = plan_of()
    results = [result for trial in plan.trials[1:] if (result := run_trial(trial))]
    assert len({result.numbers["quality/validation_loss"] for result in results}) == 4
    assert len({result.checkpoint for result in results}) == 1
    assert len(list(space.trials.glob("*/done.json"))) == 1
    again = plan_of()
    monkeypatch.setattr(trial_module, "measure_trial", pytest.fail)
    assert [run_trial(trial) for trial in again.trials[1:]] == results


def order_of(plan: SweepPlan, space: Workspace, *, fails: bool) -> tuple[list[str], SweepQueue]:
    """Run a queue of the unfinished trials, each as soon as it can start; return their order."""
    found = {trial.key: result for trial in plan.trials if (result := trial.result())}
    waiting = [trial for trial in plan.trials if trial.key not in found]
    live = LiveSweep(
        plan, resolve_settings({}), FakeTracking(), space.sweeps / "x",
        num_trials=len(plan.trials),
    )  # fmt: skip
    queue = SweepQueue(waiting, found, {}, live, Progress())
    order, running = list[str](), list[Trial]()
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


def test_schedules_wait_for_the_training_of_their_weights(plan_of, space):
    plan = plan_of()
    order, queue = order_of(plan, space, fails=True)
    assert order == ["teacher", "2,1, elastic", "|", "|"]
    assert queue.failures["0,0, elastic"] == "its weights are not trained"

    order, queue = order_of(plan, space, fails=False)
    served = ["1,1, elastic", "1,0, elastic", "0,0, elastic"]
    assert order == ["2,1, elastic", "|", *served, "|", "|", "|"]
    assert queue.failures == {}
    for trial in plan.trials[2:]:
        trial.result_path.unlink()
    order, _ = order_of(plan, space, fails=False)
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


def measured(trial: Trial, accuracy: float, loss: float, flops: float) -> Trial:
    trial = trial.with_numbers("cost", exact_cost(trial.model, trial.model))
    trial = trial.with_numbers("quality", {"accuracy": accuracy, "validation_loss": loss})
    return trial.with_numbers("train", {"flops": flops})


@pytest.mark.slow
def test_the_report_holds_both_side_by_side(plan_of, space):
    plan = plan_of("sweep.compare=true")
    results = []
    for trial in plan.trials:
        accuracy = 0.6 if trial.schedule == (0, 0) and not trial.is_elastic else 0.8
        results.append(measured(trial, accuracy, 5.0, 6e9 if trial.is_elastic else 4e9))
    items = {result.key: evaluation(result.numbers["quality/accuracy"]) for result in results}
    front = sample_front(results)
    section = elastic_section(with_confidence(front, items, num_resamples=10))
    assert section is not None
    found = section.data["elastic"]["schedules"]
    assert [row["schedule"] for row in found] == [[2, 1], [1, 1], [1, 0], [0, 0]]
    same, better = found[0], found[-1]
    assert (same["difference"], same["interval"]) == (0, [0, 0])
    assert 0 < better["interval"][0] < better["difference"] == pytest.approx(0.2)
    assert "38% of the 1.6e+10" in section.notes[0]
    # Without single items, the difference has no interval.
    alone = elastic_section(front)
    assert alone is not None
    assert alone.tables[0].rows[-1].cells[4] == "+20.0"

    written = write_sweep_report(space, StoredSweep(name="x", key="x", results=tuple(results)))
    assert ELASTIC_TITLE in (written.folder / "front.html").read_text("utf-8")
    assert ELASTIC_TITLE in (written.folder / "front.html").read_text("utf-8")
    stored = json.loads((written.folder / "front.json").read_text("utf-8"))["elastic"]
    assert [row["schedule"] for row in stored["schedules"]][-1] == [0, 0]
    assert stored["training_flops"] == [6e9, 16e9]
    # Elastic weights alone have nothing beside them.
    assert elastic_section(sample_front(results[:5])) is None
