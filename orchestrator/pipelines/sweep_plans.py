"""Plan a sweep from settings and a workspace: what is trained, and how it is measured.

A dry run plans without tokens (None), or without the teacher's influence, if they are missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from iiet.config import ModelConfig
from iiet.influence import InfluenceTable
from iiet.pruning import FamilyMember
from iiet.schedule import IterationSchedule
from orchestrator.data.sources import open_data
from orchestrator.evaluation.model_tokenizer import check_template, checkpoint_tokenizer
from orchestrator.evaluation.python_tasks import HELDOUT
from orchestrator.evaluation.task_selection import (
    lm_eval_task_fingerprints,
    select_tasks,
    user_task_folders,
)
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.hub_imports import local_model
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.settings.training import default_precision
from orchestrator.sweeping.baselines import find_baselines
from orchestrator.sweeping.checks import check_models
from orchestrator.sweeping.distilled_baselines import (
    distilled_baseline_trials,
)
from orchestrator.sweeping.elastic_plans import elastic_trials, without_elastic
from orchestrator.sweeping.model_plans import (
    ScratchModel,
    iterations_plan,
    settings_of,
    swept_variants,
    teacher_and_baselines,
)
from orchestrator.sweeping.selection import choose_members, schedule_cost
from orchestrator.sweeping.student_plans import (
    search_plan,
    student_trial,
    threshold_plan,
)
from orchestrator.sweeping.trial_states import StoredPlan
from orchestrator.sweeping.trials import checkpoint_trial
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import load_config, text_files_key, weights_key
from orchestrator.training.first_stage import share_first_stages
from orchestrator.training.model_lookup import resolve_teacher, tokens_folder_of
from orchestrator.training.pretraining_job import pretraining_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import last_recorded
from orchestrator.workspace.layout import PLAN_FILE, Workspace

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch

NEWEST = "newest"
"""As a teacher: the workspace's newest IIET with corrections."""


@dataclass(frozen=True, kw_only=True)
class SweepModel:
    """A model that an iterations sweep trains from scratch."""

    label: str
    """What tables and pictures call it."""
    settings: Settings
    """Sections `model`, `training` and `cluster` count."""
    group: str | None = None
    """Label without the seed; models of one group are seeds of one model."""


def check_arguments(
    settings: Settings, teacher: Path | str | None, models: Sequence[SweepModel] | None
) -> None:
    """Raise `UserError` if the arguments do not fit the kind of sweep."""
    kind = settings.sweep.kind
    if kind == "iterations" and teacher is not None:
        raise UserError(
            f"sweep.kind=iterations trains every model from scratch, and a teacher was given "
            f"({teacher}); leave it out, or set sweep.kind to threshold or search"
        )
    if kind != "iterations" and models is not None:
        raise UserError(
            f"sweep.kind={kind} distills students of one teacher, and models were given; leave "
            "them out, or set sweep.kind to iterations"
        )


def teacher_checkpoint(context: Context, teacher: Path | str) -> Path:
    """Return the checkpoint of a teacher that is given by path, by name or as `NEWEST`."""
    wanted = None if teacher == NEWEST else teacher
    return resolve_teacher(context.workspace, local_model(context, wanted))


def plan_teacher(
    settings: Settings, workspace: Workspace, tokens: Path | None
) -> dict[str, TrainingJob]:
    """Return the jobs that pretrain the teacher and its baselines."""
    check_models(settings)
    models = teacher_and_baselines(settings).items()
    jobs = {label: pretraining_job(own, workspace, tokens) for label, own in models}
    return dict(zip(jobs, share_first_stages([*jobs.values()]), strict=True))


def plan_iterations(
    settings: Settings,
    context: Context,
    tokens: Path | None,
    models: Sequence[SweepModel] | None = None,
    *,
    name: str | None = None,
    make: bool = True,
) -> SweepPlan:
    """Plan a sweep of models trained from scratch on the same tokens; arguments as `sweep`."""
    variants = [
        ScratchModel(
            label=model.label,
            job=pretraining_job(model.settings, context.workspace, tokens),
            group=model.group,
        )
        for model in (_models(settings) if models is None else models)
    ]
    config = variants[0].job.model
    suite = plan_suite(settings.evaluation, tokens, config, context.progress, make=make)
    if not make:
        suite = _with_known_fingerprints(suite, context.workspace)
    return iterations_plan(variants, suite=suite, name=name)


def _models(settings: Settings) -> Iterator[SweepModel]:
    for variant in swept_variants(settings):
        group = None if variant.seed is None else variant.group
        own = settings_of(settings, variant)
        yield SweepModel(label=variant.label, settings=own, group=group)


