"""A sweep runs what is not finished, in an order that waits for weights and other processes, and
says what became of each trial."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from changed_trials import in_folder, stop_early, with_job
from commands import wait_until
from fake_runs import end_trials, finished
from fake_tracking import FakeTracking
from kept_progress import KeptProgress
from pass_clock import clock_of_passes

from iiet.cost import inference_cost
from orchestrator.cluster import tune
from orchestrator.pipelines.reports import report
from orchestrator.records import status
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.reporting.results import StoredSweep
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.run import run_trials
from orchestrator.sweeping.states import RunningSweep, trial_states
from orchestrator.sweeping.trials import make_search, trials_of_search, trials_of_students
from orchestrator.sweeping.view import STOPPED_TAG, SweepView
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import stop_requested
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.journal import Journal, read_journal
from orchestrator.workspace.layout import PLAN_FILE, open_workspace


class Sweep:
    """Runs plans in a workspace, with a stand-in for MLflow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tracking = FakeTracking()

    def run(
        self, plan: SweepTrials, *assignments: str, progress: Progress | None = None
    ) -> RunningSweep:
        return run_trials(
            plan, resolve_settings({}, assignments), open_workspace(self.folder),
            progress=progress, tracking=self.tracking,
        )  # fmt: skip

    @property
    def shown(self) -> TrackedRun:
        """The sweep's own run."""
        [run] = [run for run in self.tracking.runs.values() if run.kind == "sweep"]
        return run

    @property
    def metrics(self) -> dict[str, float]:
        return {name: value for name, value, _ in self.shown.points}

    @property
    def ended(self) -> dict[str, str]:
        """Key of a trial -> how its run ended."""
        trials = [run for run in self.tracking.runs.values() if run.parent]
        assert all(run.parent == self.shown.key for run in trials)
        return {run.key: run.status for run in trials}


@pytest.fixture
def sweep(tmp_path) -> Sweep:
    return Sweep(tmp_path)


@pytest.mark.slow
def test_what_was_stopped_is_told_and_trained_on_without_stopping(
    tiny_plan, sweep, tmp_path, monkeypatch
):
    teacher, stopped, better, *others = tiny_plan.trials
    rated = with_job(stopped, {"learning_rate": 1.0})
    better = better.model_copy(update={"job": rated.job})
    trials = (teacher, stopped, better, *others)
    plan = tiny_plan.model_copy(update={"kind": "iterations", "trials": trials})
    for trial in trials:
        if trial is not stopped:
            finished(trial)
    stop = stop_early(stopped, better, resolve_settings({}, ["sweep.asha=true"]).sweep, 15)
    started_keys: list[str] = []

    def end(trial: Trial) -> str:
        started_keys.append(trial.key)
        return "no luck"

    end_trials(monkeypatch, end)
    outcome = sweep.run(plan, "sweep.asha=true")
    assert started_keys == []
    assert outcome.stopped == {stopped.label: stop}
    assert outcome.failures == {}
    assert [result.key for result in outcome.results] == [t.key for t in trials if t != stopped]
    assert outcome.reused == {result.key for result in outcome.results}
    assert better.label in sweep.shown.tags[STOPPED_TAG]
    assert sweep.metrics == {"sweep/trainings_saved": pytest.approx(0.25)}
    ended = sweep.ended
    assert ended.pop(stopped.key) == "KILLED"
    assert set(ended.values()) == {"FINISHED"}

    outcome = sweep.run(plan)
    assert (outcome.stopped, outcome.failures) == ({}, {stopped.label: "no luck"})
    assert status.has_failed(open_workspace(tmp_path).sweeps / plan.name)
    assert started_keys == [stopped.key]
    assert sweep.ended[stopped.key] == "FAILED"


