"""Record the hypervolume of the front after each finished trial, against models and training FLOPs.

The journal in the sweep's folder gives MLflow and the report two curves: against the number of
finished models (trials, teacher and baselines), and against the FLOPs of the sweep's own training.
The axes are NFE and accuracy, because milliseconds are measured at the end. The hypervolume is a
share of a box that the full model spans; so the curves start once that model is measured. A sweep
of many trials records only as many points as the curves show.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.pareto import Front, find_front
from orchestrator.reporting.results import result_table
from orchestrator.reporting.training_curves import (
    HYPERVOLUME_BY_GFLOPS,
    HYPERVOLUME_BY_TRIALS,
    MAX_CURVE_POINTS,
)
from orchestrator.sweeping.trials import exact_cost, full_trial
from orchestrator.workspace.journal import Journal, read_journal

FLOPS_PER_STEP = 1e9


class FrontHistory:
    """The front of a sweep while it runs, and its journal.

    A trial's result is read once, and forgotten once another beats it. Seeds of a model are kept,
    because their mean still changes.
    """

    def __init__(self, plan: SweepPlan, folder: Path, *, num_trials: int) -> None:
        """Read the journal in `folder`; `num_trials` will be finished at the end."""
        self._full, self._folder = full_trial(plan), folder
        self._seen: set[str] = set()
        self._candidates: list[Trial] = []
        self._flops = 0.0
        self._last = _last_step(folder)
        self._interval = max(1, num_trials // MAX_CURVE_POINTS)
        self.front: Front | None = None
        """The front that was recorded last; most models that others beat are not in it."""

    @property
    def num_measured(self) -> int:
        """Number of finished trials."""
        return len(self._seen)

    def add(self, trial: Trial) -> Trial | None:
        """Take in the result of a trial; return it with its exact cost if it is new."""
        if trial.key in self._seen:
            return None
        result = trial.result()
        if result is None:
            return None
        result = result.with_numbers("cost", exact_cost(trial.model, self._full.model))
        self._seen.add(trial.key)
        self._candidates.append(result)
        self._flops += _flops_spent(result) if trial.job else 0.0
        return result

    def record(self, *, at_end: bool = False) -> bool:
        """Record the hypervolume of the trials that are finished now.

        Args:
            at_end: Whether no trial follows; the last point is always recorded.

        Returns:
            Whether anything was recorded: False while the full model is not measured, if it has no
            accuracy, or if too few trials were finished since the last time.
        """
        num_found = len(self._seen)
        if num_found < self._last + (1 if at_end else self._interval):
            return False
        front = find_front(result_table(self._candidates))
        volume, full = front.hypervolume, front.full
        if volume is None or full is None:
            return False
        if all(seed.key != self._full.key for seed in front.seeds_of(full)):
            return False
        needed = {point.result.key for point in (*front.members, full)}
        self._candidates = [t for t in self._candidates if t.group or t.key in needed]
        numbers = {
            HYPERVOLUME_BY_TRIALS: volume,
            "sweep/front_size": len(front.members),
            "sweep/training_flops": self._flops,
        }
        journal = Journal(self._folder)
        journal.metrics(num_found, numbers)
        journal.metrics(round(self._flops / FLOPS_PER_STEP), {HYPERVOLUME_BY_GFLOPS: volume})
        journal.close()
        self._last, self.front = num_found, front
        return True


def _flops_spent(result: Trial) -> float:
    # A first stage in common counts for the model that made it.
    numbers = result.numbers
    return numbers.get("train/flops", 0.0) - numbers.get("train/shared_flops", 0.0)


def _last_step(folder: Path) -> int:
    records, _ = read_journal(folder)
    return max(
        (r["step"] for r in records if HYPERVOLUME_BY_TRIALS in r.get("values", {})), default=0
    )
