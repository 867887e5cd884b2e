"""Show the plan of a sweep in a terminal: a table of trials, and sentences about the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from typing import Literal

from rich import box
from rich.table import Table

from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.sweeping.remaining_cost import RemainingCost, TrialState
from orchestrator.sweeping.trials import (
    exact_cost,
    full_config,
    num_models,
)
from orchestrator.terminal.formatting import (
    format_bytes,
    format_count,
    format_flop_rates,
    format_hours_range,
)
from orchestrator.terminal.layout import ResponsiveLayout


def plan_table(plan: SweepPlan, states: Sequence[TrialState]) -> ResponsiveLayout:
    """Return a table of a plan's trials and their states; narrow terminals show fewer columns.

    Learning rates are shown if they differ.
    """
    without: list[set[str]] = [set()]
    for title in ("KV/token", "FLOPs", "thresholds", "rate"):
        without.append({*without[-1], title})
    return ResponsiveLayout(*(_plan_table(plan, states, titles) for titles in without))


def _plan_table(plan: SweepPlan, states: Sequence[TrialState], left_out: Container[str]) -> Table:
    rates = [trial.job.recipe.learning_rate if trial.job else None for trial in plan.trials]
    full = full_config(plan)
    costs = [exact_cost(state.trial.model, full) for state in states]
    columns = {
        "model": [state.trial.label for state in states],
        "thresholds": [state.trial.threshold_text for state in states],
        "rate": ["" if rate is None else f"{rate:g}" for rate in rates],
        "NFE": [f"{cost['evaluations']:.0f}" for cost in costs],
        "FLOPs": [f"{100 * cost['relative_flops']:.0f} %" for cost in costs],
        "KV/token": [format_bytes(cost["kv_bytes_per_token"]) for cost in costs],
        "state": [state.text for state in states],
    }
    if not any(columns["thresholds"]):
        del columns["thresholds"]
    if len(set(rates) - {None}) <= 1:
        del columns["rate"]
    columns = {title: cells for title, cells in columns.items() if title not in left_out}
    table = Table(title=f"Plan of {plan.name}", title_justify="left", box=box.SIMPLE_HEAD)
    for title in columns:
        justify: Literal["left", "right"] = (
            "left" if title in ("model", "thresholds", "state") else "right"
        )
        if title == "model":
            table.add_column(title, overflow="fold")
        else:
            table.add_column(title, justify=justify, no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def plan_sentences(
    plan: SweepPlan, noun: str, states: Sequence[TrialState], price: RemainingCost
) -> list[str]:
    """Say what was merged, what is reused, and what the rest costs.

    Args:
        plan: The sweep.
        noun: What `num_requested` counts, such as `threshold`.
        states: How far its trials are.
        price: Cost of what is left.
    """
    return [
        _asked_for(plan, noun),
        _found(states),
        *(_left_to_train(price) if price.flops else ["nothing is left to train"]),
    ]


def _asked_for(plan: SweepPlan, noun: str) -> str:
    made = "" if noun == "model" else " schedule" if plan.num_distinct == 1 else " schedules"
    text = (
        f"{format_count(plan.num_requested, noun)} asked for, {plan.num_distinct:,} distinct{made}"
    )
    num_seeds = len({trial.seed for trial in plan.trials if trial.seed is not None})
    text += f", each under {format_count(num_seeds, 'seed')}" if num_seeds else ""
    num_more = num_models(plan.trials) - plan.num_distinct
    return text + (f"; {num_more:,} more that the search suggested" if num_more else "")


def _found(states: Sequence[TrialState]) -> str:
    names = Counter(state.name for state in states)
    are = "is" if len(states) == 1 else "are"
    text = (
        f"{names['finished']:,} of {format_count(len(states), 'trial')} {are} finished and reused"
    )
    if num_stopped := names["stopped early"]:
        text += f", {num_stopped:,} stopped early and left so"
    if num_begun := sum(bool(state.steps_done) for state in states):
        text += f", {num_begun:,} partly trained"
    return text


def _left_to_train(price: RemainingCost) -> list[str]:
    num_teacher_tokens = price.num_teacher_tokens
    teacher = f", and the teacher reads {num_teacher_tokens:,}" if num_teacher_tokens else ""
    clock = "of one GPU" if price.uses_gpus else "of all CPUs here"
    written = [f"checkpoints of up to {format_bytes(price.checkpoint_bytes)}"]
    if price.teacher_bytes:
        written.append(f"the teacher's outputs, {format_bytes(price.teacher_bytes)}")
    return [
        f"left to train: {price.num_tokens:,} tokens{teacher}; {price.flops:.3g} FLOPs",
        f"time: {format_hours_range(price.hours, price.most_hours)} {clock}, at "
        f"{price.share:.0%} of {format_flop_rates(price.peak_flops, price.usual_flops)} "
        f"({price.of_what}); validation, saving and measuring come on top",
        f"to be written: {' and '.join(written)}",
    ]
