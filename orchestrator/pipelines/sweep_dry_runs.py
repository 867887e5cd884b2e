"""Dry runs of sweeps: the trials, what is finished, and what the rest costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas

from iiet.cost import training_flops_per_token
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.sweep_plans import (
    SweepModel,
    check_arguments,
    plan_iterations,
    plan_students,
    plan_suite,
    plan_teacher,
    teacher_checkpoint,
)
from orchestrator.planning.fit import request_of
from orchestrator.planning.trial_gpus import assign_trial_gpus
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial
from orchestrator.settings import Settings
from orchestrator.sweeping.asha import asha_trials
from orchestrator.sweeping.checks import check_sweep
from orchestrator.sweeping.model_plans import (
    TEACHER,
    ScratchModel,
    iterations_plan,
    max_num_students,
)
from orchestrator.sweeping.plan_table import plan_sentences
from orchestrator.sweeping.remaining_cost import (
    TrialState,
    estimate_remaining_cost,
    requested_noun,
    trial_states,
)
from orchestrator.sweeping.search import ScheduleSearch
from orchestrator.sweeping.trials import (
    exact_cost,
    full_config,
)
from orchestrator.terminal.formatting import format_count
from orchestrator.terminal.progress import Progress
from orchestrator.training.job import finished_outcome
from orchestrator.workspace.folders import Workspace


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
        full = full_config(self.plan)
        rows = []
        for state in self.states:
            config = state.trial.model
            row = {"name": state.trial.label, "role": state.trial.role, "method": config.method}
            row |= {"schedule": str(config.corrections), "state": state.name}
            rows.append({**row, "steps_done": state.steps_done, **exact_cost(config, full)})
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

    If the teacher is not trained yet, its influence and so the schedules are unknown. The plan is
    then that of its training, and a sentence says how many students there will be at most.

    Args:
        settings, teacher, models: As in `sweep`.

    Raises:
        UserError: If the settings do not go together.
    """
    context = open_context(workspace, progress)
    check_arguments(settings, teacher, models)
    check_sweep(settings, context.progress)
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
    plan, _, search = plan_students(settings, context, teacher, name=name)
    if search is None:
        return dry_run_of(plan, settings, context)
    found: list[Trial] = []
    if all(trial.result() for trial in plan.trials if trial.role == "trial"):
        found = search.known_trials()
    plan = plan.model_copy(update={"trials": (*plan.trials, *found)})
    return dry_run_of(plan, settings, context, *_search_price(plan, search, settings))


def _dry_run_of_pretraining(
    settings: Settings, context: Context, tokens: Path, jobs: Mapping[str, TrainingJob]
) -> SweepDryRun:
    config = jobs[TEACHER].model
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
    """Return how far a plan's trials are, and what the rest costs; `more` are further sentences."""
    states = trial_states(plan, settings.sweep)
    price = estimate_remaining_cost(plan, states, settings, context.workspace.teachers)
    lines = plan_sentences(plan, requested_noun(plan, settings.sweep), states, price)
    if settings.trials_use_gpus:
        jobs = [s.trial.job for s in states if s.name == "to train" and s.trial.job]
        requests = [request_of(job) for job in jobs]
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
    flops = tokens * training_flops_per_token(plan.trials[0].model) * 4 / 3
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