def plan_students(
    settings: Settings,
    context: Context,
    teacher: Path,
    influence: InfluenceTable | None,
    *,
    baselines: Mapping[str, Path] | None = None,
    name: str | None = None,
    make: bool = True,
) -> SweepPlan:
    """Plan a threshold sweep or a search: the trials that are known before any has run.

    Args:
        teacher: Checkpoint of the full model.
        influence: Its table; without it the plan has no students.
        baselines: Label to checkpoint; when unset, the workspace's models without corrections that
            have the teacher's shape and tokens; `sweep.num_layers` allows other depths.
        make: Whether missing held-out tasks are made, and lm-eval's tasks loaded.
    """
    workspace, full = context.workspace, load_config(teacher)
    tokens = tokens_folder_of(teacher, workspace)
    left_out: dict[str, str] = {}
    if baselines is None:
        known = find_baselines(workspace, teacher, settings.sweep.num_layers)
        baselines, left_out = known.found, known.left_out
        for run, reason in left_out.items():
            context.progress.note(f"run {run}: {reason}")
    suite = plan_suite(settings.evaluation, tokens, full, context.progress, make=make)
    suite = suite.model_copy(update=text_of_teacher(teacher))
    if not make:
        suite = _with_known_fingerprints(suite, workspace)
    if suite.prompts:
        check_template(checkpoint_tokenizer(teacher), suite.prompts)
    cost = schedule_cost(settings.sweep.budget_unit, full)
    is_search = settings.sweep.kind == "search"
    members = choose_members(influence, settings.sweep, cost=cost) if influence else ()
    elastic: list[Trial] = []
    if settings.sweep.elastic:
        if influence:
            elastic = elastic_trials(
                settings, workspace, teacher=teacher, members=members, suite=suite
            )
        settings = without_elastic(settings)
    beside = [
        checkpoint_trial("baseline", label, folder, load_config(folder), suite, workspace)
        for label, folder in baselines.items()
    ]
    if influence:
        beside += distilled_baseline_trials(
            settings, workspace, teacher=teacher, members=members, influence=influence, suite=suite
        )
    plan = threshold_plan(
        settings,
        workspace,
        teacher=teacher,
        members=members,
        suite=suite,
        elastic=elastic,
        baselines=beside,
        left_out=left_out,
        name=None if is_search else name,
    )
    return search_plan(plan, settings.search, name) if is_search else plan


def schedule_search(
    settings: Settings, workspace: Workspace, plan: SweepPlan, teacher: Path
) -> ScheduleSearch:
    """Return what suggests further trials for the plan of a search."""
    from orchestrator.sweeping.search import ScheduleSearch, finished_schedules  # Imports optuna.

    full, suite = load_config(teacher), plan.trials[0].suite

    def make_trial(schedule: IterationSchedule) -> Trial:
        member = FamilyMember(schedule, math.nan, math.nan)
        config = replace(full, schedule=schedule)
        return student_trial(settings, workspace, teacher, config, member, suite)

    return ScheduleSearch(
        plan,
        full.corrections,
        settings.search,
        make_trial,
        folder=workspace.sweeps / plan.name,
        others=finished_schedules(workspace, weights_key(teacher)),
    )


def plan_suite(
    settings: EvaluationSettings,
    tokens: Path | None,
    config: ModelConfig,
    progress: Progress,
    *,
    make: bool = True,
) -> TrialSuite:
    """Return how trials are evaluated.

    Args:
        make: Whether missing held-out tasks are made, and lm-eval's tasks loaded.
    """
    if tokens is None:
        return TrialSuite(tokens_folder="")
    asked = select_tasks(
        settings,
        lambda: tokens,
        context_length=config.context_length,
        progress=progress,
        make=make,
    )
    # Held-out tasks alone need no names: they are all tasks of their folder.
    is_heldout_alone = settings.suite == HELDOUT and not settings.include_path
    return TrialSuite(
        tokens=open_data(tokens).fingerprint,
        tokens_folder=str(tokens),
        tasks=() if is_heldout_alone else tuple(asked.names),
        suite=asked.heldout.name if asked.heldout else "",
        suite_folder=str(asked.heldout or ""),
        include_folder="".join(map(str, user_task_folders(settings))),
        batch_size=settings.batch_size,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        prompts=settings.prompts,
        precision=settings.precision or default_precision(on_gpus=False),
        # Held-out tasks are named by their content; others may change under their names.
        fingerprints=lm_eval_task_fingerprints(settings, context_length=config.context_length)
        or None
        if make
        else None,
    )


def _with_known_fingerprints(suite: TrialSuite, workspace: Workspace) -> TrialSuite:
    """Return a suite with the fingerprints of lm-eval's tasks that the newest sweep found."""
    for folder in sorted(workspace.sweeps.glob("*/"), key=last_recorded, reverse=True):
        with suppress(UserError):
            stored = StoredPlan.read(folder / PLAN_FILE)
            if not stored:
                continue
            known = stored.trials[0].suite
            found = suite.model_copy(update={"fingerprints": known.fingerprints})
            if found.key == known.key:
                return found
    return suite


def text_of_teacher(teacher: Path) -> dict[str, str]:
    """Return the fields of a suite that read text as an imported teacher does; none for others."""
    key = text_files_key(teacher)
    return {"vocabulary": key, "vocabulary_folder": str(teacher)} if key else {}
