"""Say in words what trainings take: rows of a table, or sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.table import Table

from iiet.cost import num_parameters
from iiet.schedule import IterationSchedule
from orchestrator.data.preparation import ExpectedTokens
from orchestrator.planning.estimate import Estimate, Price
from orchestrator.terminal.render import (
    format_byte_parts,
    format_bytes,
    format_count,
    format_duration,
    format_duration_range,
)


def two_column_table(title: str | None, rows: Sequence[tuple[str, str]]) -> Table:
    """Return names and texts as a table."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("how much", overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    return table


def training_rows(
    training: Estimate, tokens: ExpectedTokens | None = None
) -> Iterator[tuple[str, str]]:
    """Yield what one training does, apart from its price."""
    recipe, config = training.recipe, training.config
    yield "parameters", f"{num_parameters(config):,}"
    if tokens:
        yield "vocabulary", f"{config.vocab_size:,} ({tokens.origin})"
    all_tokens = recipe.num_steps * recipe.num_tokens_per_step
    epochs = (
        f", {all_tokens / tokens.num_train_tokens:.3g} epochs of the prepared ones"
        if tokens and tokens.num_train_tokens
        else ""
    )
    yield (
        "tokens",
        f"{all_tokens:,} in {recipe.num_steps:,} steps of {recipe.num_tokens_per_step:,}{epochs}",
    )
    yield (
        "a step",
        f"{training.sequences_per_worker * training.devices.num_workers:,} sequences of "
        f"{config.context_length:,} tokens; {training.sequences_per_worker:,} for each worker, in "
        f"{format_count(training.num_passes, 'pass', 'passes')} of at most "
        f"{training.sequences_per_pass}",
    )
    if training.stages:
        stages = ", then ".join(
            f"{_corrections(schedule)} for {num_steps:,} steps"
            for schedule, num_steps in training.stages.items()
        )
        drawn = format_count(training.num_members, "cheaper schedule")
        beside = f"; with corrections, each step also trains {drawn}"
        yield "corrections", stages + (beside if training.num_members else "")
    yield "a checkpoint", format_bytes(training.checkpoint_bytes)


def price_rows(price: Price, problems: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Yield what trainings take, and whether they fit.

    Args:
        problems: Place -> why they do not fit there; None if they do.
    """
    if not price.num_trainings or price.rate is None:
        yield "to train", "nothing is left"
        return
    at_most = "at most " * price.is_upper_bound
    number = format_count(price.num_trainings, "training")
    count = f"{number}: " * (price.num_trainings > 1)
    read = price.num_teacher_tokens
    teacher = f", and the teacher reads {read:,}" * bool(read)
    yield (
        "to train",
        f"{at_most}{count}{price.num_tokens:,} tokens{teacher}; {price.flops:.3g} FLOPs",
    )
    rate = price.rate
    devices = format_count(price.num_devices, "GPU" if price.uses_gpus else "CPU")
    shares = " to ".join(dict.fromkeys(f"{100 * share:g}" for share in rate.shares))
    duration = format_duration_range(*(3600 * hours for hours in price.hours))
    yield (
        "time",
        f"{at_most}{duration} on {devices}, at {shares}% of "
        f"{rate.peak_flops / 1e12:,.3g} TFLOP/s each ({rate.source}); validation, saving and "
        "measuring come on top",
    )
    memory = sum(price.memory.values())
    many = f" of each of the {price.num_saving} that train at once" * (price.num_saving > 1)
    yield (
        "stop",
        f"at most {format_duration(price.stop_seconds)} after the step of the signal, to save two "
        f"checkpoints{many}",
    )
    yield "memory", f"{format_bytes(memory)} for each worker: {format_byte_parts(price.memory)}"
    free = "" if price.free_disk is None else f"; {format_bytes(price.free_disk)} are free"
    yield (
        "disk",
        f"at most {format_bytes(sum(price.disk.values()))}: {format_byte_parts(price.disk)}{free}",
    )
    for place, problem in problems.items():
        yield f"on {place}", problem or "it fits"


def _corrections(schedule: IterationSchedule) -> str:
    counts = set(schedule)
    return f"r = {counts.pop()}" if len(counts) == 1 else f"r = {schedule}"
