"""Measure latency, throughput and memory of models, and compare them with the cost model.

Measurements are written as JSON to the workspace, under the hash of the models, the conditions and
the machine, and are shown in MLflow as one run per model. Every call measures again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, computed_field
from rich.console import RenderableType

from iiet.iiad.pruning import schedule_family, spread_over_cost
from iiet.model.schedule import IterationSchedule
from orchestrator.cluster.work import command_executor
from orchestrator.evaluation import decode_timing
from orchestrator.models.folder import served_schedules
from orchestrator.models.lookup import load_influence_table
from orchestrator.models.open import OpenedModel, by_label, open_models
from orchestrator.pipelines.context import Context, open_context
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.reporting import command_tables
from orchestrator.reporting.output import Plan, Result
from orchestrator.reporting.sections import two_column_table
from orchestrator.settings import ClusterSettings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import join_names
from orchestrator.workspace.files import write_json
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import Workspace, find_workspace
from orchestrator.workspace.provenance import content_key, timing_environment

NUM_SCHEDULES = 5
"""Schedules of one IIET that are measured by default, from full to none."""
USUAL_NEW_TOKENS = 32
"""Tokens decoded by default."""
SHORT_CONTEXT = 32
"""Tokens of the shorter default prompt; the longer one is half the model's context."""


