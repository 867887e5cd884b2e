"""Table that `iiet-orch pretrain --dry-run` prints: tokens, FLOPs, time, memory, disk."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from iiet.schedule import IterationSchedule
from orchestrator.planning.fit import needed_memory
from orchestrator.planning.pretraining_estimate import THIS_MACHINE, PretrainingEstimate
from orchestrator.planning.training_rate import TrainingRate
from orchestrator.terminal.formatting import (
    format_bytes,
    format_count,
    format_flop_rates,
    format_hours_range,
)


def pretraining_plan_table(found: PretrainingEstimate, rate: TrainingRate) -> Table:
    """Return the plan as a table, one row for each resource."""
    device = "GPU" if found.settings.cluster.num_gpus else "CPU worker"
    workers = format_count(found.training.num_workers, device)
    table = Table(
        title=f"Plan: {found.settings.model.preset} {found.training.config.method}, {workers}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=False,
    )
    table.add_column("what", no_wrap=True)
    table.add_column("how much", overflow="fold")
    for name, text in _rows(found, rate):
        table.add_row(name, text)
    return table


def _rows(found: PretrainingEstimate, rate: TrainingRate) -> Iterator[tuple[str, str]]:
    estimate, tokens = found.training, found.tokens
    recipe, config = estimate.recipe, estimate.config
    yield "parameters", f"{estimate.num_parameters:,}"
    yield "vocabulary", f"{config.vocab_size:,} ({tokens.origin})"
    epochs = (
        f", {estimate.num_tokens / tokens.num_train_tokens:.3g} epochs of the prepared ones"
        if tokens.num_train_tokens
        else ""
    )
    yield (
        "tokens",
        f"{estimate.num_tokens:,} in {recipe.num_steps:,} steps of {recipe.num_tokens_per_step:,}"
        f"{epochs}",
    )
    yield (
        "a step",
        f"{estimate.sequences_per_worker * estimate.num_workers:,} sequences of "
        f"{config.context_length:,} tokens; {estimate.sequences_per_worker:,} for each worker, in "
        f"{format_count(estimate.num_passes, 'pass', 'passes')} of at most "
        f"{estimate.sequences_per_pass}",
    )
    yield (
        "corrections",
        ", then ".join(
            f"{_corrections(stage.schedule)} for {stage.num_steps:,} steps"
            for stage in estimate.stages
        ),
    )
    yield "training FLOPs", f"{estimate.training_flops:.3g}"
    least, most = (estimate.hours(peak * rate.utilization) for peak in rate.flops_range)
    yield (
        "time",
        f"{format_hours_range(least, most)} at {rate.utilization:.0%} of "
        f"{format_flop_rates(*rate.flops_range)} a worker ({rate.peak_source}); "
        "validation and saving come on top",
    )
    memory, snapshot = estimate.memory, estimate.snapshot_bytes
    copy = f", a copy for the checkpoint {format_bytes(snapshot)}" if snapshot else ""
    yield (
        "memory",
        f"{format_bytes(needed_memory(estimate))} for each worker: weights "
        f"{format_bytes(memory.weights)}, "
        f"gradients {format_bytes(memory.gradients)}, AdamW {format_bytes(memory.optimizer)}, "
        f"activations {format_bytes(memory.activations)}{copy}, and what PyTorch takes",
    )
    yield (
        "checkpoints",
        f"{format_bytes(estimate.checkpoint_bytes)} each, {format_bytes(estimate.disk_bytes)} "
        "with all that are kept",
    )
    if tokens.new_bytes:
        yield "token files", f"about {format_bytes(tokens.new_bytes)}, to be written"
    for place, problem in found.problems.items():
        is_known = found.is_memory_known or place != THIS_MACHINE
        fits = "it fits" if is_known else "enough disk; the cluster's memory is unknown"
        yield f"on {place}", problem or fits


def _corrections(schedule: IterationSchedule) -> str:
    counts = set(schedule)
    return f"r = {counts.pop()}" if len(counts) == 1 else f"r = {schedule}"
