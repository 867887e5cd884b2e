"""Show a running sweep: a progress line, and MLflow runs with the front.

The main thread calls `SweepView.update` a few times a second. The view compares the states of the
trials with those that it showed last, so code that changes a state does not know the view. MLflow's
background thread does the publishing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from orchestrator.data.mixture import describe_data
from orchestrator.records.tracked_run import (
    PRETRAIN_OF_SWEEP,
    SWEEP_TAG,
    RunStatus,
    TrackedRun,
    status_after,
)
from orchestrator.records.trial import Trial
from orchestrator.reporting.costs import exact_cost, full_trial
from orchestrator.reporting.front import find_front, parse_axes, reason_against_accuracy
from orchestrator.reporting.mlflow_report import (
    front_so_far,
    mlflow_run_of_sweep,
    mlflow_run_of_trial,
)
from orchestrator.reporting.results import model_results
from orchestrator.settings import SETTINGS_NAME, Settings, to_yaml
from orchestrator.sweeping.plan_text import sweep_parameters
from orchestrator.sweeping.states import RunningSweep, TrialState, TrialStatus
from orchestrator.terminal.progress import Progress
from orchestrator.tracking.tracker import Tracking
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json
from orchestrator.workspace.journal import JournalReader, now_ms
from orchestrator.workspace.layout import JOB_NAME, Workspace

STOPPED_TAG = "iiet.stopped_early"
TRAINING_SHARE = 0.9
"""Share of a trial's progress that is its training; the rest is its measurement."""
MAX_NAMED = 3
"""Most running trials that the progress bar names."""
JOURNALS_AT_ONCE = 4
"""Most journals that one update reads: network file systems answer few requests a second."""
SECONDS_BETWEEN_FRONTS = 30.0
"""Pause between fronts, because drawing one takes up to a second."""

SHOWN_AS: Mapping[TrialStatus, RunStatus] = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "stopped early": "KILLED",
    "interrupted": "KILLED",
}
"""Status of a trial -> that of its run in MLflow. A waiting trial has no run, or keeps the one of
its last attempt."""


