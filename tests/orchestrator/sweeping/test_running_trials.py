"""One trial, several processes: waited for, made once, and stopped early where another learning
rate is better."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from changed_trials import in_folder, with_job
from lm_eval_tasks import write_choices
from refusals import refused

from orchestrator.cluster.tune import AshaByModel
from orchestrator.cluster.work import Executor
from orchestrator.data.preparation import prepare
from orchestrator.evaluation.measuring import heldout_loss
from orchestrator.models.load import load_model
from orchestrator.records.trial import AshaRule, SweepTrials, Trial
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.states import (
    RunningSweep,
    competing_trials,
    early_stops,
    trial_states,
)
from orchestrator.sweeping.trial import ThisProcess, run_trial
from orchestrator.terminal.stop import stop_when
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.journal import VALIDATION_METRIC, read_journal
from orchestrator.workspace.layout import RUN_LOCK_NAME, open_workspace
from orchestrator.workspace.locks import lock_file


@pytest.fixture
def plan(tiny_plan, tmp_path) -> SweepTrials:
    """A teacher that is measured as it is, and its students of 8 steps; one item measures each."""
    folder = write_choices(tmp_path / "tasks", "animals", ["hen"])
    changes = {"include_folder": str(folder), "limit": 1}
    teacher, *students = (with_suite(trial, changes) for trial in tiny_plan.trials)
    trials = (teacher, *(with_job(student, {"num_steps": 8}) for student in students))
    return tiny_plan.model_copy(update={"trials": trials})


@pytest.fixture
def trials(plan) -> tuple[Trial, ...]:
    return plan.trials


def with_suite(trial: Trial, changes: dict[str, Any]) -> Trial:
    return trial.model_copy(update={"suite": trial.suite.model_copy(update=changes)})


def starts(trial: Trial) -> int:
    return [r.get("name") for r in read_journal(Path(trial.folder))[0]].count("started")


def test_a_trial_that_another_process_runs_is_waited_for_and_not_made_again(trials):
    trial = trials[1]
    folder = Path(trial.folder)
    result = run_trial(trial)
    assert result == trial.result()
    num_records = len(read_journal(folder)[0])
    text = trial.result_path.read_text()
    trial.result_path.unlink()
    lock = ExitStack()
    lock.enter_context(lock_file(folder / RUN_LOCK_NAME))
    with stop_when(lambda: True):
        assert run_trial(trial) is None

    def finish_it() -> bool:
        trial.result_path.write_text(text)
        lock.close()
        return False

    with stop_when(finish_it):
        assert run_trial(trial) == result
    assert len(read_journal(folder)[0]) == num_records


def test_a_trial_whose_measurement_is_stopped_is_measured_later(trials):
    class Stopped(Executor):
        def run(self, *_: Any) -> Any:
            raise Interrupted("what was stored is kept")

    process = ThisProcess()
    process.executor = Stopped()
    assert run_trial(trials[0], process) is None
    assert trials[0].result() is None
    assert run_trial(trials[0]) is not None


def test_a_trial_that_lacks_memory_is_a_mistake_of_its_settings(trials, full_memory):
    with refused(UserError, "ran out of memory on cpu", "no space"):
        run_trial(trials[1])


def test_precision_and_limit_of_the_suite_are_those_of_the_measured_loss(trials, tiny_tokens):
    teacher = trials[0]
    checkpoint = Path(str(teacher.checkpoint))
    losses = []
    for changes, dtype, length in (
        ({"limit": None}, torch.float32, {}),
        (
            {"precision": "bf16", "limit": 3, "sequence_length": 8},
            torch.bfloat16,
            {"num_tokens": 3 * 8, "sequence_length": 8},
        ),
    ):
        trial = with_suite(teacher, changes)
        trial.result_path.unlink(missing_ok=True)
        losses.append(run_trial(trial).numbers["quality/validation_loss"])
        assert losses[-1] == heldout_loss(
            load_model(checkpoint, dtype=dtype), tiny_tokens, **length
        )
    assert losses[0] != losses[1]


def test_where_no_loss_can_be_measured_it_is_missing(trials, tmp_path):
    rows = [{"prompt": f"{n}: " + "who saw the birds? " * 30, "completion": "I"} for n in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "files", "files": [str(file)], "vocab_size": 300}
    tokens = prepare(resolve_settings({"data": data}).data, open_workspace(tmp_path))
    result = run_trial(with_suite(trials[0], {"tokens_folder": str(tokens)}))
    quality = {name for name in result.numbers if name.startswith("quality/")}
    assert "quality/accuracy" in quality
    assert "quality/validation_loss" not in quality, "the limit is one sequence, of prompts alone"


def test_the_worse_of_two_rates_ends_at_a_rung_and_can_continue_later(plan, trials, tmp_path):
    looks = {"validate_every_steps": 2}
    low, high, alone = (
        in_folder(
            with_job(trials[1], {**looks, "learning_rate": rate}), tmp_path / name, key=name,
            label=name,
        )
        for name, rate in (("low", 1e-5), ("high", 1e-2), ("alone", 1e-2))
    )  # fmt: skip
    alone = with_job(alone, {"num_steps": 3})
    sweep = resolve_settings({}, ["sweep.asha=true"]).sweep
    plan = plan.model_copy(update={"kind": "iterations", "trials": (low, high, alone)})
    assert competing_trials(plan, sweep) == [[low, high]], "other steps are another model"
    competitors = competing_trials(plan, sweep)
    sweep_run = RunningSweep(plan, trial_states(plan, sweep))
    requests = Requests()
    scheduler = AshaByModel(AshaRule.of(sweep), competitors, sweep_run, requests)

    class UnderTune(ThisProcess):
        def __init__(self, trial: Trial) -> None:
            self.tune_trial = SimpleNamespace(config={"key": trial.key}, trial_id=trial.key)
            scheduler.on_trial_add(None, self.tune_trial)

        def report(self, step: int, numbers: Mapping[str, float]) -> None:
            if VALIDATION_METRIC in numbers:
                result = {"step": step, "validation_loss": numbers[VALIDATION_METRIC]}
                decision = scheduler.on_trial_result(None, self.tune_trial, result)
                assert decision == "CONTINUE", "Tune kills nothing"

        def is_beaten(self) -> bool:
            return requests.is_asked(self.tune_trial.trial_id)

    def run(trial: Trial) -> Trial | None:
        result = run_trial(trial, UnderTune(trial))
        sweep_run.on_end(trial.key, result, "")
        return result

    assert run(high) is not None, "the first continues"
    assert run(low) is None
    assert run(alone) is not None, "nobody competes with it"
    stop = early_stops(plan, sweep)[low.key]
    assert sweep_run.stopped == {low.label: stop}
    assert stop.step == 2
    assert "step 2 of 8" in stop.text
    assert stop.text.rsplit(", ", 1)[1].startswith("high had ")
    assert low.result() is None, "what was not trained to its end is not finished"
    records = read_journal(Path(low.folder))[0]
    assert max(r["step"] for r in records if r["kind"] == "metrics") == 2, "no step more"
    other_rule = resolve_settings({}, ["sweep.asha=true", "sweep.asha_first_rung=0.5"]).sweep
    without_rival = plan.model_copy(update={"trials": (low, with_label(high, "other"))})
    assert early_stops(plan, other_rule) == early_stops(without_rival, sweep) == {}
    assert early_stops(plan, resolve_settings({}).sweep) == {}
    assert run_trial(low) is not None
    assert starts(low) == 1, "it resumed from where it was stopped"
    assert early_stops(plan, sweep) == {}


class Requests:
    """Stands for the actor that carries requests to end a trial."""

    def __init__(self) -> None:
        self.keys = set[str]()

    def ask(self, key: str) -> None:
        self.keys.add(key)

    def is_asked(self, key: str) -> bool:
        return key in self.keys


def with_label(trial: Trial, label: str) -> Trial:
    return trial.model_copy(update={"label": label})