class BenchmarkPlan(Plan):
    """Models, each under its schedule, and the conditions of the measurement."""

    opened: dict[str, OpenedModel] = Field(exclude=True)
    """By the labels of the result."""
    cluster: ClusterSettings = Field(exclude=True)
    conditions: decode_timing.MeasurementSettings
    """Batch sizes, contexts, repetitions, threads."""
    trust_remote_code: bool = Field(default=False, exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(self.opened)

    def shown(self) -> Iterable[RenderableType]:
        """Return the models' names and the conditions."""
        rows = [("models", join_names(self.models))]
        for name, value in asdict(self.conditions).items():
            text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            rows.append((name.replace("_", " "), text))
        yield two_column_table("Plan of the benchmark", rows)


class BenchmarkResult(Result):
    """All measurements of one call."""

    path: Path
    """The file that holds it."""
    device: str
    """CPU or GPU of the measurement."""
    dtype: str
    """Type of the weights."""
    machine: dict[str, Any]
    """Versions and hardware."""
    conditions: decode_timing.MeasurementSettings
    """Batch sizes, contexts, repetitions, threads."""
    peak_bytes: str = decode_timing.HOW_MEASURED
    """How memory was measured."""
    costs: list[decode_timing.MeasuredCost]
    """By condition, then by model in the order given."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per model, batch size and context."""
        rows = []
        for cost in self.costs:
            row = asdict(cost)
            for phase, share in row.pop("shares").items():
                row[f"{phase.replace(' ', '_')}_share"] = share["measured"]
            rows.append(row)
        return rows

    def shown(self) -> Iterable[RenderableType]:
        """Return the tables of costs and shares, and sentences on them."""
        yield from command_tables.cost_and_share_tables(self.costs)
        for sentence in command_tables.benchmark_sentences(self.costs):
            yield f"  {sentence}"
        conditions = command_tables.conditions_sentence(
            self.conditions, device=self.device, dtype=self.dtype
        )
        yield f"  {conditions}"
        yield f"  written to {self.path}"


def plan_benchmark(
    *,
    workspace: Workspace | Path | str | None = None,
    models: Sequence[Path | str] = (),
    schedules: Sequence[str] = (),
    conditions: decode_timing.MeasurementSettings | None = None,
    cluster: ClusterSettings | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> BenchmarkPlan:
    """Open the models, and choose schedules and contexts; arguments and errors as `benchmark`."""
    space = find_workspace(workspace)
    note = (progress or Progress()).note
    opened = open_models(models, space, schedules, note=note)
    if len(opened) == 1 and not schedules:
        opened = family_of(opened[0])
    conditions = conditions or decode_timing.MeasurementSettings(contexts=(), new_tokens=0)
    if not conditions.contexts:
        usual = usual_contexts(opened, conditions.new_tokens)
        conditions = replace(conditions, contexts=usual)
    if not conditions.new_tokens:
        room = min(model.context_length for model in opened) - max(conditions.contexts)
        conditions = replace(conditions, new_tokens=max(2, min(USUAL_NEW_TOKENS, room)))
    labelled = by_label(opened)
    conditions.check({label: model.context_length for label, model in labelled.items()})
    return BenchmarkPlan(
        opened=labelled,
        conditions=conditions,
        cluster=cluster or ClusterSettings(),
        trust_remote_code=trust_remote_code,
    )


def run_benchmark(plan: BenchmarkPlan, context: Context) -> BenchmarkResult:
    """Measure latency, throughput and memory of models side by side.

    Models with the same weights share them in memory.
    """
    executor = command_executor(plan.cluster, context.workspace.root)
    started_ms = now_ms()
    context.progress.start("benchmark")  # Loading models takes time.
    conditions = plan.conditions
    measure = partial(_measure, plan)
    costs, device, dtype = executor.run(measure, context.progress)
    keys = [list(model.key) for model in plan.opened.values()]
    machine = timing_environment()
    key = content_key("benchmark", keys, asdict(conditions), device, machine)
    result = BenchmarkResult(
        path=context.workspace.benchmarks / f"{key}.json",
        device=device,
        dtype=dtype,
        machine=machine,
        conditions=conditions,
        costs=costs,
    )
    # Without its path, because the workspace may be moved.
    write_json(result.path, result.model_dump(mode="json", exclude={"path"}))
    context.progress.finish(f"{len(plan.models)} models, {len(costs)} measurements")
    for name, model in plan.opened.items():
        metrics: dict[str, float] = {}
        for cost in costs:
            if cost.model == name:
                metrics |= cost.metrics()
        context.log_measurement(
            TrackedRun.of(
                key=content_key("benchmark", list(model.key), asdict(conditions), device, machine),
                name=f"benchmark {model.label}"[:80],
                kind="benchmark",
                params={
                    **model.parameters(),
                    "checkpoint": model.path,
                    "device": device,
                    "dtype": dtype,
                    "num_threads": conditions.num_threads,
                },
                metrics=metrics,
            ),
            started_ms,
        )
    return result


def benchmark(
    *,
    workspace: Workspace | Path | str | None = None,
    models: Sequence[Path | str] = (),
    schedules: Sequence[str] = (),
    conditions: decode_timing.MeasurementSettings | None = None,
    cluster: ClusterSettings | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Measure latency, throughput and memory of models side by side.

    Args:
        models: Checkpoints or runs, by path or name, or model folders; when empty, the
            newest of finished runs and the last pick.
        schedules: Iteration schedules or depths as typed. When empty, a single IIET is measured
            under schedules from full to none, and several models each under their own.
        conditions: Batch sizes, contexts, repetitions, threads. Empty contexts mean a short prompt
            and half the models' context; 0 new tokens mean 32, or fewer if only these fit.
        cluster: Where they are measured; see `command_executor`.
        trust_remote_code: Whether code in a model folder may run.

    Raises:
        UserError: If a model is missing or damaged, or a condition does not fit it.
    """
    plan = plan_benchmark(
        workspace=workspace,
        models=models,
        schedules=schedules,
        conditions=conditions,
        cluster=cluster,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return run_benchmark(plan, open_context(workspace, progress))


def family_of(model: OpenedModel) -> list[OpenedModel]:
    """Return an IIET under schedules from full to none; any other model by itself.

    The schedules are those of elastic training, or those of the influence table, spread evenly over
    cost. Without both, all layers make the same number of corrections.
    """
    config = model.config
    if config is None or not config.corrections.num_corrections:
        return [model]
    influence = None if model.is_external else load_influence_table(model.path)
    served = served_schedules(model.path)
    if len(served) > 1 and config.corrections == served[0]:
        schedules = list(served)
    elif influence is not None and influence.schedule == config.corrections:
        family = schedule_family(influence)
        members = spread_over_cost(family, min(NUM_SCHEDULES, len(family)))
        schedules = [member.schedule for member in members]
    else:
        most = config.corrections.max_corrections
        lower = [IterationSchedule.uniform(config.num_layers, r) for r in range(most - 1, -1, -1)]
        schedules = [config.corrections, *lower]
    return [model.with_schedule(schedule) for schedule in schedules]


def usual_contexts(models: Sequence[OpenedModel], new_tokens: int) -> tuple[int, ...]:
    """Return the lengths of a short prompt and of half the shortest context, if new tokens fit."""
    longest = min(model.context_length for model in models)
    usual = sorted({min(SHORT_CONTEXT, longest // 2), longest // 2})
    fitting = tuple(context for context in usual if 1 <= context <= longest - new_tokens)
    return fitting or (max(1, longest - new_tokens),)


def _measure(
    plan: BenchmarkPlan, device: str, progress: Progress
) -> tuple[list[decode_timing.MeasuredCost], str, str]:
    """Return the costs, the name of the device, and the dtype of the weights."""
    decoders = decode_timing.load_side_by_side(
        plan.opened, device, trust_remote_code=plan.trust_remote_code
    )
    costs = decode_timing.measure_costs(decoders, plan.conditions, progress)
    first_decoder = next(iter(decoders.values()))  # All have the same device and dtype.
    dtype_name = str(next(first_decoder.parameters()).dtype).removeprefix("torch.")
    device_name = str(first_decoder.device)
    if first_decoder.device.type == "cuda":
        device_name = torch.cuda.get_device_name(first_decoder.device)
    return costs, device_name, dtype_name
