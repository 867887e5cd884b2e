"""What a sweep will do, decided before it does anything: which trials, what each costs, what is
done already.

A trial is a schedule (or a method) trained by one job and measured by one suite. Thresholds are
only labels: all that lead to the same schedule are one trial.
"""

from orchestrator.plan.methods import Variant, iterations_plan
from orchestrator.plan.selection import choose_members
from orchestrator.plan.students import (
    check_student_batch,
    loss_of,
    student_job,
    student_trial,
    threshold_plan,
)
from orchestrator.plan.trials import (
    PlannedTrial,
    SweepPlan,
    exact_cost,
    full_config,
    full_trial,
    num_models,
)

__all__ = [
    "PlannedTrial",
    "SweepPlan",
    "Variant",
    "check_student_batch",
    "choose_members",
    "exact_cost",
    "full_config",
    "full_trial",
    "iterations_plan",
    "loss_of",
    "num_models",
    "student_job",
    "student_trial",
    "threshold_plan",
]
