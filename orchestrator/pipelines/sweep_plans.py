"""Plan a sweep from settings and a workspace: what is trained, and how it is measured.

A plan trains nothing, but it makes what it follows from where that is missing: tokens, held-out
tasks, and the teacher's influence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iiet.config import ModelConfig
from iiet.cost import training_flops_per_token
from iiet.influence import InfluenceTable
from iiet.pruning import FamilyMember
from iiet.schedule import IterationSchedule
from orchestrator.data.preparation import prepare as prepare_tokens
from orchestrator.data.token_store import open_tokens
from orchestrator.evaluation.task_selection import (
    HELDOUT,
    lm_eval_task_fingerprints,
    select_tasks,
    user_task_folders,
)
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.influence import influence_of
from orchestrator.pipelines.pretraining import pretraining_job
from orchestrator.planning.fit import request_of
from orchestrator.planning.trial_gpus import assign_trial_gpus
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.sweeping.asha import asha_trials
from orchestrator.sweeping.baselines import find_baselines
from orchestrator.sweeping.checks import check_models, check_sweep
from orchestrator.sweeping.model_plans import (
    TEACHER,
    ScratchModel,
    iterations_plan,
    max_num_students,
    settings_at_rates,
    swept_models,
    teacher_and_baselines,
)
from orchestrator.sweeping.plan_table import plan_sentences
from orchestrator.sweeping.remaining_cost import (
    TrialState,
    estimate_remaining_cost,
    requested_noun,
    trial_states,
)
from orchestrator.sweeping.search import ScheduleSearch, search_plan
from orchestrator.sweeping.selection import choose_members, schedule_cost
from orchestrator.sweeping.student_plans import student_trial, threshold_plan
from orchestrator.sweeping.trials import PlannedTrial, SweepPlan, exact_cost, full_config
from orchestrator.terminal.formatting import format_count
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import load_config, text_files_key
from orchestrator.training.job import TrainingJob, finished_outcome
from orchestrator.training.model_lookup import resolve_teacher, tokens_folder_of
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import Workspace

if TYPE_CHECKING:
    import pandas

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


@dataclass(frozen=True, kw_only=True)
class SweepDryRun:
    """What a sweep would do."""

    plan: SweepPlan
    """Its trials."""
    states: tuple[TrialState, ...]
    """How far each trial is."""
    sentences: tuple[str, ...]
    """What is reused, what is left to train, and what that costs."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row per trial: label, role, schedule, exact costs, state."""
        import pandas

        full = full_config(self.plan)
        rows = []
        for state in self.states:
            config = state.trial.config()
            rows.append(
                {
                    "name": state.trial.label,
                    "role": state.trial.role,
                    "method": config.method,
                    "schedule": str(config.corrections),
                    "state": state.name,
                    "steps_done": state.steps_done,
                    **exact_cost(config, full),
                }
            )
        return pandas.DataFrame(rows)


