"""Evaluate one model, as `evaluate` does with its only model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fake_tracking import untracked

from iiet.model.schedule import IterationSchedule
from orchestrator.models.open import OpenedModel, open_model
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.evaluating import EvaluatePlan, run_evaluate
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import Workspace


def evaluate_model(
    model: Path | OpenedModel,
    settings: EvaluationSettings,
    place: Workspace | Context,
    *,
    schedule: IterationSchedule | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> EvaluationResult:
    """Return the evaluation of a model under these settings; a workspace alone tracks nothing."""
    context = place if isinstance(place, Context) else untracked(place, progress)
    opened = open_model(model, schedule=schedule) if isinstance(model, Path) else model
    plan = EvaluatePlan(
        settings=Settings(evaluation=settings),
        workspace=context.workspace,
        opened={opened.label: opened},
        **options,
    )
    (evaluation,) = run_evaluate(plan, context).evaluations.values()
    return evaluation
