"""A sweep that trains one set of weights for all of its schedules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from lm_eval_tasks import write_choices

from orchestrator.evaluation.measuring import heldout_loss
from orchestrator.models.load import load_model
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.states import RunningSweep, trial_states
from orchestrator.sweeping.trial import run_trial
from orchestrator.sweeping.trials import trials_of_students

SMALL = [
    "sweep.elastic=true",
    "distillation.training.num_steps=1",
    "distillation.training.num_tokens_per_step=64",
    "distillation.training.num_validation_tokens=64",
]


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder of a task of one item."""
    return write_choices(tmp_path / "tasks", "animals", ["hen"])


@pytest.fixture
def plan_of(students, table, tasks) -> Callable[..., SweepTrials]:
    def make(*assignments: str) -> SweepTrials:
        of_teacher = students(*SMALL, *assignments, include_folder=str(tasks), limit=2)
        return trials_of_students(replace(of_teacher, influence=table))

    return make


def test_weights_are_trained_once_and_measured_under_each_schedule(plan_of, space, tasks):
    plan = plan_of()
    results = [result for trial in plan.trials[1:] if (result := run_trial(trial))]
    for result in results:
        decoder = load_model(Path(str(result.checkpoint)), schedule=result.model.corrections)
        loss = heldout_loss(decoder, Path(result.suite.tokens_folder), num_tokens=2 * 16)
        assert result.numbers["quality/validation_loss"] == loss
    assert len({result.numbers["quality/validation_loss"] for result in results}) == 4
    assert len({result.checkpoint for result in results}) == 1
    assert len(list(space.trials.glob("*/done.json"))) == 1
    shutil.rmtree(tasks)  # Nothing can be measured again.
    assert [run_trial(trial) for trial in plan_of().trials[1:]] == results


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
