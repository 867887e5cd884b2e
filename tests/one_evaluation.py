"""Evaluate one open model, as `evaluate` does with its only model."""

from __future__ import annotations

from typing import Any

from orchestrator.models.open import OpenedModel
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.evaluating import EvaluatePlan, run_evaluate
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.settings import EvaluationSettings, Settings


def evaluate_model(
    model: OpenedModel, settings: EvaluationSettings, context: Context, **options: Any
) -> EvaluationResult:
    """Return the evaluation of a model under these settings."""
    plan = EvaluatePlan(
        settings=Settings(evaluation=settings),
        workspace=context.workspace,
        opened=(model,),
        **options,
    )
    (found,) = run_evaluate(plan, context).evaluations.values()
    return found