@pytest.mark.slow
def test_times_are_measured_once_more_where_that_is_asked_for(tiny_plan, sweep, monkeypatch):
    end_trials(monkeypatch, finished)
    with clock_of_passes(lambda *_: 0.5):
        outcome = sweep.run(tiny_plan)
    workspace = open_workspace(sweep.folder)
    StoredSweep(name=tiny_plan.name, key=tiny_plan.key, results=outcome.results).store(workspace)

    def milliseconds(seconds_per_pass: float, **options: Any) -> set[float]:
        with clock_of_passes(lambda *_: seconds_per_pass):
            rows = report(workspace=workspace, sweeps=[tiny_plan.name], **options).rows()
        return {row["cost/decode_ms_per_token"] for row in rows}

    assert milliseconds(0.25, time_again=True) == {250.0}
    assert milliseconds(2.0) == {250.0}
    assert milliseconds(2.0, time_again=True) == {2000.0}
    assert milliseconds(0.5) == {2000.0}, "it is stored"
    second_outcome = sweep.run(tiny_plan)
    assert {t.numbers["cost/decode_ms_per_token"] for t in second_outcome.results} == {2000.0}
    shutil.copytree(workspace.sweeps / tiny_plan.name, workspace.sweeps / "copy")
    (workspace.sweeps / "copy" / PLAN_FILE).unlink()
    for names, reason in (
        ([tiny_plan.name, "copy"], "measures one sweep; got 2"),
        (["copy"], r"copy has lost its plan\.json"),
    ):
        with pytest.raises(UserError, match=f"--time-again:? {reason}"):
            report(workspace=workspace, sweeps=names, time_again=True)


@pytest.fixture
def _fails_if_stopped(monkeypatch) -> None:
    """Make a trial of Tune's that is stopped fail, too: a disk that is full just then cannot be had
    in a process of Ray."""
    run_queue = tune.run_queue

    def run(function: Any, *arguments: Any, **options: Any) -> None:
        def without_room(trial: Trial, process: tune.TuneProcess) -> Trial:
            assert function(trial, process) is None, "it is stopped"
            raise OSError("no room")

        run_queue(without_room, *arguments, **options)

    monkeypatch.setattr(tune, "run_queue", run)


@pytest.mark.slow
@pytest.mark.usefixtures("_fails_if_stopped")
def test_an_interrupted_sweep_says_what_is_saved_and_which_trial_failed_meanwhile(
    tiny_plan, sweep, ray_session
):
    teacher, begun, *_ = tiny_plan.trials
    long = {"num_steps": 10**6, "checkpoint_every_steps": 10**6}
    folder = sweep.folder / "trials" / "begun"
    begun = in_folder(with_job(begun, long), folder, key="begun")
    finished(teacher)
    plan = tiny_plan.model_copy(update={"trials": (teacher, begun)})

    class Pressing(KeptProgress):
        has_pressed = False

        def advance(self, done: float, text: str = "", **more: Any) -> None:
            super().advance(done, text, **more)
            has_begun = any(r["kind"] == "metrics" for r in read_journal(folder)[0])
            if has_begun and not self.has_pressed:
                self.has_pressed = True
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunFailed) as caught:
        sweep.run(plan, progress=Pressing())
    text = str(caught.value)
    assert text.startswith(f"trial {begun.label} failed: OSError: no")
    assert f"1 of 2 trials are finished; trial {begun.label}: saved at step " in text
    assert sweep.ended == {teacher.key: "FINISHED", "begun": "FAILED"}
    assert sweep.shown.status == "FAILED"


