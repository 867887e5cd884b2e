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
from orchestrator.evaluation.measured_cost import (
    Conditions,
    MeasuredCost,
    device_name,
    measure_costs,
)
from orchestrator.evaluation.peak_memory import HOW_MEASURED
from orchestrator.evaluation.subject import Subject, open_subject, short_names
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import Tracking
from orchestrator.training.catalog import stored_influence
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
    conditions: Conditions
    """Batch sizes, contexts, repetitions, threads."""
    device: str
    """Where it was measured."""
    dtype: str
    """Of the weights."""
    path: Path
    """The file that holds it."""


def benchmark(
    subjects: Sequence[Subject],
    workspace: Workspace,
    conditions: Conditions,
    *,
    tracking: Tracking | None = None,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Measure models side by side.

    Args:
        subjects: The models; those with the same weights share them.
        workspace: Where the result is written.
        conditions: Batch sizes, contexts, repetitions, threads.
        tracking: Where each model is shown as a run of its own.
        progress: Told how many measurements are done.

    Raises:
        UserError: If a model is no decoder or damaged, or a condition does not fit it.
    """
    progress = progress or Progress()
    names = short_names(subjects)
    decoders = dict(zip(names, _decoders(subjects), strict=True))
    some = next(iter(decoders.values()))
    costs = measure_costs(decoders, conditions, progress)
    device = device_name(some.device)
    keys = [list(subject.key) for subject in subjects]
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
        for name, subject in zip(names, subjects, strict=True):
            _track(tracking, subject, [c for c in costs if c.model == name], result)
    return result


def family_of(subject: Subject) -> list[Subject]:
    """Return an IIET under schedules from full to none; any other model alone.

    They are those that its influence table proposes, spread evenly over cost; without a table, the
    same number of corrections in all layers.
    """
    config = subject.config
    if config is None or not config.corrections.num_corrections:
        return [subject]
    influence = None if subject.is_foreign else stored_influence(subject.path)
    if influence is not None and influence.schedule == config.corrections:
        family = schedule_family(influence)
        members = spread_over_cost(family, min(NUM_SCHEDULES, len(family)))
        schedules = [member.schedule for member in members]
    else:
        most = config.corrections.max_corrections
        lower = [IterationSchedule.uniform(config.num_layers, r) for r in range(most - 1, -1, -1)]
        schedules = [config.corrections, *lower]
    return [open_subject(subject.path, schedule) for schedule in schedules]


def usual_contexts(subjects: Sequence[Subject], new_tokens: int) -> tuple[int, ...]:
    """Return a short prompt and one of half the context that all models read, as far as both fit
    with the new tokens behind them."""
    longest = min(subject.context_length for subject in subjects)
    wanted = sorted({min(SHORT_CONTEXT, longest // 2), longest // 2})
    fitting = tuple(context for context in wanted if 1 <= context <= longest - new_tokens)
    return fitting or (max(1, longest - new_tokens),)


def _decoders(subjects: Sequence[Subject]) -> list[Decoder]:
    loaded: dict[Path, Decoder] = {}
    decoders: list[Decoder] = []
    for subject in subjects:
        if subject.path not in loaded:
            loaded[subject.path] = subject.decoder()
        assert subject.config is not None, "Subject.decoder refuses what is no decoder"
        decoders.append(loaded[subject.path].with_schedule(subject.config.corrections))
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
    tracking: Tracking, subject: Subject, costs: Sequence[MeasuredCost], result: BenchmarkResult
) -> None:
    assert subject.config is not None, "what was measured is a decoder"
    run = tracking.run(
        content_key("benchmark", list(subject.key), asdict(result.conditions), result.device),
        name=f"benchmark {subject.name}"[:80],
        kind="benchmark",
        params={
            "method": subject.architecture,
            "schedule": subject.config.corrections,
            "checkpoint": subject.path,
            "device": result.device,
            "dtype": result.dtype,
            "num_threads": result.conditions.num_threads,
        },
    )
    for cost in costs:
        run.log_metrics(cost.metrics())
    run.finish()
