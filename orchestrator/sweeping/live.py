"""A sweep while it runs: its runs and those of its trials in MLflow, and the front so far.

A trial's run appears when the trial starts, gets the records of its journal while it trains, and
the reason if it ends without a result. The sweep's run gets the front so far. The process that
waits for the trials says what changes; MLflow's background thread shows it.

A journal in the sweep's folder holds the hypervolume of the front after each finished trial. It
gives MLflow and the report two curves: against the number of finished models (trials, teacher and
baselines), and against the FLOPs of the sweep's own training. The axes are NFE and accuracy,
because milliseconds are measured at the end. The hypervolume is a share of a box that the full
model spans; so the curves start once that model is measured. A sweep of many trials records only
as many points as the curves show.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.data.mixture import describe_data
from orchestrator.records.tracked_run import Status, TrackedRun
from orchestrator.records.training import job_parameters, shared_parameters
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.front import Front, find_front
from orchestrator.reporting.mlflow_report import SWEEP_TAG, front_so_far, trial_run
from orchestrator.reporting.results import (
    HYPERVOLUME_BY_GFLOPS,
    HYPERVOLUME_BY_TRIALS,
    MAX_CURVE_POINTS,
    history_folder,
    result_table,
)
from orchestrator.settings import SETTINGS_NAME, Settings, to_yaml
from orchestrator.sweeping.plan import exact_cost, full_trial
from orchestrator.tracking import Tracking
from orchestrator.training.watching import is_run_locked
from orchestrator.workspace.journal import Journal, now_ms, read_journal, recorded_times

SECONDS_BETWEEN_FRONTS = 30.0
"""A picture takes up to a second of the process that waits for the trials."""
FLOPS_PER_STEP = 1e9
SCHEDULE_CHOICES = ("num_schedules", "thresholds", "budgets")
"""Settings of which one decides how many students there are; a later one wins."""


class LiveSweep:
    """The runs of a sweep and of its trials from their start to their end, and the front so far."""

    def __init__(
        self,
        plan: SweepPlan,
        settings: Settings,
        tracking: Tracking,
        folder: Path,
        *,
        num_trials: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show the sweep as running from now on; what its run showed before stays.

        Args:
            folder: The sweep's folder.
            num_trials: Trials of the sweep, those included that a search will suggest.
        """
        self._name, self._num_trials, self._tracking = plan.name, num_trials, tracking
        self.history = FrontHistory(plan, history_folder(folder, plan.key), num_trials=num_trials)
        self._open: dict[str, Trial] = {}
        self._failures: dict[str, str] = {}
        self._new_front: Front | None = None
        self._clock, self._next_front = clock, clock()
        started_ms, _ = recorded_times(folder) or (now_ms(), 0)
        self._run = tracking.stored("sweep", plan.key) or TrackedRun(
            key=plan.key,
            kind="sweep",
            name=plan.name,
            folder=str(folder),
            journal=str(self.history.folder),
            started_ms=started_ms,
        )
        self.change(
            status="RUNNING",
            params=sweep_parameters(plan, settings),
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
        if self._new_front and self._clock() >= self._next_front:
            num_measured, folder = self.history.num_measured, self.history.folder
            notes = [f"{num_measured} of {self._num_trials} models are measured so far."]
            notes += [f"{label} failed: {reason}" for label, reason in self._failures.items()]
            changes = front_so_far(self._new_front, name=self._name, notes=notes, folder=folder)
            self.change(**changes)
            self._new_front, self._next_front = None, self._clock() + SECONDS_BETWEEN_FRONTS

    def on_results(self, results: Sequence[Trial], *, at_end: bool = False) -> None:
        """End the runs of measured trials, and show the front soon; pictures of fronts that follow
        each other at once are one.

        Args:
            at_end: Whether no trial follows.
        """
        for result in results:
            self._open.pop(result.key, None)
            self.history.add(result)
        self._show(results, "FINISHED")
        if self.history.record(at_end=at_end):
            self._new_front = self.history.front

    def on_end(self, trial: Trial, status: Status, reason: str = "") -> None:
        """End the run of a trial without a result, as FAILED or KILLED."""
        self._open.pop(trial.key, None)
        if status == "FAILED":
            self._failures[trial.label] = reason
        self._show([trial], status, reason)

    def close(self) -> None:
        """End the runs of the trials that were running, but not of those that others run."""
        for trial in list(self._open.values()):
            if not is_run_locked(Path(trial.folder)):
                self.on_end(trial, "KILLED")

    def _show(self, trials: Sequence[Trial], status: Status, reason: str = "") -> None:
        ended: dict[str, Any] = {"status": status, "reason": reason}
        runs = []
        for trial in trials:
            # A teacher or a baseline that was trained before has its own training's journal.
            journal = Path(trial.folder) if trial.job else None
            if not trial.job and trial.checkpoint and trial.role != "trial":
                journal = Path(trial.checkpoint).parent
            costed = self.history.with_cost(trial)
            runs.append(trial_run(self._name, self._run.key, costed, journal, **ended))
        self._tracking.publish(*runs)


class FrontHistory:
    """The front of a sweep while it runs, and its journal.

    A result is forgotten once another beats it. Seeds of a model are kept, because their mean still
    changes.
    """

    def __init__(self, plan: SweepPlan, folder: Path, *, num_trials: int) -> None:
        """Read the journal in `folder`; `num_trials` will be finished at the end."""
        self.folder, self._full = folder, full_trial(plan)
        self._seen: set[str] = set()
        self._candidates: list[Trial] = []
        self._flops = 0.0
        records, _ = read_journal(folder)
        steps = [r["step"] for r in records if HYPERVOLUME_BY_TRIALS in r.get("values", {})]
        self._last, self._interval = max(steps, default=0), max(1, num_trials // MAX_CURVE_POINTS)
        self.front: Front | None = None
        """The front that was recorded last; most models that others beat are not in it."""

    @property
    def num_measured(self) -> int:
        """Number of finished trials."""
        return len(self._seen)

    def with_cost(self, trial: Trial) -> Trial:
        """Return a trial with its exact cost."""
        return trial.with_numbers("cost", exact_cost(trial.model, self._full.model))

    def add(self, result: Trial) -> None:
        """Take in a measured trial; one that is known already changes nothing."""
        if result.key in self._seen:
            return
        self._seen.add(result.key)
        self._candidates.append(self.with_cost(result))
        if result.job:  # A first stage in common counts for the model that made it.
            shared = result.numbers.get("train/shared_flops", 0.0)
            self._flops += result.numbers.get("train/flops", 0.0) - shared

    def record(self, *, at_end: bool = False) -> bool:
        """Record the hypervolume of the trials that are finished now.

        Args:
            at_end: Whether no trial follows; the last point is always recorded.

        Returns:
            Whether anything was recorded: False while the full model is not measured, if it has no
            accuracy, or if too few trials were finished since the last time.
        """
        if self.num_measured < self._last + (1 if at_end else self._interval):
            return False
        front = find_front(result_table(self._candidates))
        volume, full = front.hypervolume, front.full
        if volume is None or full is None:
            return False
        if all(seed.key != self._full.key for seed in full["seeds"]):
            return False
        needed = {row["key"] for row in (*front.members, full)}
        self._candidates = [t for t in self._candidates if t.group or t.key in needed]
        numbers = {
            HYPERVOLUME_BY_TRIALS: volume,
            "sweep/front_size": len(front.members),
            "sweep/training_flops": self._flops,
        }
        journal = Journal(self.folder)
        journal.metrics(self.num_measured, numbers)
        journal.metrics(round(self._flops / FLOPS_PER_STEP), {HYPERVOLUME_BY_GFLOPS: volume})
        journal.close()
        self._last, self.front = self.num_measured, front
        return True


def sweep_parameters(plan: SweepPlan, settings: Settings) -> dict[str, str]:
    """Return the parameters that apply to this kind of sweep, those that all trainings share
    among them.

    A setting that is off, or an empty list, is left out.
    """
    sweep = settings.sweep
    params: dict[str, Any] = {"kind": plan.kind, "num_trials": len(plan.trials)}
    if plan.kind == "iterations":
        names = ["methods", "iterations", "num_layers"]
        names += [name for name in type(sweep).model_fields if sweep.asha and "asha" in name]
        params |= {name: getattr(sweep, name) for name in names}
    else:
        choice = [name for name in SCHEDULE_CHOICES if getattr(sweep, name)][-1]
        params |= {
            "teacher": plan.teacher,
            "influence_metric": settings.influence.metric,
            choice: getattr(sweep, choice),
            "selection": sweep.selection,
            "control": settings.distillation.control,
            "elastic": sweep.elastic or None,
            "distilled_baselines": sweep.distilled_baselines,
        }
        if choice == "budgets" or sweep.budget_unit != "evaluations":
            params["budget_unit"] = sweep.budget_unit
    if plan.kind == "search":
        params |= {f"search.{name}": value for name, value in settings.search}
    params["seeds"] = sweep.seeds
    own = {name: _text(v) for name, v in params.items() if v is not None and v != () and v != {}}
    jobs = [t.job for t in plan.trials if t.job and not t.is_distilled_baseline]
    shared = shared_parameters([job_parameters(job) for job in jobs])
    is_schedule = re.compile("schedule|r_[0-9]+").fullmatch
    return {name: str(value) for name, value in shared.items() if not is_schedule(name)} | own


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(each)}" for key, each in value.items())
    return str(value)
