"""One trial, several processes: waited for, made once, and stopped early where another learning
rate is better."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from changed_trials import in_folder, with_accuracy, with_job
from refusals import refused

from iiet.decoder import Decoder
from orchestrator.cluster.tune import AshaByModel
from orchestrator.cluster.work import WorkPlace
from orchestrator.evaluation import measuring
from orchestrator.evaluation.tasks import LoadedSuite
from orchestrator.records.trial import AshaRule, Trial
from orchestrator.settings import resolve_settings
from orchestrator.sweeping import trial as trial_module
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
from orchestrator.workspace.layout import RUN_LOCK_NAME
from orchestrator.workspace.locks import lock_file


@pytest.fixture
def trials(tiny_plan) -> tuple[Trial, ...]:
    """A teacher that is measured as it is, and its students."""
    return tiny_plan.trials


@pytest.fixture
def measured(monkeypatch) -> None:
    """Measure nothing, which would take tasks."""
    monkeypatch.setattr(trial_module, "measure_trial", with_accuracy)


def starts(trial: Trial) -> int:
    return [r.get("name") for r in read_journal(Path(trial.folder))[0]].count("started")


def test_a_trial_that_another_process_runs_is_waited_for_and_not_made_again(trials, measured):
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


def test_a_trial_whose_measurement_is_stopped_is_measured_later(trials, measured):
    class Stopped(WorkPlace):
        def run(self, *_: Any) -> Any:
            raise Interrupted("what was stored is kept")

    process = ThisProcess()
    process.measured_at = Stopped()
    assert run_trial(trials[0], process) is None
    assert trials[0].result() is None
    assert run_trial(trials[0]) is not None


def test_a_trial_that_lacks_memory_is_a_mistake_of_its_settings(trials, measured, full_memory):
    with refused(UserError, "ran out of memory on cpu", "no space"):
        run_trial(trials[1])


@pytest.fixture
def loss_alone(monkeypatch) -> None:
    """Measure no tasks, but the loss."""
    monkeypatch.setattr(
        trial_module,
        "load_suite",
        lambda suite: LoadedSuite(suite=suite, tasks={}, groups={}, skipped={}),
    )


def test_precision_and_limit_of_the_suite_are_those_of_the_measured_loss(
    trials, loss_alone, monkeypatch
):
    dtypes = []
    token_counts = []

    def loss(decoder: Decoder, _: Path, *, num_tokens: int, **__: Any) -> float:
        dtypes.append(decoder.model.embed_tokens.weight.dtype)
        token_counts.append(num_tokens)
        return 1.0

    monkeypatch.setattr(measuring, "heldout_loss", loss)
    teacher = trials[0]
    changes = {"precision": "bf16", "limit": 3, "sequence_length": 8}
    for suite in (teacher.suite, teacher.suite.model_copy(update=changes)):
        trial = teacher.model_copy(update={"suite": suite})
        trial.result_path.unlink(missing_ok=True)
        run_trial(trial)
    assert dtypes == [torch.float32, torch.bfloat16]
    assert token_counts == [measuring.NUM_VALIDATION_TOKENS, 3 * 8]


def test_where_no_loss_can_be_measured_it_is_missing(trials, loss_alone, monkeypatch):
    monkeypatch.setattr(measuring, "heldout_loss", lambda *_, **__: None)
    result = run_trial(trials[0])
    assert not [name for name in result.numbers if name.startswith("quality/")]


def test_the_worse_of_two_rates_ends_at_a_rung_and_can_continue_later(
    tiny_plan, trials, measured, tmp_path
):
    looks = {"validate_every_steps": 5}
    low, high, alone = (
        in_folder(
            with_job(trials[1], {**looks, "learning_rate": rate}), tmp_path / name, key=name,
            label=name,
        )
        for name, rate in (("low", 1e-5), ("high", 1e-2), ("alone", 1e-2))
    )  # fmt: skip
    alone = with_job(alone, {"num_steps": 7})
    sweep = resolve_settings({}, ["sweep.asha=true"]).sweep
    plan = tiny_plan.model_copy(update={"kind": "iterations", "trials": (low, high, alone)})
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
    assert stop.step == 5
    assert "step 5 of 20" in stop.text
    assert stop.text.rsplit(", ", 1)[1].startswith("high had ")
    assert low.result() is None, "what was not trained to its end is not finished"
    records = read_journal(Path(low.folder))[0]
    assert max(r["step"] for r in records if r["kind"] == "metrics") == 5, "no step more"
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
