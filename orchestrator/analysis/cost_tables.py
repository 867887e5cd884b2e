"""What `benchmark` prints: costs under each condition, then predicted against measured shares."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from orchestrator.analysis.measured_cost import (
    DECODING,
    FIRST_TOKEN,
    GOAL,
    PREDICTION,
    SIMPLEST,
    Conditions,
    MeasuredCost,
)
from orchestrator.analysis.memory import HOW_MEASURED

CONDITION = "rows x prompt"


def all_tables(costs: Sequence[MeasuredCost]) -> list[Table]:
    """Return the table of costs, and those of shares where there are models to compare."""
    if len({cost.model for cost in costs}) < 2:
        return [cost_table(costs)]
    return [cost_table(costs), *(share_table(costs, part) for part in (DECODING, FIRST_TOKEN))]


def sentences(costs: Sequence[MeasuredCost]) -> list[str]:
    """Say how large the weights are, and how far the predictions are off."""
    sizes = dict.fromkeys(_mebibytes(cost.weight_bytes) for cost in costs)
    return [f"weights: {', '.join(sizes)} MiB, part of each peak", *residual_lines(costs)]


def cost_table(costs: Sequence[MeasuredCost]) -> Table:
    """Return time and memory, one row a model and condition; spreads are half quartile ranges."""
    table = _table("Milliseconds and MiB")
    for title in ("first token", "per token"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("tokens/s", "KV", "peak"):
        table.add_column(title, justify="right")
    for cost, ends in _with_ends(costs):
        table.add_row(
            _condition(cost),
            cost.model,
            f"{cost.first_token_ms:.2f} ± {cost.first_token_spread:.2f}",
            f"{cost.decode_ms:.2f} ± {cost.decode_spread:.2f}",
            f"{cost.tokens_per_second:,.0f}",
            _mebibytes(cost.kv_bytes),
            _mebibytes(cost.peak_bytes),
            end_section=ends,
        )
    return table


def share_table(costs: Sequence[MeasuredCost], part: str) -> Table:
    """Return shares of the full model's time in percent, predicted and measured.

    Args:
        costs: All models and conditions.
        part: Which time: a key of `MeasuredCost.shares`.
    """
    table = _table(f"Share of the full model's time, {part}, in percent")
    for title in ("measured", f"by {PREDICTION}", "off", "by evals", "off"):
        table.add_column(title, justify="right", min_width=max(map(len, title.split())))
    for cost, ends in _with_ends(costs):
        share = cost.shares[part]
        cells = []
        for prediction in (PREDICTION, SIMPLEST):
            cells.append(f"{100 * share.predicted[prediction]:.1f}")
            cells.append(f"{100 * share.residual(prediction):+.1f}\u00a0%")
        # Held together, so that narrow terminals fold the names and not the numbers.
        measured = f"{100 * share.measured:.1f}\u00a0±\u00a0{100 * share.spread:.1f}"
        table.add_row(_condition(cost), cost.model, measured, *cells, end_section=ends)
    return table


def conditions_line(conditions: Conditions, *, device: str, dtype: str) -> str:
    """Say in a sentence how it was measured."""
    threads = f"{conditions.num_threads} thread{'s' if conditions.num_threads > 1 else ''}"
    return (
        f"{device}, {dtype}, {threads}; medians ± half the quartile distance of "
        f"{conditions.repetitions} repetitions in turns after a warm-up; "
        f"{conditions.new_tokens} new tokens, greedy, cached; peak: {HOW_MEASURED}"
    )


def residual_lines(costs: Sequence[MeasuredCost]) -> list[str]:
    """Say in sentences how far the predictions are off; none where one model stands alone."""
    if len({cost.model for cost in costs}) < 2:
        return []
    lines = []
    for part in (DECODING, FIRST_TOKEN):
        shares = [cost.shares[part] for cost in costs]
        off = {
            prediction: max(abs(share.residual(prediction)) for share in shares)
            for prediction in (PREDICTION, SIMPLEST)
        }
        if off[PREDICTION] <= GOAL:
            verdict = "met"
        elif any(share.is_off() for share in shares):
            verdict = "missed"
        else:
            verdict = "not decided, the times spread too much; try more --repetitions"
        lines.append(
            f"{part}: {PREDICTION} predict every share within {100 * off[PREDICTION]:.1f} % of it "
            f"(goal {100 * GOAL:.0f} %: {verdict}), {SIMPLEST} alone within "
            f"{100 * off[SIMPLEST]:.1f} %"
        )
    return lines


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(CONDITION, max_width=len("8 x 1024"))
    table.add_column("model", overflow="fold")
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
