"""The precision of a setting that names none: bf16 on GPUs, float32 on CPUs.

It is filled in once, when the settings are read. Recipes, keys and records then hold the precision
itself, and a plan does not depend on the machine that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from orchestrator.settings.schema import Settings

Precision = Literal["fp32", "bf16"]


def default_precision(*, on_gpus: bool) -> Precision:
    """Return the precision that is used where none is set."""
    return "bf16" if on_gpus else "fp32"


def fill_precisions(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Return the settings with the precisions of their devices where `given` names none.

    Args:
        given: Nested mapping of the values that the user gave.
    """
    trials = settings.trials_use_gpus
    run = trials if settings.sweep.kind == "iterations" else settings.cluster.num_gpus > 0
    training, distillation = settings.training, settings.distillation
    changes: dict[str, Any] = {}
    if not _names_precision(given, "training"):
        precision = {"precision": default_precision(on_gpus=run)}
        changes["training"] = training.model_copy(update=precision)
    if not _names_precision(given, "distillation", "training"):
        recipe = distillation.training.model_copy(
            update={"precision": default_precision(on_gpus=trials)}
        )
        changes["distillation"] = distillation.model_copy(update={"training": recipe})
    # Without GPUs it stays open: `evaluate` loads models on a GPU if this machine has one.
    if trials and not settings.evaluation.precision:
        evaluation = settings.evaluation.model_copy(update={"precision": "bf16"})
        changes["evaluation"] = evaluation
    return settings.model_copy(update=changes)


def _names_precision(given: Mapping[str, Any], *section: str) -> bool:
    for name in section:
        given = given.get(name) or {}
    return "precision" in given
