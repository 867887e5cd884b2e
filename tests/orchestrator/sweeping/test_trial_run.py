"""One trial, several processes: made once, waited for, taken over from the dead; and ended where it
cannot win."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from changed_trials import in_folder, with_accuracy, with_job

from iiet.decoder import Decoder
from orchestrator.cluster.asha_scheduler import AshaByModel
from orchestrator.evaluation import measuring
from orchestrator.evaluation import suite as loading
from orchestrator.evaluation.suite import Suite
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.settings import resolve_settings
from orchestrator.sweeping import trial_run
from orchestrator.sweeping.asha import asha_trials, record_early_stop, stored_early_stop
from orchestrator.sweeping.trial_run import is_trial_locked, run_trial
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import interruption_text, stop_when
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import Interrupted, RunFailed
from orchestrator.workspace.journal import VALIDATION_METRIC, read_journal
from orchestrator.workspace.layout import DONE_NAME, RUN_LOCK_NAME
from orchestrator.workspace.locks import lock_file

WORKER = """
import json, sys
from pathlib import Path
from orchestrator.evaluation.measuring import heldout_loss
from orchestrator.sweeping import trial_run
from orchestrator.models.open import (load_model)

def measure(trial, device):
    with (Path(trial.folder) / "measured").open("a") as file:
        file.write("once\\n")
    decoder = load_model(Path(trial.checkpoint), schedule=trial.model.corrections)
    loss = heldout_loss(decoder, Path(trial.suite.tokens_folder))
    return trial.with_numbers("quality", {"validation_loss": loss})

trial_run.measure_trial = measure
print("ready", flush=True)
for line in sys.stdin:
    run = trial_run.run_trial(trial_run.Trial.model_validate_json(line))
    print(json.dumps([run.state, run.result.model_dump(mode="json")]), flush=True)
