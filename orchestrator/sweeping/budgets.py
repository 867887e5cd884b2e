"""What a schedule costs in the unit of a sweep's budgets, by the shape of its model alone."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.pruning import Cost, num_evaluations
from iiet.schedule import IterationSchedule
from orchestrator.settings import SweepSettings
from orchestrator.workspace.errors import UserError


def cost_in(unit: str, full: ModelConfig) -> Cost:
    """Return what schedules of a model cost per token.

    Args:
        unit: `evaluations`, `flops` or `kv` (bytes).
        full: The model that the schedules are of.
    """
    if unit == "evaluations":
        return num_evaluations

    @lru_cache
    def counted(schedule: IterationSchedule) -> float:
        cost = inference_cost(replace(full, schedule=schedule))
        return float(cost.decode_flops_per_token if unit == "flops" else cost.kv_bytes_per_token)

    return counted


def check_budgets(sweep: SweepSettings, full: ModelConfig) -> None:
    """Check that every budget pays for a model without corrections.

    Args:
        sweep: Budgets and their unit.
        full: The model that the schedules are of.

    Raises:
        UserError: Names those that do not.
    """
    least = cost_in(sweep.budget_unit, full)(full.corrections.none(full.num_layers))
    short = [f"{budget:g}" for budget in sweep.budgets if budget < least]
    if short:
        raise UserError(
            f"sweep.budgets: no schedule costs at most {' or '.join(short)} {sweep.budget_unit}; "
            f"the cheapest costs {least:,.10g}"
        )
