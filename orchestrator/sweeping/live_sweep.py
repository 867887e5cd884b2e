"""The MLflow runs of a sweep and its trials, while it runs.

A trial's run appears when the trial starts, gets the records of its journal while it trains, and
the reason if it ends without a result. The sweep's run gets the front so far. The process that
waits for the trials says what changes; MLflow's background thread shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.data.sources import describe_data
from orchestrator.records.tracked_run import Status, TrackedRun
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.front_so_far import front_so_far
from orchestrator.reporting.mlflow_report import SWEEP_TAG, trial_run
from orchestrator.reporting.pareto import Front
from orchestrator.settings import SETTINGS_NAME, Settings, to_yaml
from orchestrator.sweeping.sweep_parameters import sweep_parameters
from orchestrator.sweeping.trial_run import is_trial_locked
from orchestrator.sweeping.trials import exact_cost, full_config
from orchestrator.tracking import Tracking
from orchestrator.workspace.journal import now_ms, recorded_times

SECONDS_BETWEEN_FRONTS = 30.0
"""A picture takes up to a second of the process that waits for the trials."""


class LiveSweep:
    """The runs of a sweep and of its trials from their start to their end, and the front so far."""

    def __init__(
        self,
        plan: SweepPlan,
        settings: Settings,
        tracking: Tracking,
        history: Path,
        *,
        num_trials: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show the sweep as running from now on; what its run showed before stays.

        Args:
            history: Folder of the sweep's journal; the picture is stored there, too.
            num_trials: Trials of the sweep, those included that a search will suggest.
        """
        self._name, self._full, self._num_trials = plan.name, full_config(plan), num_trials
        self._tracking, self._folder = tracking, history
        self._open: dict[str, Trial] = {}
        self._failures: dict[str, str] = {}
        self._front: Front | None = None
        self._num_measured = 0
        self._clock, self._next_front = clock, clock()
        folder = history.parent.parent
        started_ms, _ = recorded_times(folder) or (now_ms(), 0)
        self._run = tracking.stored("sweep", plan.key) or TrackedRun(
            key=plan.key,
            kind="sweep",
            name=plan.name,
            folder=str(folder),
            journal=str(history),
            started_ms=started_ms,
        )
        params = {name: str(value) for name, value in sweep_parameters(plan, settings).items()}
        self.change(
            status="RUNNING",
            params=params,
            tags={SWEEP_TAG: plan.name},
            dataset=describe_data(plan.tokens_folder),
            texts={SETTINGS_NAME: to_yaml(settings)},
        )

    def change(self, **changes: Any) -> None:
        """Show changes of the sweep's own run, as `TrackedRun.changed` takes them."""
        self._run = self._run.changed(**changes)
        self._tracking.publish(self._run)

    def finish(self, status: Status) -> None:
        """End the sweep's run; after a failure, wait only a moment for the store."""
        self.change(status=status, ended_ms=now_ms())
        self._tracking.wait(briefly=status != "FINISHED")

    def watch(self, running: Iterable[Trial]) -> None:
        """Show the trials that have started; call it a few times a second with those that run."""
        new = [trial for trial in running if trial.key not in self._open]
        self._open |= {trial.key: trial for trial in new}
        self._show(new, "RUNNING")
        if self._front and self._clock() >= self._next_front:
            notes = [f"{self._num_measured} of {self._num_trials} models are measured so far."]
            notes += [f"{label} failed: {reason}" for label, reason in self._failures.items()]
            self.change(
                **front_so_far(self._front, name=self._name, notes=notes, folder=self._folder)
            )
            self._front, self._next_front = None, self._clock() + SECONDS_BETWEEN_FRONTS

    def log_results(self, results: Sequence[Trial]) -> None:
        """End the runs of measured trials; those that have no run yet get one."""
        for result in results:
            self._open.pop(result.key, None)
        self._show(results, "FINISHED")

    def log_end(self, trial: Trial, status: Status, reason: str = "") -> None:
        """End the run of a trial without a result, as FAILED or KILLED."""
        self._open.pop(trial.key, None)
        if status == "FAILED":
            self._failures[trial.label] = reason
        self._show([trial], status, reason)

    def show_front(self, front: Front, num_measured: int) -> None:
        """Show this front soon; the pictures of fronts that follow each other at once are one."""
        self._front, self._num_measured = front, num_measured

    def close(self) -> None:
        """End the runs of the trials that were running, but not of those that others run."""
        for trial in list(self._open.values()):
            if not is_trial_locked(trial):
                self.log_end(trial, "KILLED")

    def _show(self, trials: Sequence[Trial], status: Status, reason: str = "") -> None:
        runs = []
        for trial in trials:
            if "cost/evaluations" not in trial.numbers:
                trial = trial.with_numbers("cost", exact_cost(trial.model, self._full))
            journal = journal_folder(trial)
            run = trial_run(self._name, self._run.key, trial, journal, status=status, reason=reason)
            runs.append(run)
        self._tracking.publish(*runs)


def journal_folder(trial: Trial) -> Path | None:
    """Return the folder with the journal of a trial's training.

    For a teacher or a baseline that was trained before, this is the training of its checkpoint.
    """
    if trial.job:
        return Path(trial.folder)
    return Path(trial.checkpoint).parent if trial.checkpoint and trial.role != "trial" else None
