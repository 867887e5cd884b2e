"""Record the hypervolume of the front after each finished trial, against models and training FLOPs.

The journal in the sweep's folder gives MLflow and the report two curves: against the number of
finished models (trials, teacher and baselines), and against the FLOPs of the sweep's own training.
The axes are NFE and accuracy, because milliseconds are measured at the end. The hypervolume is a
share of a box that the full model spans; so the curves start once that model is measured.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.trial import Trial
from orchestrator.reporting.pareto import find_front
from orchestrator.reporting.seed_averages import average_seeds
from orchestrator.reporting.training_curves import HYPERVOLUME_BY_GFLOPS, HYPERVOLUME_BY_TRIALS
from orchestrator.sweeping.trials import (
    exact_cost,
    full_trial,
)
from orchestrator.workspace.journal import Journal, read_journal

FLOPS_PER_STEP = 1e9


def record_front(plan: SweepPlan, folder: Path) -> bool:
    """Record the hypervolume of the trials that are finished now in a folder's journal.

    Returns:
        Whether anything was recorded: False while the full model is not measured, if it has no
        accuracy, or if no trial was finished since the last time.
    """
    full = full_trial(plan)
    config = full.model
    found = [result for trial in plan.trials if (result := trial.result())]
    joined = average_seeds(
        [trial.model_copy(update={"cost": exact_cost(trial.model, config)}) for trial in found]
    )
    front = find_front(joined.results)
    volume = front.hypervolume
    spans_box = front.full is not None and full.key in joined.keys_of_seeds[front.full.result.key]
    if volume is None or not spans_box or len(found) <= _last_step(folder):
        return False
    flops = sum(_flops_spent(trial) for trial in found if trial.job)
    numbers = {
        HYPERVOLUME_BY_TRIALS: volume,
        "sweep/front_size": len(front.members),
        "sweep/training_flops": flops,
    }
    journal = Journal(folder)
    journal.metrics(len(found), numbers)
    journal.metrics(round(flops / FLOPS_PER_STEP), {HYPERVOLUME_BY_GFLOPS: volume})
    journal.close()
    return True


def _flops_spent(result: Trial) -> float:
    # A first stage in common counts for the model that made it.
    return (result.train.flops or 0.0) - (result.train.shared_flops or 0.0)


def _last_step(folder: Path) -> int:
    records, _ = read_journal(folder)
    return max(
        (r["step"] for r in records if HYPERVOLUME_BY_TRIALS in r.get("values", {})), default=0
    )
