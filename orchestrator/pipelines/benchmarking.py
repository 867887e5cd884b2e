"""Stage `benchmark`: what models cost on this machine, beside what the cost model says.

In go models, each under its own iteration schedule, or one IIET under several of its family; out
comes one measurement per model, batch size and context. It is written as JSON to the workspace,
under the hash of the models, the conditions and the machine, and shown in MLflow as one run per
model. A measurement is never taken from there again: whoever asks wants to know it now.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from iiet.decoder import Decoder
from iiet.pruning import schedule_family, spread_over_cost
from iiet.schedule import IterationSchedule
from orchestrator.evaluation.cost_measurement import (
    HOW_MEASURED,
    MeasuredCost,
    MeasurementSettings,
    device_name,
    measure_costs,
)
from orchestrator.evaluation.evaluated_model import EvaluatedModel, open_model, short_names
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import Tracking
from orchestrator.training.model_lookup import load_influence_table
from orchestrator.workspace.files import write_json
from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.provenance import content_key, environment

NUM_SCHEDULES = 5
"""Schedules of one IIET that are measured where none is named: full, none, and some between."""
SHORT_CONTEXT = 32
"""Tokens of the shorter prompt where none is named; the longer one is half the model's context."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """All measurements of one call."""

    costs: list[MeasuredCost]
    """Condition after condition, models in the order given."""
    conditions: MeasurementSettings
    """Batch sizes, contexts, repetitions, threads."""
    device: str
    """Where it was measured."""
    dtype: str
    """Of the weights."""
    path: Path
    """The file that holds it."""


def benchmark(
    models: Sequence[EvaluatedModel],
    workspace: Workspace,
    conditions: MeasurementSettings,
    *,
    tracking: Tracking | None = None,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Measure models side by side.

    Args:
        models: The models; those with the same weights share them.
        workspace: Where the result is written.
        conditions: Batch sizes, contexts, repetitions, threads.
        tracking: Where each model is shown as a run of its own.
        progress: Told how many measurements are done.

    Raises:
        UserError: If a model is no decoder or damaged, or a condition does not fit it.
    """
    progress = progress or Progress()
    names = short_names(models)
    decoders = dict(zip(names, _decoders(models), strict=True))
    some = next(iter(decoders.values()))
    costs = measure_costs(decoders, conditions, progress)
    device = device_name(some.device)
    keys = [list(model.key) for model in models]
    key = content_key("benchmark", keys, asdict(conditions), device, environment())
    result = BenchmarkResult(
        costs=costs,
        conditions=conditions,
        device=device,
        dtype=str(next(some.parameters()).dtype).removeprefix("torch."),
        path=workspace.benchmarks / f"{key}.json",
    )
    _write(result)
    progress.finish(f"{len(decoders)} models, {len(costs)} measurements")
    if tracking:
        for name, model in zip(names, models, strict=True):
            _track(tracking, model, [c for c in costs if c.model == name], result)
    return result


def family_of(model: EvaluatedModel) -> list[EvaluatedModel]:
    """Return an IIET under schedules from full to none; any other model alone.

    They are those that its influence table proposes, spread evenly over cost; without a table, the
    same number of corrections in all layers.
    """
    config = model.config
    if config is None or not config.corrections.num_corrections:
        return [model]
    influence = None if model.is_external else load_influence_table(model.path)
    if influence is not None and influence.schedule == config.corrections:
        family = schedule_family(influence)
        members = spread_over_cost(family, min(NUM_SCHEDULES, len(family)))
        schedules = [member.schedule for member in members]
    else:
        most = config.corrections.max_corrections
        lower = [IterationSchedule.uniform(config.num_layers, r) for r in range(most - 1, -1, -1)]
        schedules = [config.corrections, *lower]
    return [open_model(model.path, schedule) for schedule in schedules]


def usual_contexts(models: Sequence[EvaluatedModel], new_tokens: int) -> tuple[int, ...]:
    """Return a short prompt and one of half the context that all models read, as far as both fit
    with the new tokens behind them."""
    longest = min(model.context_length for model in models)
    wanted = sorted({min(SHORT_CONTEXT, longest // 2), longest // 2})
    fitting = tuple(context for context in wanted if 1 <= context <= longest - new_tokens)
    return fitting or (max(1, longest - new_tokens),)


def _decoders(models: Sequence[EvaluatedModel]) -> list[Decoder]:
    loaded: dict[Path, Decoder] = {}
    decoders: list[Decoder] = []
    for model in models:
        if model.path not in loaded:
            loaded[model.path] = model.decoder()
        assert model.config is not None, "EvaluatedModel.decoder refuses what is no decoder"
        decoders.append(loaded[model.path].with_schedule(model.config.corrections))
    return decoders


def _write(result: BenchmarkResult) -> None:
    machine: Mapping[str, object] = {**environment(), "cpus": os.cpu_count()}
    values = {
        "device": result.device,
        "dtype": result.dtype,
        "machine": machine,
        "conditions": asdict(result.conditions),
        "peak_bytes": HOW_MEASURED,
        "costs": [cost.to_dict() for cost in result.costs],
    }
    write_json(result.path, values)


def _track(
    tracking: Tracking,
    model: EvaluatedModel,
    costs: Sequence[MeasuredCost],
    result: BenchmarkResult,
) -> None:
    assert model.config is not None, "what was measured is a decoder"
    run = tracking.run(
        content_key("benchmark", list(model.key), asdict(result.conditions), result.device),
        name=f"benchmark {model.name}"[:80],
        kind="benchmark",
        params={
            "method": model.architecture,
            "schedule": model.config.corrections,
            "checkpoint": model.path,
            "device": result.device,
            "dtype": result.dtype,
            "num_threads": result.conditions.num_threads,
        },
    )
    for cost in costs:
        run.log_metrics(cost.metrics())
    run.finish()
