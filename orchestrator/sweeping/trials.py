"""Trials with their keys, and the plan of a sweep that holds them.

A trial's key is the hash of all that determines its result, and its folder is named by the hash of
all that determines its weights. So a second sweep, another range of thresholds or a restart finds
finished trials, and other tasks are measured with the same weights without training again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.pruning import FamilyMember
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import (
    Role,
    SweepPlan,
    Trial,
    TrialSuite,
    teacher_or_costliest,
)
from orchestrator.training.checkpoint import weights_key
from orchestrator.training.finished_weights import folder_of_weights
from orchestrator.training.job import job_key
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.provenance import content_key

SweepKind = Literal["threshold", "iterations", "search"]


def exact_cost(config: ModelConfig, full: ModelConfig) -> dict[str, float]:
    """Return the cost of a model in all units that follow from shapes, and relative to `full`."""
    cost, most = inference_cost(config), inference_cost(full)
    return {
        "evaluations": cost.evaluations_per_token,
        "relative_evaluations": cost.evaluations_per_token / most.evaluations_per_token,
        "flops_per_token": cost.decode_flops_per_token,
        "relative_flops": cost.decode_flops_per_token / most.decode_flops_per_token,
        "prefill_flops_per_token": cost.prefill_flops_per_token,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "weight_bytes_per_token": cost.weight_bytes_per_token,
        "num_parameters": cost.num_parameters,
    }


def full_trial(plan: SweepPlan) -> Trial:
    """Return the trial that the others are compared with; see `teacher_or_costliest`."""
    found = teacher_or_costliest(
        plan.trials,
        role=lambda trial: trial.role,
        cost=lambda trial: inference_cost(trial.model).evaluations_per_token,
    )
    assert found is not None, "a plan has trials"
    return found


def full_config(plan: SweepPlan) -> ModelConfig:
    """Return the model that relative costs are relative to."""
    return full_trial(plan).model


def evaluation_key(weights: str, suite: TrialSuite) -> str:
    """Return the key of a trial.

    Args:
        weights: Key of the training, or of a checkpoint under a schedule.
        suite: What is measured.
    """
    return content_key("trial", weights, suite.key)


def checkpoint_trial(
    role: Role,
    label: str,
    checkpoint: Path,
    config: ModelConfig,
    suite: TrialSuite,
    workspace: Workspace,
) -> Trial:
    """Return the trial that measures a checkpoint without training it."""
    # A pruned student under all corrections is another trial than its teacher.
    kind = "pruned" if role == "trial" else "as it is"
    weights = content_key(kind, weights_key(checkpoint), config.to_dict())
    return Trial(
        key=evaluation_key(weights, suite),
        role=role,
        label=label,
        model=config,
        folder=str(workspace.trials / weights),
        checkpoint=str(checkpoint),
        suite=suite,
    )


def trained_trial(
    role: Role,
    label: str,
    job: TrainingJob,
    suite: TrialSuite,
    workspace: Workspace,
    *,
    member: FamilyMember | None = None,
    seed: int | None = None,
) -> Trial:
    """Return the trial that trains a teacher's student, and measures it.

    Args:
        role: `trial` or `baseline`.
        label: Name without the seed.
        job: The training; its folder is that of a finished one, or follows from its key.
        suite: What is measured.
        workspace: Where trials are stored.
        member: Its thresholds are those that give this schedule.
        seed: Seed of the training if the sweep has several; the recipe's when unset.
    """
    if seed is not None:
        job = job.model_copy(update={"recipe": job.recipe.model_copy(update={"seed": seed})})
    weights = job_key(job)
    folder = str(folder_of_weights(workspace, weights, workspace.trials / weights))
    return Trial(
        key=evaluation_key(weights, suite),
        role=role,
        label=label if seed is None else f"{label}, seed {seed}",
        model=job.model,
        folder=folder,
        job=job.model_copy(update={"run_folder": folder}),
        suite=suite,
        threshold_above=member.threshold_above if member else None,
        threshold_up_to=member.threshold_up_to if member else None,
        parent=job.provenance.get("teacher"),
        seed=seed,
        group=None if seed is None else label,
    )


def num_models(trials: Sequence[Trial]) -> int:
    """Return the number of schedules or models that a sweep is about; seeds count once.

    Of a teacher's students, schedules count: an elastic one and a separate one are the same.
    Baselines count where all models are trained from scratch.
    """
    own = [t for t in trials if t.role == "trial" or (t.job and t.parent is None)]
    return len({t.schedule if t.parent else t.group or t.key for t in own})


def num_distilled_baselines(trials: Sequence[Trial]) -> int:
    """Return the number of baselines that a sweep distills; seeds of one count once."""
    return len({t.group or t.key for t in trials if t.is_distilled_baseline})
