"""A sweep can be watched in MLflow: trials appear when they start, and the front grows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from changed_trials import stop_early
from commands import wait_until
from fake_runs import finished
from fake_tracking import FakeTracking
from kept_progress import KeptProgress
from mlflow.entities import Run

from orchestrator.records.tracked_run import (
    NOTE_TAG,
    PRETRAIN_OF_SWEEP,
    REASON_TAG,
    VIEW_TAG,
    TrackedRun,
)
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.reporting.mlflow_report import ARTIFACT_FOLDER
from orchestrator.settings import resolve_settings
from orchestrator.sweeping import view as view_module
from orchestrator.sweeping.states import RunningSweep, TrialState, TrialStatus, trial_states
from orchestrator.sweeping.view import SECONDS_BETWEEN_FRONTS, TRAINING_SHARE, SweepView
from orchestrator.terminal.progress import Progress
from orchestrator.tracking.tracker import open_tracking
from orchestrator.workspace.files import read_json, write_json
from orchestrator.workspace.journal import Journal, recorded_times
from orchestrator.workspace.layout import JOB_NAME, open_workspace

# Runs in MLflow


class Watched:
    """A sweep of which nothing is finished, and a clock that only tests set."""

    def __init__(self, plan: SweepTrials, folder: Path) -> None:
        workspace = open_workspace(folder)
        settings = resolve_settings({})
        self.tracking = open_tracking(workspace, warn=pytest.fail)
        self.plan = plan
        self.now = 0.0
        self.run = RunningSweep(plan, trial_states(plan, settings.sweep))
        self.view = SweepView(
            self.run, settings, workspace, self.tracking, Progress(), clock=lambda: self.now
        )

    def runs(self, filter_string: str) -> list[Run]:
        self.tracking.wait()
        client = self.tracking.store.connect()
        experiment = str(self.tracking.store.experiment_id)
        return list(client.search_runs([experiment], filter_string))

    @property
    def sweep(self) -> Run:
        [run] = self.runs("tags.`iiet.kind` = 'sweep'")
        return run

    def trials(self) -> list[Run]:
        return self.runs("tags.`iiet.kind` != 'sweep'")

    def trial(self, trial: Trial) -> Run:
        [run] = self.runs(f"tags.`iiet.key` = '{trial.key}'")
        return run

    def losses(self, trial: Trial) -> list[int]:
        run_id = self.trial(trial).info.run_id
        history = self.tracking.store.connect().get_metric_history(run_id, "train/loss")
        return [point.step for point in history]

    def start(self, *trials: Trial) -> None:
        for trial in trials:
            self.run.on_start(trial.key)
        self.view.update()

    def finish(self, trial: Trial, accuracy: float) -> None:
        self.run.on_end(trial.key, finished(trial, accuracy), "")
        self.view.update()


@pytest.fixture
def watched(tiny_plan, tmp_path) -> Watched:
    return Watched(tiny_plan, tmp_path)


class Shown:
    """A sweep of which nothing is finished, and what its progress display is told."""

    def __init__(self, plan: SweepTrials, folder: Path) -> None:
        settings = resolve_settings({})
        self.run = RunningSweep(plan, trial_states(plan, settings.sweep))
        self.progress = KeptProgress()
        self.tracking = FakeTracking()
        self.view = SweepView(
            self.run, settings, open_workspace(folder), self.tracking, self.progress
        )


def write_steps(trial: Trial, share: float) -> None:
    """Write into the journal of a training that a share of its steps is done."""
    journal = Journal(trial.job.folder)
    journal.metrics(round(share * trial.job.recipe.num_steps), {"train/loss": 1.0})
    journal.close()


def test_at_the_end_a_trial_that_still_runs_is_cut_off_and_others_stay_as_they_are(
    tiny_plan, tmp_path
):
    shown = Shown(tiny_plan, tmp_path)
    first, second, third = [trial for trial in tiny_plan.trials if trial.job][:3]
    shown.run.on_start(first.key)
    shown.run.on_start(second.key)
    shown.view.update()
    shown.run.on_end(first.key, finished(first, 0.5), "")
    shown.view.end_trials()
    statuses = {run.key: run.status for run in shown.tracking.published}  # The last ones.
    assert (statuses[first.key], statuses[second.key]) == ("FINISHED", "KILLED")
    assert third.key not in statuses, "it has not begun"


@pytest.mark.slow
def test_a_teachers_run_replaces_the_one_that_showed_its_training(tiny_plan, tmp_path):
    shown = Shown(tiny_plan, tmp_path)
    teacher = tiny_plan.trials[0]
    student = next(trial for trial in tiny_plan.trials if trial.job)
    job_files = [Path(teacher.checkpoint).parent / JOB_NAME, student.job.folder / JOB_NAME]
    for number, file in enumerate(job_files):
        write_json(file, {**(read_json(file) or {}), "key": f"training {number}"})
        run = TrackedRun(kind=PRETRAIN_OF_SWEEP, key=f"training {number}", name="a training")
        shown.tracking.publish(run)
    for trial in (teacher, student):
        shown.run.on_end(trial.key, finished(trial, 0.5), "")
    shown.view.update()
    assert shown.tracking.stored(PRETRAIN_OF_SWEEP, "training 0") is None
    assert shown.tracking.stored(PRETRAIN_OF_SWEEP, "training 1"), "of another one"


def test_an_update_looks_into_a_few_journals_and_comes_to_all(tiny_plan, tmp_path, monkeypatch):
    trainings = [trial for trial in tiny_plan.trials if trial.job]
    monkeypatch.setattr(view_module, "JOURNALS_AT_ONCE", len(trainings) - 1)
    shown = Shown(tiny_plan, tmp_path)
    for trial in trainings:
        shown.run.on_start(trial.key)
    shown.view.update()
    assert shown.progress.shown[-1][:2] == (0, "0 of 5 trials"), "no step is known"
    for trial in trainings:
        write_steps(trial, 0.5)
    num_seen = []
    for _ in range(3):
        shown.view.update()
        num_seen.append(round(shown.progress.done[-1] / (0.5 * TRAINING_SHARE), 6))
    assert num_seen == [len(trainings) - 1, len(trainings), len(trainings)]


class EndsMeanwhile(TrialState):
    """The state of a trial that another thread ends when it is read once more after `reads_left`
    times."""

    reads_left = math.inf

    @property
    def status(self) -> TrialStatus:
        self.reads_left -= 1
        if self.reads_left == -1:
            self._status = "finished"
        return self._status

    @status.setter
    def status(self, status: TrialStatus) -> None:
        self._status = status


def test_a_trial_that_ends_while_the_bar_counts_is_not_counted_twice(tiny_plan, tmp_path):
    student = next(trial for trial in tiny_plan.trials if trial.job)
    write_steps(student, 1.0)
    reads_left = 0
    state = None
    while state is None or state.reads_left < 0:  # At each moment of an update in turn.
        shown = Shown(tiny_plan, tmp_path)
        state = EndsMeanwhile(student, "running")
        shown.run.states[student.key] = state
        shown.view.update()
        assert shown.progress.shown[-1][:2] == (
            TRAINING_SHARE,
            f"0 of 5 trials; measuring {student.label}",
        )
        state.reads_left = reads_left
        shown.view.update()
        done, text, _ = shown.progress.shown[-1]
        assert done <= 1, reads_left
        assert not text.startswith("1 of 5 trials; "), "it would be named as one that runs"
        reads_left += 1
    assert reads_left > 3, "an update reads the status several times"


@pytest.mark.slow
def test_a_sweep_is_seen_while_it_runs(watched):
    teacher, first, second, third, *_ = watched.plan.trials
    assert not watched.trials()

    # There is no front before the full model is measured.
    watched.finish(third, 0.4)
    assert NOTE_TAG not in watched.sweep.data.tags

    # The teacher is only measured; its run has the times and the curve of the teacher's training.
    watched.start(teacher)
    assert watched.trial(teacher).info.status == "RUNNING"
    times = recorded_times(Path(str(teacher.checkpoint)).parent)
    watched.finish(teacher, 0.5)
    tracked = watched.trial(teacher)
    assert (tracked.info.start_time, tracked.info.end_time) == times
    assert tracked.info.status == "FINISHED"
    assert watched.losses(teacher)

    # A trial appears when it starts, with its parameters and its cost, and has a curve soon.
    journal = Journal(Path(first.folder))
    journal.event("started")
    watched.start(first)
    tracked = watched.trial(first)
    assert tracked.info.status == "RUNNING"
    assert tracked.data.params["schedule"] == first.schedule_text
    assert 0 < tracked.data.metrics["cost/relative_evaluations"] <= 1
    for step in (1, 2):
        journal.metrics(step, {"train/loss": 4.0 - step, "train/learning_rate": 1e-3})
    watched.view.update()
    wait_until(lambda: watched.losses(first) == [1, 2], lambda: watched.losses(first))
    assert watched.trial(first).data.metrics["train/learning_rate"] == 1e-3

    # The front so far is in the sweep's run, with its picture.
    noted = watched.sweep
    assert f"2 of {len(watched.plan.trials)} models" in noted.data.tags[NOTE_TAG]
    picture = f"get-artifact?path={ARTIFACT_FOLDER}/front.svg&run_uuid={noted.info.run_id}"
    assert picture in noted.data.tags[NOTE_TAG]
    assert VIEW_TAG in noted.data.tags
    files = watched.tracking.store.connect().list_artifacts(noted.info.run_id, ARTIFACT_FOLDER)
    assert [file.path for file in files] == [f"{ARTIFACT_FOLDER}/front.svg"]

    journal.metrics(3, {"train/loss": 1.0})
    journal.close()
    watched.finish(first, 0.49)
    tracked = watched.trial(first)
    times = recorded_times(Path(first.folder))
    assert watched.losses(first) == [1, 2, 3]
    assert (tracked.info.start_time, tracked.info.end_time) == times
    assert tracked.data.metrics["quality/accuracy"] == 0.49
    for num_shown in (2, 3):
        watched.start(second)
        note = watched.sweep.data.tags[NOTE_TAG]
        assert f"{num_shown} of {len(watched.plan.trials)} models" in note
        watched.now += SECONDS_BETWEEN_FRONTS


@pytest.mark.slow
def test_a_trial_without_a_result_says_why_until_it_is_tried_again(watched):
    teacher, first, second, third, *_ = watched.plan.trials
    watched.start(first, second, third)
    watched.run.on_end(first.key, None, "its loss is not finite")
    stop = stop_early(second, third, resolve_settings({}).sweep, 3)
    watched.run.on_early_stop(second.key, stop)
    watched.run.on_end(second.key, None, "")
    watched.view.end_trials()
    tracked = watched.trial(first)
    assert tracked.info.status == "FAILED"
    assert "loss" in tracked.data.tags[REASON_TAG]
    assert tracked.data.tags[REASON_TAG][1:] in tracked.data.tags[NOTE_TAG]
    tracked = watched.trial(second)
    assert (tracked.info.status, tracked.data.tags[NOTE_TAG][:13]) == ("KILLED", "Stopped early")
    assert watched.trial(third).info.status == "KILLED"
    assert REASON_TAG not in watched.trial(third).data.tags

    watched.finish(teacher, 0.5)
    watched.start(first)
    assert "loss" in watched.sweep.data.tags[NOTE_TAG]
    tracked = watched.trial(first)
    assert tracked.info.status == "RUNNING"
    assert not {REASON_TAG, NOTE_TAG} & tracked.data.tags.keys()
    assert len(watched.trials()) == 4, "no run is made twice"
