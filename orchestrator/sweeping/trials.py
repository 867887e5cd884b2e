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
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.trial import (
    Role,
    Trial,
    TrialSuite,
    teacher_or_costliest,
)
from orchestrator.training.checkpoint import weights_key
from orchestrator.workspace.folders import Workspace
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


def checkpoint_trial(
    role: Role,
    label: str,
    checkpoint: Path,
    config: ModelConfig,
    suite: TrialSuite,
    workspace: Workspace,
) -> Trial:
    """Return the trial that measures a checkpoint without training it."""
    weights = content_key("as it is", weights_key(checkpoint), config.to_dict())
    return Trial(
        key=content_key("trial", weights, suite.key),
        role=role,
        label=label,
        model=config,
        folder=str(workspace.trials / weights),
        checkpoint=str(checkpoint),
        suite=suite,
    )


def make_plan(
    kind: str,
    name: str | None,
    trials: Sequence[Trial],
    suite: TrialSuite,
    num_requested: int,
    *,
    teacher: Path | None,
) -> SweepPlan:
    """Return the plan of these trials, named by their keys where the user gave no name."""
    # Two measures of influence may lead to the same schedules by other thresholds.
    shown = [[t.key, t.threshold_above, t.threshold_up_to] for t in trials]
    key = content_key("sweep", kind, shown)
    return SweepPlan(
        key=key,
        name=name or f"{kind}-{key[:8]}",
        kind=kind,
        tokens_folder=suite.tokens_folder,
        teacher=str(teacher) if teacher else None,
        num_requested=num_requested,
        trials=tuple(trials),
        num_distinct=num_models(trials),
    )


def num_models(trials: Sequence[Trial]) -> int:
    """Return the number of models that a sweep makes itself; seeds of one model count once."""
    own = [trial for trial in trials if trial.role == "trial" or trial.job]
    return len({trial.group or trial.key for trial in own})
