"""Held-out tasks: lm-eval tasks made from the documents that were kept out of training."""

from orchestrator.evaluation.heldout.suite import (
    TASKS,
    HeldoutSuite,
    build_heldout,
    heldout_configs,
)

__all__ = ["TASKS", "HeldoutSuite", "build_heldout", "heldout_configs"]
