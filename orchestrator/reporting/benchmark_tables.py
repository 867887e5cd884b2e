"""What `benchmark` prints: costs under each condition, then predicted against measured shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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
from orchestrator.terminal.layout import ResponsiveLayout

Columns = Sequence[tuple[str, Callable[[MeasuredCost], str]]]

CONDITION = "rows x\nprompt"


def cost_and_share_tables(costs: Sequence[MeasuredCost]) -> list[ResponsiveLayout]:
    """Return the table of costs, and those of shares where there are models to compare."""
    if len({cost.model for cost in costs}) < 2:
        return [cost_table(costs)]
    return [cost_table(costs), *(share_table(costs, part) for part in (DECODING, FIRST_TOKEN))]


def benchmark_sentences(costs: Sequence[MeasuredCost]) -> list[str]:
    """Say how large the weights are, and how far the predictions are off."""
    sizes = dict.fromkeys(_mebibytes(cost.weight_bytes) for cost in costs)
    return [
        f"weights: {', '.join(sizes)} MiB, part of each peak",
        *prediction_error_sentences(costs),
    ]


def cost_table(costs: Sequence[MeasuredCost]) -> ResponsiveLayout:
    """Return time and memory, one row a model and condition; spreads are half quartile ranges.
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


def share_table(costs: Sequence[MeasuredCost], part: str) -> ResponsiveLayout:
    """Return shares of the full model's time in percent, predicted and measured.

    Args:
        costs: All models and conditions.
        part: Which time: a key of `MeasuredCost.shares`.
    """
    columns = [("measured", partial(_measured, part=part))]
    for prediction, title in ((PREDICTION, f"by {PREDICTION}"), (SIMPLEST, "by NFE")):
        columns.append((title, partial(_predicted, part=part, prediction=prediction)))
        columns.append(("off", partial(_off, part=part, prediction=prediction)))
    title = f"Share of the full model's time, {part}, in percent"
    return ResponsiveLayout(_table(title, costs, columns), _table(title, costs, columns[:3]))


def _measured(cost: MeasuredCost, *, part: str) -> str:
    share = cost.shares[part]
    return f"{100 * share.measured:.1f} ± {100 * share.spread:.1f}"


def _predicted(cost: MeasuredCost, *, part: str, prediction: str) -> str:
    return f"{100 * cost.shares[part].predicted[prediction]:.1f}"


def _off(cost: MeasuredCost, *, part: str, prediction: str) -> str:
    return f"{100 * cost.shares[part].residual(prediction):+.1f} %"


def conditions_sentence(conditions: MeasurementSettings, *, device: str, dtype: str) -> str:
    """Say in a sentence how it was measured."""
    threads = f"{conditions.num_threads} thread{'s' if conditions.num_threads > 1 else ''}"
    return (
        f"{device}, {dtype}, {threads}; medians ± half the quartile distance of "
        f"{conditions.repetitions} repetitions in turns after a warm-up; "
        f"{conditions.new_tokens} new tokens, greedy, cached; peak: {HOW_MEASURED}"
    )


def prediction_error_sentences(costs: Sequence[MeasuredCost]) -> list[str]:
    """Return sentences on how far the predictions are off; none if there is only one model."""
    if len({cost.model for cost in costs}) < 2:
        return []
    lines = []
    for part in (DECODING, FIRST_TOKEN):
        shares = [cost.shares[part] for cost in costs]
        off = {
            prediction: max(abs(share.residual(prediction)) for share in shares)
            for prediction in (PREDICTION, SIMPLEST)
        }
        lines.append(
            f"{part}: {PREDICTION} predict every share within {100 * off[PREDICTION]:.1f} % of it, "
            f"{SIMPLEST} alone within {100 * off[SIMPLEST]:.1f} %"
        )
    return lines


def _table(title: str, costs: Sequence[MeasuredCost], columns: Columns) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(CONDITION, no_wrap=True)
    table.add_column("model", overflow="fold")
    for head, _ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for cost, ends in _with_ends(costs):
        cells = [cell(cost) for _, cell in columns]
        table.add_row(_condition(cost), cost.model, *cells, end_section=ends)
    return table


def _condition(cost: MeasuredCost) -> str:
    return f"{cost.batch_size} x {cost.context}"


def _with_ends(costs: Sequence[MeasuredCost]) -> list[tuple[MeasuredCost, bool]]:
    """Pair each with whether it is the last of several under its condition."""
    has_several = len({cost.model for cost in costs}) > 1
    following = [*map(_condition, costs[1:]), None]
    return [
        (cost, has_several and _condition(cost) != after)
        for cost, after in zip(costs, following, strict=True)
    ]


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f}"
