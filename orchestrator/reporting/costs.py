"""What the models of a sweep cost: exact counts, and milliseconds, which are measured once, or
again if that is asked for.

Milliseconds depend on the shapes of the models only. So the weights are random, all schedules of
one shape share them, and models of one shape under one schedule are measured once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from iiet.cost import inference_cost
from iiet.model.config import ModelConfig
from orchestrator.cluster.work import sweep_executor
from orchestrator.planning.machine import installed_gpus
from orchestrator.records.metrics import COST, METRICS
from orchestrator.records.record import Record
from orchestrator.records.trial import SweepTrials, Trial, teacher_or_costliest
from orchestrator.settings import Settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.provenance import content_key, timing_environment

TIMES_NAME = "times.json"


class StoredCosts(Record):
    """Milliseconds that were measured on one machine."""

    state: str
    """Hash of what the numbers depend on: shapes, the kind of device, this machine and its
    libraries."""
    by_name: dict[str, dict[str, float]]
    """Key of a shape, which several models may share -> its costs."""


def with_costs(
    trials: Sequence[Trial],
    plan: SweepTrials,
    folder: Path,
    settings: Settings,
    progress: Progress,
    *,
    again: bool = False,
) -> list[Trial]:
    """Add what each model costs: exact counts, and milliseconds; `again` replaces stored ones."""
    from orchestrator.evaluation.decode_timing import SWEEP_NEW_TOKENS  # Imports PyTorch.

    full = full_trial(plan).model
    counted = [trial.with_numbers("cost", exact_cost(trial.model, full)) for trial in trials]
    shape_of = {trial.key: content_key(trial.model.to_dict()) for trial in counted}
    gpus = []
    if settings.trials_use_gpus:
        # The name is that of this machine's GPU: nothing is known here of one in another node.
        gpus = ["GPU", *(gpu.name for gpu in installed_gpus()[:1])]
    shapes = sorted(set(shape_of.values()))
    state = content_key(shapes, timing_environment(), SWEEP_NEW_TOKENS, *gpus)
    path = folder / TIMES_NAME
    costs = StoredCosts.read(path)
    if again or costs is None or costs.state != state:
        models = {shape_of[trial.key]: trial.model for trial in counted}
        progress.start("time per token")  # A GPU may have to be waited for.
        by_shape = sweep_executor(settings, folder).run(partial(_time, models), progress)
        costs = StoredCosts(state=state, by_name=by_shape)
        costs.write(path)
    return [trial.with_numbers("cost", costs.by_name[shape_of[trial.key]]) for trial in counted]


def _time(
    models: Mapping[str, ModelConfig], device: str, progress: Progress
) -> dict[str, dict[str, float]]:
    from orchestrator.evaluation.decode_timing import random_decoders, time_per_token

    return time_per_token(random_decoders(models, device), progress)


def exact_cost(config: ModelConfig, full: ModelConfig) -> dict[str, float]:
    """Return the cost of a model in all units that follow from shapes, and relative to `full`."""
    cost = inference_cost(config)
    full_cost = inference_cost(full)
    return {
        **{
            name.removeprefix(COST): getattr(cost, metric.counted_as)
            for name, metric in METRICS.items()
            if metric.counted_as
        },
        "relative_evaluations": cost.evaluations_per_token / full_cost.evaluations_per_token,
        "relative_flops": cost.decode_flops_per_token / full_cost.decode_flops_per_token,
    }


def full_trial(plan: SweepTrials) -> Trial:
    """Return the trial that the others are compared with; see `teacher_or_costliest`."""
    full = teacher_or_costliest(
        plan.trials,
        role=lambda trial: trial.role,
        cost=lambda trial: inference_cost(trial.model).evaluations_per_token,
    )
    assert full is not None, "a plan has trials"
    return full
