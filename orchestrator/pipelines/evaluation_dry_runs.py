"""Dry runs of evaluations: what is stored of each task. Nothing is measured, fetched or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.cluster.launch import command_device
from orchestrator.data.hub import offline
from orchestrator.evaluation.evaluated_model import EvaluatedModel, open_models, short_names
from orchestrator.evaluation.harness import load_suite
from orchestrator.evaluation.measuring import Conditions, ModelMeasurer
from orchestrator.evaluation.store import EvaluationStore
from orchestrator.evaluation.task_selection import TaskSelection
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.evaluating import selected_tasks
from orchestrator.settings import Settings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.training.model_loading import best_device
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.layout import LOCAL, Workspace
from orchestrator.workspace.read_only import read_only


@dataclass(frozen=True, kw_only=True)
class EvaluationDryRun:
    """What an evaluation would measure."""

    tasks: tuple[tuple[str, str, str], ...]
    """Model, task, and how far it is."""

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Task, with its model if there are several, and how far it is."""
        has_several = len({model for model, _, _ in self.tasks}) > 1
        return [(f"{model}: {t}" if has_several else t, state) for model, t, state in self.tasks]

    def to_json(self) -> dict[str, Any]:
        """Return the tasks as JSON values."""
        names = ("model", "task", "state")
        return {"tasks": [dict(zip(names, row, strict=True)) for row in self.tasks]}


@read_only()
def plan_evaluation(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    models: Sequence[Path | str] = (),
    schedules: Sequence[str] = (),
    progress: Progress | None = None,
) -> EvaluationDryRun:
    """Return what `evaluate` would measure with these arguments.

    A precision that is not set is that of this machine's best device.

    Raises:
        UserError: As `evaluate`.
    """
    context = open_context(workspace, progress)
    opened = open_models(context.workspace, list(map(Path, models)), schedules)
    return EvaluationDryRun(
        tasks=tuple(
            (label, task, state)
            for label, model in zip(short_names(opened), opened, strict=True)
            for task, state in _states(model, settings, context)
        )
    )


def _states(model: EvaluatedModel, settings: Settings, context: Context) -> list[tuple[str, str]]:
    asked = selected_tasks(
        model, settings.evaluation, context.workspace, context.progress, make=False
    )
    states: list[tuple[str, str]] = []
    if asked.heldout and not asked.heldout.is_dir():
        missing = asked.heldout_names
        states = [(name, "to measure, its items are not made yet") for name in missing]
        others = tuple(name for name in asked.names if name not in missing)
        if not others:
            return states
        asked = replace(asked, names=others, heldout=None)
    return states + _states_of_loaded(model, asked, settings, context)


def _states_of_loaded(
    model: EvaluatedModel, asked: TaskSelection, settings: Settings, context: Context
) -> list[tuple[str, str]]:
    try:
        with offline():
            suite = load_suite(
                asked.names,
                folders=asked.folders,
                heldout=asked.heldout,
                num_fewshot=settings.evaluation.num_fewshot,
                prompts=settings.evaluation.prompts,
            )
    except RunFailed:
        return [(name, _NEEDS_HUB) for name in asked.names]
    precision, cluster = settings.evaluation.precision, settings.cluster
    device = cluster.device
    command_device(cluster, context.workspace.root)  # Raises if this machine lacks the device.
    is_elsewhere = cluster.num_gpus or (device == "cuda" and cluster.ray_address != LOCAL)
    if precision is None and device in (None, "cuda") and is_elsewhere:
        precision = "bf16"
    limit = settings.evaluation.limit
    conditions = Conditions(precision=precision, limit=limit, device=device or str(best_device()))
    store = EvaluationStore(context.workspace.evaluations, context.progress.note)
    stored = ModelMeasurer(model, store, conditions).stored_answers(suite)
    states = []
    for name, num_answers in stored.items():
        items = format_count(suite.num_items(name, limit), "item")
        if num_answers is None:
            states.append((name, f"{items}, stored"))
        else:
            resumes = f"; resumes after {num_answers:,} answers" if num_answers else ""
            states.append((name, f"{items} to measure{resumes}"))
    return [*states, *((name, _NEEDS_HUB) for name in suite.skipped)]


_NEEDS_HUB = "needs the hub, which a dry run does not ask"
