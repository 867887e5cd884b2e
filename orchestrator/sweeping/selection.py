"""Which schedules of a teacher a sweep distills, out of what the influence says.

Two questions. Which family: the threshold's nested one, or the knapsack's best schedule at each of
its costs. And which of its members: those that given thresholds or budgets lead to, or a number of
them spread evenly over cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from iiet.influence import InfluenceTable
from iiet.pruning import (
    Cost,
    FamilyMember,
    knapsack,
    num_evaluations,
    schedule_family,
    spread_over_cost,
    within_cost,
)
from iiet.schedule import IterationSchedule
from orchestrator.settings import SweepSettings
from orchestrator.workspace.errors import UserError


def choose_members(
    influence: InfluenceTable,
    sweep: SweepSettings,
    *,
    cost: Cost = num_evaluations,
) -> tuple[FamilyMember, ...]:
    """Return the schedules of a threshold sweep, costliest first, each once.

    Args:
        influence: The teacher's table.
        sweep: Thresholds, budgets or a number of schedules; and the selection.
        cost: What budgets are counted in, and what the schedules are spread over.

    Returns:
        Members with the thresholds that lead to them; those of a knapsack have none (NaN).

    Raises:
        UserError: If a budget is less than the cheapest schedule costs, or the parts of the
            settings do not go together.
    """
    chosen = _of_family(schedule_family(influence), sweep, cost)
    if sweep.selection == "knapsack":
        best = _by_knapsack(influence, chosen, sweep, cost)
        return tuple(FamilyMember(s, math.nan, math.nan) for s in dict.fromkeys(best))
    return chosen


def _by_knapsack(
    influence: InfluenceTable, chosen: Sequence[FamilyMember], sweep: SweepSettings, cost: Cost
) -> Iterator[IterationSchedule]:
    """Yield the best schedule under each budget, costliest first; where there are none, at the
    evaluations of each member of the family."""
    if not sweep.budgets:
        for member in chosen:
            yield knapsack(influence, member.schedule.num_evaluations)
    for budget in sorted(sweep.budgets, reverse=True):
        yield knapsack(influence, budget, cost=cost)


def _of_family(
    family: Sequence[FamilyMember], sweep: SweepSettings, cost: Cost
) -> tuple[FamilyMember, ...]:
    if sweep.thresholds:
        wanted = {_at_threshold(family, threshold) for threshold in sweep.thresholds}
    elif sweep.budgets:
        wanted = {_within(family, budget, cost, sweep.budget_unit) for budget in sweep.budgets}
    else:
        return spread_over_cost(family, min(sweep.num_schedules, len(family)), cost=cost)
    return tuple(member for member in family if member.schedule in wanted)


def _at_threshold(family: Sequence[FamilyMember], threshold: float) -> IterationSchedule:
    return next(
        member.schedule
        for member in family
        if member.threshold_above < threshold <= member.threshold_up_to
    )


def _within(
    family: Sequence[FamilyMember], budget: float, cost: Cost, unit: str
) -> IterationSchedule:
    try:
        return within_cost(family, budget, cost=cost).schedule
    except ValueError as error:
        raise UserError(f"sweep.budgets, in {unit}: {error}") from None