"""

HOLDER = """
import sys
from pathlib import Path
from orchestrator.workspace.locks import lock_descriptor
lock = Path(sys.argv[1]).open("w")
lock_descriptor(lock.fileno())
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def trials(tiny_plan: SweepPlan) -> tuple[Trial, ...]:
    """A teacher that is measured as it is, and its students."""
    return tiny_plan.trials


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure nothing, which would take tasks."""
    monkeypatch.setattr(trial_run, "measure_trial", with_accuracy)


def starts(trial: Trial) -> int:
    return [r.get("name") for r in read_journal(Path(trial.folder))[0]].count("started")


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a script and return when it has said its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() in ("ready\n", "held\n")
    return process


@pytest.mark.slow
def test_two_processes_make_a_trial_once(trials: tuple[Trial, ...]) -> None:
    processes = [start(WORKER) for _ in range(2)]
    for trial in trials[:2]:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(trial.model_dump(mode="json")) + "\n")
            process.stdin.flush()
        answers = [json.loads(p.stdout.readline()) for p in processes if p.stdout]
        assert sorted(state for state, _ in answers) == ["found", "made"]
        assert answers[0][1] == answers[1][1]
        assert starts(trial) == (1 if trial.job else 0)
        assert (Path(trial.folder) / "measured").read_text() == "once\n"
    for process in processes:
        process.communicate()
        assert process.returncode == 0


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[1]",
        '{"step": 2}',
        '{"checkpoint": null, "step": 7, "finished": true, "num_tokens": 9}',
    ],
)
def test_a_damaged_record_of_a_training_costs_only_its_numbers(
    trials: tuple[Trial, ...], measured: None, record: str
) -> None:
    (Path(str(trials[0].checkpoint)).parent / DONE_NAME).write_text(record)
    run = run_trial(trials[0])
    assert run.result is not None
    training = {n: v for n, v in run.result.numbers.items() if n.startswith("train/")}
    assert training == {"train/steps": 2}, "another step's record says nothing of this one"


def test_a_trial_is_taken_over_from_a_process_that_died(
    trials: tuple[Trial, ...], measured: None
) -> None:
    trial = trials[1]
    folder = Path(trial.folder)
    folder.mkdir(parents=True)
    with start(HOLDER, str(folder / RUN_LOCK_NAME)) as holder:
        assert is_trial_locked(trial)
        assert run_trial(trial, wait=False).state == "busy"
        with stop_when(lambda: True):
            assert run_trial(trial).state == "stopped"
        assert starts(trial) == 0

        def kill_what_it_waits_for() -> bool:
            holder.kill()
            return False

        with stop_when(kill_what_it_waits_for):
            run = run_trial(trial)
    assert run.state == "made"
    assert starts(trial) == 1
    assert not is_trial_locked(trial)
    assert run_trial(trial).state == "found"


def test_a_trial_that_was_finished_while_we_waited_is_not_made_again(
    trials: tuple[Trial, ...], measured: None
) -> None:
    trial = trials[1]
    folder = Path(trial.folder)
    made = run_trial(trial)
    text = trial.result_path.read_text()
    trial.result_path.unlink()
    lock = ExitStack()
    lock.enter_context(lock_file(folder / RUN_LOCK_NAME))

    def finish_it() -> bool:
        trial.result_path.write_text(text)
        lock.close()
        return False

    with stop_when(finish_it):
        run = run_trial(trial)
    assert run.state == "found"
    assert run.result == made.result


def test_a_stopped_trial_lets_another_process_go_on(
    trials: tuple[Trial, ...], measured: None
) -> None:
    trial = trials[1]
    asked = iter([False, False, True, True])
    with stop_when(lambda: next(asked)):
        assert run_trial(trial).state == "stopped"
    assert not is_trial_locked(trial)
    assert run_trial(trial).state == "made"
    assert starts(trial) == 1, "it went on from its checkpoint"


@pytest.mark.parametrize("error", [None, "OSError: no room"])
def test_an_interrupted_sweep_says_what_is_saved_and_a_trial_that_failed_meanwhile(
    error: str | None,
    trials: tuple[Trial, ...],
    tmp_path: Path,
    measured: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from orchestrator.cluster.tune_callback import TrialReport
    from orchestrator.sweeping import trial_queue as trial_rounds

    finished, begun, waits = trials[:3]
    run_trial(finished)

    def run_trials(_: Any, given: dict[str, Any], *__: Any, hooks: Any, **_more: Any) -> None:
        asked = iter([False] * 5 + [True] * 2)
        with stop_when(lambda: next(asked)):
            run_trial(begun)
        hooks.watch({begun.key})
        if error:
            assert begun.key in given
            hooks.on_result(TrialReport(begun.key, error=error, after_stop=True))
        raise Interrupted(interruption_text(hooks.saved()))

    monkeypatch.setattr(trial_rounds, "ray_cluster", lambda *_, **__: nullcontext())
    monkeypatch.setattr(trial_rounds, "run_trials", run_trials)
    sweep = resolve_settings({}).sweep
    rounds = trial_rounds.TrialQueue(tmp_path / "sweep", sweep, Progress(), num_all=3)
    with pytest.raises(RunFailed if error else Interrupted) as caught:
        rounds.run([begun, waits])
    saved = f"1 of 3 trials are finished; trial {begun.label}: saved at step 5"
    assert saved in str(caught.value)
    if error:
        assert str(caught.value).startswith(f"trial {begun.label} failed: OSError: no room; ")


@pytest.mark.slow
def test_a_sweep_passes_over_what_another_is_at_and_comes_back_to_it(
    trials: tuple[Trial, ...],
    tmp_path: Path,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from orchestrator.sweeping import trial_queue as trial_rounds
    from orchestrator.terminal.progress import Progress

    asked, finished_meanwhile = trials[:4], trials[3]
    lock = ExitStack()
    lock.enter_context(lock_file(Path(trials[2].folder) / RUN_LOCK_NAME))
    rounds_function = trial_rounds.run_tune_trial

    def measure_nothing(parameters: dict[str, Any], context: Any) -> dict[str, Any]:
        from orchestrator.sweeping import trial_run

        trial_run.measure_trial = lambda trial, _: trial.with_numbers("quality", {"accuracy": 0.5})
        return rounds_function(parameters, context)

    class Told(Progress):
        summary = ""

        def note(self, text: str) -> None:
            assert text == f"waiting for another process, which trains {trials[2].label}"
            assert [trial.result() is not None for trial in asked] == [True, True, False, True]
            lock.close()

        def finish(self, summary: str) -> None:
            self.summary = summary

    monkeypatch.setattr(trial_rounds, "run_tune_trial", measure_nothing)
    monkeypatch.setattr(trial_run, "measure_trial", with_accuracy)
    run_trial(finished_meanwhile)
    progress = Told()
    rounds = trial_rounds.TrialQueue(
        tmp_path / "sweep", resolve_settings({}).sweep, progress, num_all=4
    )
    rounds.run(asked)
    assert progress.summary == "4 trials, 1 made by another process meanwhile"
    assert rounds.made == {trial.key for trial in trials[:3]}
    assert rounds.failures == {}
    assert [starts(trial) for trial in asked] == [0, 1, 1, 1]


def test_the_precision_of_the_suite_is_that_of_the_measured_model(
    trials: tuple[Trial, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = []

    def loss(decoder: Decoder, _: Path, **__: Any) -> float:
        dtypes.append(decoder.embedding.weight.dtype)
        return 1.0

    no_tasks = Suite(tasks={}, groups={}, skipped={})
    monkeypatch.setattr(trial_run, "load_suite", lambda *_: no_tasks)
    monkeypatch.setattr(measuring, "heldout_loss", loss)
    teacher = trials[0]
    for suite in (teacher.suite, teacher.suite.model_copy(update={"precision": "bf16"})):
        trial = teacher.model_copy(update={"suite": suite})
        trial.result_path.unlink(missing_ok=True)
        run_trial(trial)
    assert dtypes == [torch.float32, torch.bfloat16]


def test_the_worse_of_two_rates_ends_at_a_rung_and_can_go_on_later(
    tiny_plan: SweepPlan, trials: tuple[Trial, ...], measured: None, tmp_path: Path
) -> None:
    low, high = (
        with_rate(trials[1], rate, tmp_path / name)
        for name, rate in (("low", 1e-5), ("high", 1e-2))
    )
    plan = tiny_plan.model_copy(update={"kind": "iterations", "trials": (low, high)})
    asha = asha_trials(plan, resolve_settings({}, ["sweep.asha=true"]).sweep)

    def state(trial: Trial) -> str:
        """Run a trial as under Tune, with a scheduler that has just been started."""
        stopped: list[str] = []

        def stop(key: str, step: int, loss: float) -> None:
            record_early_stop(asha, key, step, loss)
            stopped.append(key)

        def train(job: TrainingJob, *, report: Any) -> TrainingOutcome:
            with stop_when(lambda: bool(stopped)):
                return run_job(job, report=report)

        scheduler = AshaByModel(asha, stop)
        tune_trial = SimpleNamespace(config={"trial": {"key": trial.key}}, status="RUNNING")
        scheduler.on_trial_add(None, tune_trial)

        def report(step: int, numbers: Mapping[str, float]) -> None:
            if VALIDATION_METRIC in numbers:
                result = {"step": step, "validation_loss": numbers[VALIDATION_METRIC]}
                scheduler.on_trial_result(None, tune_trial, result)

        return run_trial(trial, asha=asha[trial.key], report=report, train=train).state

    assert state(high) == "made", "the first continues"
    assert state(low) == "stopped early"
    stop = stored_early_stop(low, asha[low.key])
    assert stop is not None
    assert (stop.step, stop.competitor) == (10, high.label)
    assert low.result() is None, "what was not trained to its end is not finished"
    records = read_journal(Path(low.folder))[0]
    assert records[-1]["name"] == "stopped early"
    assert max(r["step"] for r in records if r["kind"] == "metrics") == 10, "no step more"
    assert state(low) == "stopped early"
    assert read_journal(Path(low.folder))[0] == records, "nothing was trained again"
    assert run_trial(low).state == "made"
    assert starts(low) == 1, "it resumed from where it was stopped"
    assert stored_early_stop(low, asha[low.key]) is None


def with_rate(trial: Trial, rate: float, folder: Path) -> Trial:
    seen = with_job(with_looks(trial), {"learning_rate": rate})
    return in_folder(seen, folder, key=folder.name, label=folder.name)


def with_looks(trial: Trial) -> Trial:
    """Return a trial that is validated every five steps."""
    return with_job(trial, {"validate_every_steps": 5, "learning_rate": 1e-6})


def test_what_travels_to_a_trial_is_small(trials: tuple[Trial, ...]) -> None:
    from orchestrator.sweeping.trial_queue import TrialQueue, run_tune_trial

    rounds = TrialQueue(Path(), resolve_settings({}).sweep, Progress(), num_all=len(trials))
    given = [rounds._parameters(trial) for trial in trials]
    sent = len(pickle.dumps(run_tune_trial)) + len(json.dumps(given))
    tokens = Path(given[0]["trial"]["suite"]["tokens_folder"])
    assert sent < 4096 * len(trials), "paths and settings; no weights, no tokens, no answers"
    assert sum(path.stat().st_size for path in tokens.rglob("*")) > sent


def test_trials_of_one_process_load_their_tasks_once(
    trials: tuple[Trial, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 3)
    (folder / "questions.yaml").write_text(
        "task: questions\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'questions.jsonl'}}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: {until: ['.'], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]\n"
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    loads: list[Any] = []
    load = loading._load
    monkeypatch.setattr(loading, "_load", lambda *a: loads.append(a) or load(*a))
    changes = {"tasks": ("questions",), "include_folder": str(folder), "suite": ""}
    for trial in trials[:2]:
        run = run_trial(trial.model_copy(update={"suite": trial.suite.model_copy(update=changes)}))
        assert run.result is not None
        assert {"quality/accuracy", "quality/questions/exact_match"} < set(run.result.numbers)
    assert len(loads) == 1
