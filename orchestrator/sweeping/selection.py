"""Choose which schedules of a teacher a sweep distills, by its influence table.

The family is the threshold's nested one, or the knapsack's best schedule at each cost. Its members
are those of given thresholds or budgets, or a number of them spread evenly over cost.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from iiet.config import ModelConfig
from iiet.cost import inference_cost
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
        cost: Unit of the budgets, and the scale over which schedules are spread.

    Returns:
        Members with the thresholds that give them; those of a knapsack have none (NaN).

    Raises:
        UserError: If a budget is less than the cheapest schedule costs.
    """
    family = schedule_family(influence)
    if sweep.thresholds:
        wanted = {
            member.schedule
            for threshold in sweep.thresholds
            for member in family
            if member.threshold_above < threshold <= member.threshold_up_to
        }
    elif sweep.budgets:
        try:
            wanted = {within_cost(family, most, cost=cost).schedule for most in sweep.budgets}
        except ValueError as error:
            raise UserError(f"sweep.budgets, in {sweep.budget_unit}: {error}") from None
    else:
        number = min(sweep.num_schedules, len(family))
        wanted = {member.schedule for member in spread_over_cost(family, number, cost=cost)}
    chosen = tuple(member for member in family if member.schedule in wanted)
    if sweep.selection != "knapsack":
        return chosen
    # The best schedule under each budget, or else at the cost of each chosen member.
    if sweep.budgets:
        budgets = sorted(sweep.budgets, reverse=True)
        best = [knapsack(influence, budget, cost=cost) for budget in budgets]
    else:
        best = [knapsack(influence, member.schedule.num_evaluations) for member in chosen]
    return tuple(FamilyMember(schedule, math.nan, math.nan) for schedule in dict.fromkeys(best))


def schedule_cost(unit: str, full: ModelConfig) -> Cost:
    """Return the function that computes the cost per token of a model's schedules.

    Its unit is `evaluations`, `flops` or `kv` (bytes).
    """
    if unit == "evaluations":
        return num_evaluations

    @lru_cache
    def counted(schedule: IterationSchedule) -> float:
        cost = inference_cost(replace(full, schedule=schedule))
        return float(cost.decode_flops_per_token if unit == "flops" else cost.kv_bytes_per_token)

    return counted


def check_budgets(sweep: SweepSettings, full: ModelConfig) -> None:
    """Check that every budget is enough for a model without corrections.

    Raises:
        UserError: Names the budgets that are not.
    """
    least = schedule_cost(sweep.budget_unit, full)(full.corrections.none(full.num_layers))
    short = [f"{budget:g}" for budget in sweep.budgets if budget < least]
    if short:
        raise UserError(
            f"sweep.budgets: no schedule costs at most {' or '.join(short)} {sweep.budget_unit}; "
            f"the cheapest costs {least:,.10g}"
        )