def plan_sweep(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    teacher: Path | str | None = None,
    models: Sequence[SweepModel] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> SweepDryRun:
    """Return what `sweep` would do with the same arguments, as far as it is known.

    Schedules follow from the teacher's influence. If the teacher is not trained yet, the plan is
    that of its training, and a sentence says how many students there will be at most.

    Args:
        settings: The whole tree; `sweep.kind` says what is swept.
        workspace: A workspace or its folder.
        teacher: As in `sweep`.
        models: As in `sweep`.
        name: Name of the sweep; made from its content when unset.
        progress: Progress display.

    Raises:
        UserError: If the settings do not go together.
    """
    context = open_context(workspace, progress)
    check_arguments(settings, teacher, models)
    check_sweep(settings, settings.sweep.kind, context.progress)
    if settings.sweep.kind == "iterations":
        return dry_run_of(plan_iterations(settings, context, models, name=name), settings, context)
    if teacher is not None:
        checkpoint = teacher_checkpoint(context, teacher)
        return _dry_run_of_students(settings, context, checkpoint, name)
    tokens, jobs = plan_teacher(settings, context)
    outcome = finished_outcome(jobs[TEACHER], context.progress.note)
    if outcome and outcome.checkpoint:
        return _dry_run_of_students(settings, context, Path(outcome.checkpoint), name)
    return _dry_run_of_pretraining(settings, context, tokens, jobs)


def _dry_run_of_students(
    settings: Settings, context: Context, teacher: Path, name: str | None
) -> SweepDryRun:
    planned = plan_students(settings, context, teacher, name=name)
    plan, search = planned.plan, planned.search
    if search is None:
        return dry_run_of(plan, settings, context)
    found: list[PlannedTrial] = []
    if all(trial.result() for trial in plan.trials if trial.role == "trial"):
        found = search.finished_part()
    plan = replace(plan, trials=(*plan.trials, *found))
    return dry_run_of(plan, settings, context, *_search_price(plan, search, settings))


def _dry_run_of_pretraining(
    settings: Settings, context: Context, tokens: Path, jobs: Mapping[str, TrainingJob]
) -> SweepDryRun:
    config = jobs[TEACHER].config()
    plan = iterations_plan(
        [ScratchModel(label=label, job=job) for label, job in jobs.items()],
        suite=plan_suite(settings.evaluation, tokens, config, context.progress),
        name="the teacher and its baselines",
    )
    # They are pretrained on the cluster's GPUs, not on those of the sweep's trials.
    gpus = settings.sweep.model_copy(update={"gpus_per_trial": settings.cluster.num_gpus})
    recipe, most = settings.distillation.training, max_num_students(settings, config)
    num_tokens = recipe.num_steps * recipe.num_tokens_per_step
    is_pruned = settings.distillation.control == "pruned"
    training = "none of them trained" if is_pruned else f"each on {num_tokens:,} tokens"
    return dry_run_of(
        plan,
        settings.model_copy(update={"sweep": gpus}),
        context,
        f"then at most {format_count(most, 'student')}, {training}; their schedules follow from "
        "the teacher's influence, and stand in this plan once it is trained",
    )


def dry_run_of(plan: SweepPlan, settings: Settings, context: Context, *more: str) -> SweepDryRun:
    """Return what a plan would do: how far its trials are, and what the rest costs."""
    states = trial_states(plan, settings.sweep)
    price = estimate_remaining_cost(plan, states, settings, context.workspace.teachers)
    lines = plan_sentences(plan, requested_noun(plan, settings.sweep), states, price)
    if settings.trials_use_gpus:
        jobs = [s.trial.job for s in states if s.name == "to train" and s.trial.job]
        requests = [request_of(TrainingJob.from_dict(job)) for job in jobs]
        sweep = assign_trial_gpus(settings, requests).sweep
        at_once = f", at most {sweep.trials_at_once} at once" if sweep.trials_at_once else ""
        gpus = format_count(sweep.gpus_per_trial or 0, "GPU")
        lines.append(f"each trial runs on {gpus}{at_once}")
    if asha := asha_trials(plan, settings.sweep):
        lines.append(next(iter(asha.values())).rule.text)
    return SweepDryRun(plan=plan, states=tuple(states), sentences=(*lines, *more))


def _search_price(plan: SweepPlan, search: ScheduleSearch, settings: Settings) -> list[str]:
    """Say what a search may still train, and what that costs at most."""
    recipe = settings.distillation.training
    tokens = recipe.num_steps * recipe.num_tokens_per_step
    # The frozen teacher's forward pass costs a third of a training step.
    flops = tokens * training_flops_per_token(plan.trials[0].config()) * 4 / 3
    wanted, left = search.num_wanted, search.num_left
    if not wanted:
        return ["the search has nothing to try beside the family"]
    lines = [
        f"the search tries at most {wanted:,} more of {search.num_schedules:,} schedules; which "
        f"ones follows from the results, {left:,} are not known yet"
    ]
    if left:
        lines.append(
            f"each of these trains once, on {tokens:,} tokens: at most {flops:.3g} FLOPs, "
            f"{left * flops:.3g} together"
        )
    return lines


def check_arguments(
    settings: Settings, teacher: Path | str | None, models: Sequence[SweepModel] | None
) -> None:
    """Check that the arguments fit the kind of sweep.

    Raises:
        UserError: If they do not.
    """
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
    """Return the checkpoint of a teacher given by path, by name or as `NEWEST`.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    path = None if teacher == NEWEST else Path(teacher)
    return resolve_teacher(context.workspace, path)


def plan_teacher(settings: Settings, context: Context) -> tuple[Path, dict[str, TrainingJob]]:
    """Return the tokens, and the jobs that pretrain the teacher and its baselines.

    Raises:
        UserError: If one of them cannot be made, or the tokens cannot.
    """
    check_models(settings, settings.sweep.kind)
    tokens = prepare_tokens(settings.data, context.workspace, context.progress)
    jobs = {
        label: pretraining_job(own, context.workspace, tokens)
        for label, own in teacher_and_baselines(settings).items()
    }
    return tokens, jobs


def plan_iterations(
    settings: Settings,
    context: Context,
    models: Sequence[SweepModel] | None = None,
    *,
    name: str | None = None,
) -> SweepPlan:
    """Plan a sweep of models trained from scratch on the same tokens.

    Args:
        settings: Section `sweep` names methods, iteration counts, learning rates and seeds;
            `training` is the recipe of all.
        context: Workspace, progress and tracking.
        models: Models to train instead of those.
        name: Name of the sweep; made from its content when unset.

    Raises:
        UserError: If a model cannot be made, or the tokens cannot.
    """
    if models is None:
        check_models(settings, "iterations")
        models = list(_models(settings))
    tokens = prepare_tokens(settings.data, context.workspace, context.progress)
    variants = [
        ScratchModel(
            label=model.label,
            job=pretraining_job(model.settings, context.workspace, tokens),
            group=model.group,
        )
        for model in models
    ]
    config = variants[0].job.config()
    suite = plan_suite(settings.evaluation, tokens, config, context.progress)
    return iterations_plan(variants, suite=suite, name=name)


def _models(settings: Settings) -> Iterator[SweepModel]:
    for name, changes in swept_models(settings):
        rates = settings_at_rates(settings, **changes)
        for own in rates:
            label = name
            if len(rates) > 1:
                label = f"{name}, rate {own.training.learning_rate:g}"
            for seed in settings.sweep.seeds:
                training = own.training.model_copy(update={"seed": seed})
                seeded = own.model_copy(update={"training": training})
                yield SweepModel(label=f"{label}, seed {seed}", settings=seeded, group=label)
            if not settings.sweep.seeds:
                yield SweepModel(label=label, settings=own)


@dataclass(frozen=True, kw_only=True)
class StudentsPlan:
    """A sweep over one teacher's students."""

    plan: SweepPlan
    """The trials that are known before any has run."""
    influence: InfluenceTable
    """The teacher's influence."""
    search: ScheduleSearch | None
    """Suggests further trials; None for a threshold sweep."""


def plan_students(
    settings: Settings,
    context: Context,
    teacher: Path,
    *,
    baselines: Mapping[str, Path] | None = None,
    name: str | None = None,
) -> StudentsPlan:
    """Plan a threshold sweep or a search.

    Args:
        settings: Sections `influence`, `sweep`, `search`, `distillation` and `evaluation`.
        context: Workspace, progress and tracking.
        teacher: Checkpoint of the full model.
        baselines: Label to checkpoint; when unset, the workspace's models without corrections that
            have the teacher's shape and tokens.
        name: Name of the sweep; made from its content when unset.

    Raises:
        UserError: If something does not go together.
    """
    tokens, full = tokens_folder_of(teacher, context.workspace), load_config(teacher)
    influence = influence_of(teacher, settings.influence, tokens, context)
    left_out: dict[str, str] = {}
    if baselines is None:
        known = find_baselines(context.workspace, teacher)
        baselines, left_out = known.found, known.left_out
        for run, reason in left_out.items():
            context.progress.note(f"run {run}: {reason}")
    is_search = settings.sweep.kind == "search"
    suite = plan_suite(settings.evaluation, tokens, full, context.progress)
    suite |= text_of_teacher(teacher)
    plan = threshold_plan(
        settings,
        context.workspace,
        teacher=teacher,
        members=choose_members(
            influence, settings.sweep, cost=schedule_cost(settings.sweep.budget_unit, full)
        ),
        suite=suite,
        baselines=list(baselines.items()),
        left_out=left_out,
        name=None if is_search else name,
    )
    if not is_search:
        return StudentsPlan(plan=plan, influence=influence, search=None)

    def make_trial(schedule: IterationSchedule) -> PlannedTrial:
        member = FamilyMember(schedule, math.nan, math.nan)
        config = replace(full, schedule=schedule)
        return student_trial(settings, context.workspace, teacher, config, member, suite)

    search = ScheduleSearch(plan, full.corrections, settings.search, make_trial)
    plan = search_plan(plan, settings.search, name)
    return StudentsPlan(plan=plan, influence=influence, search=search)


def plan_suite(
    settings: EvaluationSettings, tokens: Path, config: ModelConfig, progress: Progress
) -> dict[str, Any]:
    """Return what is measured as a plain value; held-out tasks are made if they are missing."""
    asked = select_tasks(
        settings, lambda: tokens, context_length=config.context_length, progress=progress
    )
    # Held-out tasks alone need no names: they are all tasks of their folder.
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
    # Held-out tasks are named by their content; others may change under their names.
    if others := lm_eval_task_fingerprints(settings):
        suite["fingerprints"] = others
    return suite


def text_of_teacher(teacher: Path) -> dict[str, Any]:
    """Return what makes a suite read text as an imported teacher does; empty for others."""
    key = text_files_key(teacher)
    return {"vocabulary": key, "vocabulary_folder": str(teacher)} if key else {}
