"""A sweep can be watched in MLflow: trials appear when they start, and the front grows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from changed_trials import stop_early
from commands import wait_until
from fake_runs import finished
from kept_progress import KeptProgress
from mlflow.entities import Run

from orchestrator.records.tracked_run import NOTE_TAG, REASON_TAG, VIEW_TAG
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.reporting.mlflow_report import ARTIFACT_FOLDER
from orchestrator.settings import resolve_settings
from orchestrator.sweeping import view as view_module
from orchestrator.sweeping.states import RunningSweep, trial_states
from orchestrator.sweeping.view import SECONDS_BETWEEN_FRONTS, SweepView
from orchestrator.terminal.progress import Progress
from orchestrator.tracking.tracker import Tracking, open_tracking
from orchestrator.workspace.journal import Journal, JournalReader, recorded_times
from orchestrator.workspace.layout import open_workspace

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
def watched(tiny_plan, tmp_path, monkeypatch) -> Watched:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Watched(tiny_plan, tmp_path)


def test_an_update_looks_into_a_few_journals_and_comes_to_all(tiny_plan, tmp_path, monkeypatch):
    looks = list[Path]()
    real_read = JournalReader.read

    def counted_read(reader: JournalReader) -> list[dict[str, Any]]:
        looks.append(reader.folder)
        return real_read(reader)

    monkeypatch.setattr(JournalReader, "read", counted_read)
    trainings = [trial for trial in tiny_plan.trials if trial.job]
    monkeypatch.setattr(view_module, "JOURNALS_AT_ONCE", len(trainings) - 1)
    settings = resolve_settings({})
    run = RunningSweep(tiny_plan, trial_states(tiny_plan, settings.sweep))
    nothing = SimpleNamespace(stored=lambda *_: None, publish=lambda *_: None)
    tracking = cast("Tracking", nothing)
    progress = KeptProgress()
    view = SweepView(run, settings, open_workspace(tmp_path), tracking, progress)
    for trial in trainings:
        run.on_start(trial.key)
    view.update()
    assert len(looks) == len(set(looks)) == len(trainings) - 1
    assert progress.texts == ["0 of 5 trials"], "no step is known"
    view.update()
    assert set(looks) == {Path(trial.folder) for trial in trainings}


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