class SweepView:
    """Shows a running sweep; as a context manager, it also ends the sweep's run in MLflow."""

    def __init__(
        self,
        sweep: RunningSweep,
        settings: Settings,
        workspace: Workspace,
        tracking: Tracking,
        progress: Progress,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show the sweep as running; what its MLflow run showed before stays."""
        self._sweep = sweep
        self._workspace = workspace
        self._folder = workspace.sweeps / sweep.plan.name
        self._tracking = tracking
        self._progress = progress
        self._clock = clock
        self._full = full_trial(sweep.plan)
        self._shown: dict[str, RunStatus] = {}
        """Key of a trial -> status of its run in MLflow."""
        self._num_notes = 0
        """Number of the sweep's notes that were shown."""
        self._journals: dict[str, JournalReader] = {}
        self._num_updates = 0
        self._has_new_results = False
        self._next_front = clock()
        self._ended_before = {s.trial.key for s in sweep.with_status("finished", "stopped early")}
        """Keys of trials that ended in an earlier call; they are shown without a note."""

        stored = tracking.stored("sweep", sweep.plan.key)
        self._mlflow_run = mlflow_run_of_sweep(
            stored, sweep.plan.name, sweep.plan.key, self._folder
        )
        self._change(
            status="RUNNING",
            params=sweep_parameters(sweep.plan, settings),
            tags={SWEEP_TAG: sweep.plan.name},
            dataset=describe_data(sweep.plan.tokens_folder),
            texts={SETTINGS_NAME: to_yaml(settings)},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """End the sweep's MLflow run; after a failure, wait only briefly for the store."""
        stops = self._sweep.stopped
        if stops and error is None:
            saved = sum(stop.share_saved for stop in stops.values())
            text = "; ".join(f"{label} {stop.text}" for label, stop in stops.items())
            points = [("sweep/trainings_saved", saved, len(self._sweep.plan.trials))]
            self._change(points=points, tags={STOPPED_TAG: text})
        self._change(status=status_after(error), ended_ms=now_ms())
        self._tracking.wait(briefly=error is not None)

    def update(self) -> None:
        """Show changes; call it a few times a second."""
        changed_runs = []
        for state in list(self._sweep.states.values()):
            trial = state.trial
            trial_status = state.status  # Tune's thread may change it at any time.
            status = SHOWN_AS.get(trial_status)
            if status is None or self._shown.get(trial.key) == status:
                continue
            self._shown[trial.key] = status
            changed_runs.append(self._mlflow_run_of(state, status))
            if status == "FINISHED":
                self._has_new_results = True
                self._withdraw_pretraining(trial)
            elif trial_status == "failed":
                self._progress.note(f"trial {trial.label} failed: {state.error}")
            elif trial_status == "stopped early" and trial.key not in self._ended_before:
                assert state.early_stop, "it says why"
                self._progress.note(f"trial {trial.label} {state.early_stop.text}")
        if changed_runs:
            self._tracking.publish(*changed_runs)
        notes = self._sweep.notes[self._num_notes :]
        for note in notes:
            self._progress.note(note)
        self._num_notes += len(notes)
        self._show_progress()
        if self._has_new_results and self._clock() >= self._next_front:
            self._show_front()

    def end_trials(self) -> None:
        """Show the last changes, and end the MLflow runs of trials that were still running."""
        self.update()
        states = self._sweep.states.values()
        cut_off = [state for state in states if self._shown.get(state.trial.key) == "RUNNING"]
        self._tracking.publish(*(self._mlflow_run_of(state, "KILLED") for state in cut_off))

    def _change(self, **changes: Any) -> None:
        """Show changes of the sweep's own run, as `TrackedRun.changed` takes them."""
        self._mlflow_run = self._mlflow_run.changed(**changes)
        self._tracking.publish(self._mlflow_run)

    def _mlflow_run_of(self, state: TrialState, status: RunStatus) -> TrackedRun:
        """Return what MLflow shows of a trial."""
        trial = self._with_cost(state.result or state.trial)
        reason = ""
        if status == "FAILED":
            reason = state.error
        elif status == "KILLED" and state.early_stop:
            reason = state.early_stop.text
        journal = _journal_folder(trial)
        sweep_key = self._mlflow_run.key
        name = self._sweep.plan.name
        return mlflow_run_of_trial(name, sweep_key, trial, journal, status=status, reason=reason)

    def _withdraw_pretraining(self, trial: Trial) -> None:
        """Remove the run that showed a model while it was trained for this sweep."""
        folder = _journal_folder(trial)
        if folder and not trial.job:
            with suppress(UserError):  # The file may be damaged.
                stored_job = read_json(folder / JOB_NAME) or {}
                self._tracking.withdraw(PRETRAIN_OF_SWEEP, str(stored_job.get("key")))

    def _show_progress(self) -> None:
        """Advance the bar by ended trials, and by the steps of running ones."""
        # Counted first, so that a trial that ends meanwhile does not count twice.
        num_ended = self._sweep.num_ended
        jobs = {
            state.trial.label: state.trial.job
            for state in self._sweep.with_status("running")
            if state.trial.job
        }
        readers = [
            self._journals.setdefault(job.run_folder, JournalReader(job.folder))
            for job in jobs.values()
        ]
        # In turn: each update continues after the trials of the last one.
        first = self._num_updates * JOURNALS_AT_ONCE
        for number in range(first, first + min(JOURNALS_AT_ONCE, len(readers))):
            readers[number % len(readers)].read()
        self._num_updates += 1
        num_done: float = num_ended
        activities = []
        for (label, job), reader in zip(jobs.items(), readers, strict=True):
            num_done += TRAINING_SHARE * reader.step / job.recipe.num_steps
            if reader.step >= job.recipe.num_steps:
                activities.append(f"measuring {label}")
            elif reader.step:
                activities.append(label)
        for state in self._sweep.with_status("running"):
            if not state.trial.job:
                activities.append(f"measuring {state.trial.label}")
        num_trials = f"{num_ended} of {self._sweep.num_all} trials"
        self._progress.advance(num_done, "; ".join([num_trials, *activities[:MAX_NAMED]]))

    def _show_front(self) -> None:
        """Show the front of the finished trials, once the teacher is measured."""
        self._has_new_results = False
        measured = [self._with_cost(result) for result in self._sweep.results_by_key.values()]
        reason = reason_against_accuracy(self._workspace, measured)
        front = find_front(model_results(measured), parse_axes(against_accuracy=reason))
        is_full_measured = self._full.key in self._sweep.results_by_key
        if not is_full_measured or not front.members:
            return
        notes = [f"{len(measured)} of {self._sweep.num_all} models are measured so far."]
        notes += [f"{label} failed: {why}" for label, why in self._sweep.failures.items()]
        notes += [reason] if reason else []
        # This picture in the sweep's folder is later replaced by the report's.
        name = self._sweep.plan.name
        self._change(**front_so_far(front, name=name, notes=notes, folder=self._folder))
        self._next_front = self._clock() + SECONDS_BETWEEN_FRONTS

    def _with_cost(self, trial: Trial) -> Trial:
        """Return a trial with its exact cost."""
        return trial.with_numbers("cost", exact_cost(trial.model, self._full.model))


def _journal_folder(trial: Trial) -> Path | None:
    """Return the folder with the journal of a trial's own training; None if it has none."""
    if trial.job:
        return Path(trial.folder)
    # Teachers and baselines were trained before; a pruned student is not trained.
    if trial.checkpoint and trial.role != "trial":
        return Path(trial.checkpoint).parent
    return None
