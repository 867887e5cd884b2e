"""Tables and sentences of `benchmark`: measured costs, and predicted against measured shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from orchestrator.evaluation.cost_measurement import (
    DECODING,
    FIRST_TOKEN,
    HOW_MEASURED,
    PREDICTION,
    SIMPLEST,
    MeasuredCost,
    MeasurementSettings,
)
from orchestrator.terminal.render import ResponsiveLayout, format_count

Columns = Sequence[tuple[str, Callable[[MeasuredCost], str]]]


def cost_and_share_tables(costs: Sequence[MeasuredCost]) -> list[ResponsiveLayout]:
    """Return the table of costs, and those of shares if there is more than one model."""
    tables = [cost_table(costs)]
    if _num_models(costs) > 1:
        tables += [share_table(costs, DECODING), share_table(costs, FIRST_TOKEN)]
    return tables


def cost_table(costs: Sequence[MeasuredCost]) -> ResponsiveLayout:
    """Return time and memory, a row for each model and condition; errors are half quartile ranges.

    On narrow terminals these are two tables.
    """
    times: Columns = [
        ("first token", lambda cost: f"{cost.first_token_ms:.2f} ± {cost.first_token_spread:.2f}"),
        ("per token", lambda cost: f"{cost.decode_ms:.2f} ± {cost.decode_spread:.2f}"),
    ]
    others: Columns = [
        ("tokens/s", lambda cost: f"{cost.tokens_per_second:,.0f}"),
        ("KV", lambda cost: _mebibytes(cost.kv_bytes)),
        ("peak", lambda cost: _mebibytes(cost.peak_bytes)),
    ]
    return ResponsiveLayout(
        _table("Milliseconds and MiB", costs, [*times, *others]),
        Group(_table("Milliseconds", costs, times), _table("Speed and MiB", costs, others)),
    )


def share_table(costs: Sequence[MeasuredCost], phase: str) -> ResponsiveLayout:
    """Return shares of the full model's time in percent, predicted and measured.

    `phase` is a key of `MeasuredCost.shares`.
    """

    def measured(cost: MeasuredCost) -> str:
        share = cost.shares[phase]
        return f"{100 * share.measured:.1f} ± {100 * share.spread:.1f}"

    def predicted(prediction: str) -> Callable[[MeasuredCost], str]:
        return lambda cost: f"{100 * cost.shares[phase].predicted[prediction]:.1f}"

    def error(prediction: str) -> Callable[[MeasuredCost], str]:
        return lambda cost: f"{cost.shares[phase].residual(prediction):+.1%}"

    columns: Columns = [
        ("measured", measured),
        (f"by {PREDICTION}", predicted(PREDICTION)),
        ("off", error(PREDICTION)),
        ("by NFE", predicted(SIMPLEST)),
        ("off", error(SIMPLEST)),
    ]
    title = f"Share of the full model's time, {phase}, in percent"
    return ResponsiveLayout(_table(title, costs, columns), _table(title, costs, columns[:3]))


def benchmark_sentences(costs: Sequence[MeasuredCost]) -> list[str]:
    """Return sentences on the size of the weights and the errors of the predictions."""
    sizes = dict.fromkeys(_mebibytes(cost.weight_bytes) for cost in costs)
    weights = f"weights: {', '.join(sizes)} MiB, part of each peak"
    return [weights, *prediction_error_sentences(costs)]


def prediction_error_sentences(costs: Sequence[MeasuredCost]) -> list[str]:
    """Return sentences on the errors of the predictions; none if there is only one model."""
    if _num_models(costs) < 2:
        return []
    sentences = []
    for phase in (DECODING, FIRST_TOKEN):
        errors = {
            prediction: max(abs(cost.shares[phase].residual(prediction)) for cost in costs)
            for prediction in (PREDICTION, SIMPLEST)
        }
        sentences.append(
            f"{phase}: {PREDICTION} predict every share within {errors[PREDICTION]:.1%} "
            f"of it, {SIMPLEST} alone within {errors[SIMPLEST]:.1%}"
        )
    return sentences


def conditions_sentence(conditions: MeasurementSettings, *, device: str, dtype: str) -> str:
    """Return a sentence on how the costs were measured."""
    return (
        f"{device}, {dtype}, {format_count(conditions.num_threads, 'thread')}; medians ± half the "
        f"quartile distance of {conditions.repetitions} repetitions in turns after a warm-up; "
        f"{conditions.new_tokens} new tokens, greedy, cached; peak: {HOW_MEASURED}"
    )


def _table(title: str, costs: Sequence[MeasuredCost], columns: Columns) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("rows x\nprompt", no_wrap=True)
    table.add_column("model", overflow="fold")
    for head, _ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    conditions = [f"{cost.batch_size} x {cost.context}" for cost in costs]
    for cost, condition, following in zip(costs, conditions, [*conditions[1:], ""], strict=True):
        # A line after the last model of each condition.
        is_last = _num_models(costs) > 1 and condition != following
        cells = [cell(cost) for _, cell in columns]
        table.add_row(condition, cost.model, *cells, end_section=is_last)
    return table


def _num_models(costs: Sequence[MeasuredCost]) -> int:
    return len({cost.model for cost in costs})


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f}"
