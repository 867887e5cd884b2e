"""From settings and a workspace to the plan of a sweep: what is trained, how it is measured.

A plan takes no training, but all that it follows from is made here where it is missing: tokens,
held-out tasks, the teacher's influence under each schedule that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from iiet.config import ModelConfig
from iiet.influence import InfluenceTable
from orchestrator.data.preparation import prepare
from orchestrator.data.token_store import open_tokens
from orchestrator.evaluation.task_selection import (
    HELDOUT,
    lm_eval_task_fingerprints,
    select_tasks,
    user_task_folders,
)
from orchestrator.pipelines.context import Desk
from orchestrator.pipelines.influence import measure_influence
from orchestrator.pipelines.pretraining import pretraining_job
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.sweeping.baselines import find_baselines
from orchestrator.sweeping.budgets import cost_in
from orchestrator.sweeping.checks import check_sweep
from orchestrator.sweeping.models import check_models, models_of, with_rates
from orchestrator.sweeping.selection import choose_members
from orchestrator.sweeping.students import threshold_plan
from orchestrator.sweeping.trials import SweepPlan
from orchestrator.sweeping.variants import Variant, iterations_plan
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import load_config, text_files_key
from orchestrator.training.model_lookup import tokens_folder_of


def plan_thresholds(
    settings: Settings,
    desk: Desk,
    teacher: Path,
    *,
    influence: InfluenceTable | None = None,
    baselines: Iterable[tuple[str, Path]] | None = None,
    name: str | None = None,
) -> SweepPlan:
    """Plan a threshold sweep.

    Args:
        settings: Sections `influence`, `sweep`, `distillation` and `evaluation` count.
        desk: Workspace, tracking and terminal.
        teacher: Checkpoint of the full model.
        influence: Its influence, if it is at hand.
        baselines: Label and checkpoint of models to show beside it; those of the workspace that
            were trained on the same tokens in the same shape when unset.
        name: Name of the sweep; made from its content when unset.

    Raises:
        UserError: If something does not go together.
    """
    tokens, full = tokens_folder_of(teacher, desk.workspace), load_config(teacher)
    influence = influence or influence_of(settings, desk, teacher)
    left_out: dict[str, str] = {}
    if baselines is None:
        known = find_baselines(desk.workspace, teacher)
        baselines, left_out = known.found.items(), known.left_out
        for run, reason in left_out.items():
            desk.progress.note(f"run {run}: {reason}")
    members = choose_members(
        influence,
        settings.sweep,
        cost=cost_in(settings.sweep.budget_unit, full),
    )
    suite = plan_suite(settings.evaluation, tokens, full, desk.progress)
    return threshold_plan(
        settings,
        desk.workspace,
        teacher=teacher,
        members=members,
        suite=suite | text_of_teacher(teacher),
        baselines=list(baselines),
        left_out=left_out,
        name=name,
    )


def influence_of(settings: Settings, desk: Desk, teacher: Path) -> InfluenceTable:
    """Return a teacher's influence, measured if it is not there yet."""
    return measure_influence(
        teacher,
        settings.influence,
        tokens_folder_of(teacher, desk.workspace),
        tracking=desk.tracking,
        progress=desk.progress,
    )


def plan_iterations(settings: Settings, desk: Desk, *, name: str | None = None) -> SweepPlan:
    """Plan a sweep over methods, iteration counts, learning rates and seeds, all from scratch.

    Args:
        settings: Section `sweep` names them, `training` is the recipe of all.
        desk: Workspace, tracking and terminal.
        name: Name of the sweep; made from its content when unset.

    Raises:
        UserError: If something does not go together.
    """
    check_sweep(settings, "iterations", desk.progress)
    check_models(settings, "iterations")
    tokens = prepare(settings.data, desk.workspace, desk.progress)
    variants = [
        Variant(label=label, job=pretraining_job(own, desk.workspace, tokens), group=group)
        for label, own, group in _variants(settings)
    ]
    config = variants[0].job.config()
    suite = plan_suite(settings.evaluation, tokens, config, desk.progress)
    return iterations_plan(variants, suite=suite, name=name)


def plan_suite(
    settings: EvaluationSettings, tokens: Path, config: ModelConfig, progress: Progress
) -> dict[str, Any]:
    """Return what is measured as a plain value: the held-out tasks, made if need be, or tasks by
    name.
    """
    asked = select_tasks(
        settings, lambda: tokens, context_length=config.context_length, progress=progress
    )
    # Alone they need no names: they are all tasks of their folder.
    is_heldout_alone = settings.suite == HELDOUT and not settings.include_path
    suite: dict[str, Any] = {
        "tokens": open_tokens(tokens).fingerprint,
        "tokens_folder": str(tokens),
        "tasks": [] if is_heldout_alone else list(asked.names),
        "suite": asked.heldout.name if asked.heldout else "",
        "suite_folder": str(asked.heldout or ""),
        "include_folder": "".join(map(str, user_task_folders(settings))),
        "batch_size": settings.batch_size,
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "precision": settings.precision,
    }
    # The held-out tasks are named by their content; others may change under their names.
    if others := lm_eval_task_fingerprints(settings):
        suite["fingerprints"] = others
    return suite


def text_of_teacher(teacher: Path) -> dict[str, Any]:
    """Return what makes a suite read text as an imported teacher does; nothing for others."""
    key = text_files_key(teacher)
    return {"vocabulary": key, "vocabulary_folder": str(teacher)} if key else {}


def _variants(settings: Settings) -> Iterator[tuple[str, Settings, str | None]]:
    """Yield label, settings and group of every model that a sweep trains from scratch."""
    for name, changes in models_of(settings):
        rates = with_rates(settings, **changes)
        for own in rates:
            label = name
            if len(rates) > 1:
                label = f"{name}, rate {own.training.learning_rate:g}"
            for seed in settings.sweep.seeds:
                training = own.training.model_copy(update={"seed": seed})
                seeded = own.model_copy(update={"training": training})
                yield f"{label}, seed {seed}", seeded, label
            if not settings.sweep.seeds:
                yield label, own, None