def test_the_plan_of_an_interrupted_search_has_all_trials_that_it_suggested(
    students, space, teacher, table, monkeypatch
):
    assignments = ["sweep.kind=search", "search.num_trials=3", "sweep.num_schedules=2"]
    assignments.append("distillation.training.num_tokens_per_step=64")
    of_teacher = replace(students(*assignments), influence=table)
    settings = resolve_settings({}, assignments)
    plan = trials_of_search(trials_of_students(of_teacher), settings.search)
    suggested: list[str] = []

    def end(trial: Trial) -> Trial:
        if trial not in plan.trials:
            suggested.append(trial.key)
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(stop_requested)  # The main thread hears it.
        return finished(trial)

    end_trials(monkeypatch, end)
    with pytest.raises(Interrupted):
        run_trials(
            plan, settings, space, tracking=FakeTracking(),
            search=make_search(settings, space, plan, teacher),
        )  # fmt: skip
    stored_plan = SweepTrials.read(space.sweeps / plan.name / PLAN_FILE)
    assert stored_plan
    assert len(suggested) == 1
    assert [trial.key for trial in stored_plan.trials[len(plan.trials) :]] == suggested


def test_the_progress_names_what_is_trained_and_what_is_measured(tiny_plan, sweep):
    progress = KeptProgress()
    run = RunningSweep(tiny_plan, trial_states(tiny_plan, resolve_settings({}).sweep))
    teacher, student, *_ = tiny_plan.trials
    workspace = open_workspace(sweep.folder)
    with SweepView(run, resolve_settings({}), workspace, sweep.tracking, progress) as view:
        run.on_start(teacher.key)
        run.on_start(student.key)
        view.update()
        job = student.job
        assert job is not None
        journal = Journal(job.folder)
        journal.metrics(job.recipe.num_steps, {"train/loss": 1.0})
        journal.close()
        view.update()
    assert progress.texts[0].endswith(f"; measuring {teacher.label}")
    assert {*progress.texts[-1].split("; ")} > {
        f"measuring {teacher.label}",
        f"measuring {student.label}",
    }


def test_a_stop_waits_for_trials_that_train_and_not_for_those_that_are_measured(tiny_plan):
    run = RunningSweep(tiny_plan, trial_states(tiny_plan, resolve_settings({}).sweep))
    teacher, student, *_ = tiny_plan.trials
    assert teacher.job is None, "it is measured as it is"
    run.on_start(teacher.key)
    assert not run.begin_saving()
    assert run.notes == []
    run.on_start(student.key)
    assert run.begin_saving()
    assert len(run.notes) == 1


def test_what_a_tune_that_ended_had_taken_is_taken_again_first(tiny_plan):
    queue = RunningSweep(tiny_plan, trial_states(tiny_plan, resolve_settings({}).sweep))
    taken_trials = [queue.take(), queue.take()]
    queue.start_again("memory ran low")
    assert queue.notes == ["memory ran low"]
    assert queue.num_taken == 0
    assert [queue.take(), queue.take()] == taken_trials
    assert queue.failures == {}


def test_the_teacher_starts_first_and_then_the_costliest(tiny_plan):
    queue = RunningSweep(tiny_plan, trial_states(tiny_plan, resolve_settings({}).sweep))
    first_trial, *later_trials = [trial for _ in tiny_plan.trials if (trial := queue.take())]
    assert first_trial.role == "teacher"
    evaluations = [inference_cost(trial.model).evaluations_per_token for trial in later_trials]
    assert evaluations == sorted(evaluations, reverse=True)
    assert len(set(evaluations)) > 1


def test_a_sweep_counts_its_trials_and_says_what_those_that_run_save(tiny_plan):
    queue = RunningSweep(tiny_plan, trial_states(tiny_plan, resolve_settings({}).sweep))
    assert queue.num_all == len(tiny_plan.trials)
    assert not queue.begin_saving(), "none runs"
    assert queue.notes == []
    while running := queue.take():
        queue.on_start(running.key)
    assert queue.begin_saving()
    [note] = queue.notes
    assert note.startswith("saving ")
    student = next(trial for trial in tiny_plan.trials if trial.job)
    journal = Journal(student.job.folder)
    journal.metrics(1, {"train/loss": 1.0})
    journal.close()
    text = queue.saved()
    assert text.startswith(f"0 of {len(tiny_plan.trials)} trials are finished; ")
    assert text.endswith(f"; trial {student.label}: nothing was saved"), "others have not begun"
