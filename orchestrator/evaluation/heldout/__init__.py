"""Held-out tasks: lm-eval tasks made from prepared data, of what is kept out of training."""

from orchestrator.evaluation.heldout.suite import (
    HeldoutSuite,
    build_heldout,
    find_heldout,
    has_accuracy,
    heldout_chances,
    heldout_configs,
    is_heldout_task,
    item_sets,
    offered_tasks,
)
from orchestrator.evaluation.heldout.text_tasks import TEXT_TASKS

__all__ = [
    "TEXT_TASKS",
    "HeldoutSuite",
    "build_heldout",
    "find_heldout",
    "has_accuracy",
    "heldout_chances",
    "heldout_configs",
    "is_heldout_task",
    "item_sets",
    "offered_tasks",
]
