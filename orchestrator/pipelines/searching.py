"""From settings and a workspace to a search: the threshold's students, and the sampler behind."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from iiet.cost import training_flops_per_token
from iiet.influence import InfluenceTable
from iiet.pruning import FamilyMember
from iiet.schedule import IterationSchedule
from orchestrator.pipelines.context import Desk
from orchestrator.pipelines.sweep_plans import plan_thresholds
from orchestrator.settings import Settings
from orchestrator.sweeping.checks import check_sweep
from orchestrator.sweeping.search import ScheduleSearch, search_plan
from orchestrator.sweeping.students import student_trial
from orchestrator.sweeping.trials import PlannedTrial, SweepPlan
from orchestrator.training.checkpoint import load_config


def plan_search(
    settings: Settings,
    desk: Desk,
    teacher: Path,
    *,
    influence: InfluenceTable | None = None,
    baselines: Iterable[tuple[str, Path]] | None = None,
    name: str | None = None,
) -> tuple[SweepPlan, ScheduleSearch]:
    """Plan what a search starts with, and make the search that goes on from there.

    Args:
        settings: As those of a threshold sweep, and section `search`.
        desk: Workspace, tracking and terminal.
        teacher: Checkpoint of the full model.
        influence: Its influence, if it is at hand.
        baselines: As those of a threshold sweep.
        name: Name of the sweep; made from its content when unset.

    Raises:
        UserError: If something does not go together.
    """
    check_sweep(settings, "search")
    family = plan_thresholds(settings, desk, teacher, influence=influence, baselines=baselines)
    suite, full = family.trials[0].suite, load_config(teacher)

    def make_trial(schedule: IterationSchedule) -> PlannedTrial:
        member = FamilyMember(schedule, math.nan, math.nan)
        config = replace(full, schedule=schedule)
        return student_trial(settings, desk.workspace, teacher, config, member, suite)

    search = ScheduleSearch(family, full.corrections, settings.search, make_trial)
    return search_plan(family, settings.search, name), search


def search_price(plan: SweepPlan, search: ScheduleSearch, settings: Settings) -> list[str]:
    """Say in sentences what a search may still train, and what that costs at most."""
    full = plan.trials[0].config()
    recipe = settings.distillation.training
    tokens = recipe.num_steps * recipe.num_tokens_per_step
    # A third of a training step more where the frozen teacher runs forward.
    flops = tokens * training_flops_per_token(full) * 4 / 3
    wanted, left = search.num_wanted, search.num_left
    if not wanted:
        return ["the search has nothing to try beside the family"]
    told = [
        f"the search tries at most {wanted:,} more of {search.num_schedules:,} schedules; which "
        f"ones follows from the results, {left:,} are not known yet"
    ]
    if left:
        told.append(
            f"each of these trains once, on {tokens:,} tokens: at most {flops:.3g} FLOPs, "
            f"{left * flops:.3g} together"
        )
    return told
