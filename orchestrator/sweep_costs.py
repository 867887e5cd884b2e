"""What a schedule costs in the unit that a sweep's budgets are counted in.

Evaluations, FLOPs and KV bytes follow from the shape. Milliseconds are measured on this machine,
once: they are kept in the workspace, so that the same command chooses the same schedules again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.decoder import Decoder
from iiet.pruning import Cost, num_evaluations
from iiet.schedule import IterationSchedule
from orchestrator.analysis.benchmark import SWEEP_NEW_TOKENS, time_per_token
from orchestrator.console import Progress
from orchestrator.errors import UserError
from orchestrator.provenance import content_key, environment
from orchestrator.settings import SweepSettings
from orchestrator.workspace import Workspace, read_measured, write_json


def cost_in(
    unit: str,
    full: ModelConfig,
    family: Sequence[IterationSchedule],
    workspace: Workspace,
    progress: Progress,
) -> Cost:
    """Return what schedules cost in a unit.

    Args:
        unit: `evaluations`, `flops`, `kv` (bytes) or `ms`, each of one token.
        full: The model that the schedules are of.
        family: Schedules that milliseconds are measured under; those of others lie on the straight
            lines between them, by evaluations.
        workspace: Where measured times are kept.
        progress: Told how far the measuring is.
    """
    if unit == "ms":
        points = _measured(full, family, workspace, progress)
        evaluations, times = zip(*points, strict=True)
        return lambda schedule: float(np.interp(schedule.num_evaluations, evaluations, times))

    return _exact_cost(unit, full)


def check_budgets(sweep: SweepSettings, full: ModelConfig) -> None:
    """Check that every budget pays for a model without corrections; milliseconds are not known yet.

    Args:
        sweep: Budgets and their unit.
        full: The model that the schedules are of.

    Raises:
        UserError: Names those that do not.
    """
    if sweep.budget_unit == "ms":
        return
    least = _exact_cost(sweep.budget_unit, full)(full.corrections.none(full.num_layers))
    short = [f"{budget:g}" for budget in sweep.budgets if budget < least]
    if short:
        raise UserError(
            f"sweep.budgets: no schedule costs at most {' or '.join(short)} {sweep.budget_unit}; "
            f"the cheapest costs {least:,.10g}"
        )


def _exact_cost(unit: str, full: ModelConfig) -> Cost:
    if unit == "evaluations":
        return num_evaluations

    @lru_cache
    def counted(schedule: IterationSchedule) -> float:
        cost = inference_cost(replace(full, schedule=schedule))
        return float(cost.decode_flops_per_token if unit == "flops" else cost.kv_bytes_per_token)

    return counted


def _measured(
    full: ModelConfig,
    family: Sequence[IterationSchedule],
    workspace: Workspace,
    progress: Progress,
) -> list[tuple[int, float]]:
    """Return evaluations and milliseconds, rising; the values of the weights have no say."""
    names = [str(schedule) for schedule in family]
    path = _path(full, names, workspace)
    times = read_measured(
        path,
        lambda found: {name: float(found[name]) for name in names} if found else None,
        progress.note,
    )
    if not times:
        decoders = {str(s): Decoder(replace(full, schedule=s)) for s in family}
        timings = time_per_token(decoders, progress)
        times = {name: timing.median for name, timing in timings.items()}
        write_json(path, times)
    by_cost: dict[int, float] = {}
    for schedule in sorted(family, key=num_evaluations):
        # A cheaper schedule that was measured slower, by chance, shall not cost more.
        least = max(by_cost.values(), default=0.0)
        by_cost[schedule.num_evaluations] = max(least, times[str(schedule)])
    return sorted(by_cost.items())


def _path(full: ModelConfig, names: Sequence[str], workspace: Workspace) -> Path:
    key = content_key("time per token", full.to_dict(), names, environment(), SWEEP_NEW_TOKENS)
    return workspace.benchmarks / f"schedules-{key}.json"
