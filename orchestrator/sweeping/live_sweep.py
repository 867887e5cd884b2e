"""The MLflow runs of a sweep and its trials, while it runs.

A trial's run appears when the trial starts, gets the records of its journal while it trains, and
the reason if it ends without a result. The sweep's run gets the front so far. All of it is done by
the process that waits for the trials, in MLflow's background thread except for the picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from orchestrator.data.sources import describe_data
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.front_so_far import track_front_so_far
from orchestrator.reporting.mlflow_report import SWEEP_TAG, trial_run
from orchestrator.reporting.pareto import Front
from orchestrator.settings import SETTINGS_NAME, Settings, to_yaml
from orchestrator.sweeping.sweep_parameters import sweep_parameters
from orchestrator.sweeping.trial_run import is_trial_locked
from orchestrator.sweeping.trials import exact_cost, full_config
from orchestrator.tracking import JournalCopies, TrackedRun, Tracking

SECONDS_BETWEEN_FRONTS = 30.0
"""A picture takes up to a second of the process that waits for the trials."""


class LiveSweep:
    """The runs of a sweep's trials from their start to their end, and the front so far."""

    def __init__(
        self,
        plan: SweepPlan,
        run: TrackedRun,
        tracking: Tracking,
        folder: Path,
        *,
        num_trials: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show a sweep in its `run`.

        Args:
            folder: Where the picture is stored.
            num_trials: Trials of the sweep, those included that a search will suggest.
        """
        self._name, self._full, self._num_trials = plan.name, full_config(plan), num_trials
        self._run, self._tracking, self._folder = run, tracking, folder
        self._copies = JournalCopies(clock)
        self._open: dict[str, Trial] = {}
        self._failures: dict[str, str] = {}
        self._front: Front | None = None
        self._num_measured = 0
        self._clock, self._next_front = clock, clock()

    def watch(self, running: Iterable[Trial]) -> None:
        """Log what is new; call it a few times a second with the running trials."""
        new = [trial for trial in running if trial.key not in self._open]
        if new:
            runs = self._log(new, "RUNNING")
            for trial, run in zip(new, runs, strict=True):
                self._open[trial.key] = trial
                if folder := journal_folder(trial):
                    self._copies.follow(trial.key, run, folder)
        self._copies.poll()
        if self._front and self._clock() >= self._next_front:
            self._log_front(self._front)

    def log_results(self, results: Sequence[Trial]) -> None:
        """End the runs of measured trials; those that have no run yet get one."""
        for result in results:
            self._ended(result)
        self._log(results, "FINISHED")

    def log_end(self, trial: Trial, status: str, reason: str = "") -> None:
        """End the run of a trial without a result, as FAILED or KILLED."""
        self._ended(trial)
        if status == "FAILED":
            self._failures[trial.label] = reason
        self._log([trial], status, reason)

    def show_front(self, front: Front, num_measured: int) -> None:
        """Show this front soon; the pictures of fronts that follow each other at once are one."""
        self._front, self._num_measured = front, num_measured

    def close(self) -> None:
        """End the runs of the trials that were running, but not of those that others run."""
        for trial in list(self._open.values()):
            if not is_trial_locked(trial):
                self.log_end(trial, "KILLED")

    def _ended(self, trial: Trial) -> None:
        self._copies.end(trial.key)
        self._open.pop(trial.key, None)

    def _log(self, trials: Sequence[Trial], status: str, reason: str = "") -> list[TrackedRun]:
        runs = [
            trial_run(
                self._name, self._costed(trial), journal_folder(trial), status=status, reason=reason
            )
            for trial in trials
        ]
        return self._tracking.log_nested(runs, parent=self._run)

    def _costed(self, trial: Trial) -> Trial:
        if "cost/evaluations" in trial.numbers:
            return trial
        return trial.with_numbers("cost", exact_cost(trial.model, self._full))

    def _log_front(self, front: Front) -> None:
        notes = [f"{self._num_measured} of {self._num_trials} models are measured so far."]
        notes += [f"{label} failed: {reason}" for label, reason in self._failures.items()]
        track_front_so_far(
            self._tracking, self._run, front, name=self._name, notes=notes, folder=self._folder
        )
        self._front, self._next_front = None, self._clock() + SECONDS_BETWEEN_FRONTS


def open_sweep_run(
    plan: SweepPlan, settings: Settings, tracking: Tracking, *, started_ms: int | None = None
) -> TrackedRun:
    """Find or create the run of a sweep; a new one starts now, or at a time in ms."""
    run = tracking.run(
        plan.key,
        name=plan.name,
        kind="sweep",
        params=sweep_parameters(plan, settings),
        tags={SWEEP_TAG: plan.name},
        started_ms=started_ms,
    )
    run.log_dataset(*describe_data(plan.tokens_folder))
    run.log_text(to_yaml(settings), SETTINGS_NAME)
    return run


def journal_folder(trial: Trial) -> Path | None:
    """Return the folder with the journal of a trial's training.

    For a teacher or a baseline that was trained before, this is the training of its checkpoint.
    """
    if trial.job:
        return Path(trial.folder)
    return Path(trial.checkpoint).parent if trial.checkpoint and trial.role != "trial" else None
