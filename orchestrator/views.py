"""What commands print beside the front: plans with their price, evaluations with their errors,
influence tables.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table

from iiet.influence import InfluenceTable
from orchestrator.analysis.evaluation import STDERR, EvaluationResult
from orchestrator.console import FirstThatFits
from orchestrator.estimate_view import durations, teraflops
from orchestrator.plan import SweepPlan, exact_cost, full_config, num_models
from orchestrator.plan_price import PlanPrice, TrialState
from orchestrator.training.fitting import gib


def plan_table(plan: SweepPlan, states: Sequence[TrialState]) -> FirstThatFits:
    """Return a plan's trials with how far they are, in their order; with their learning rates where
    these differ. Narrow terminals show fewer columns.
    """
    without: list[set[str]] = [set()]
    for title in ("KV/token", "FLOPs", "thresholds", "rate"):
        without.append({*without[-1], title})
    return FirstThatFits(*(_plan_table(plan, states, titles) for titles in without))


def _plan_table(plan: SweepPlan, states: Sequence[TrialState], left_out: Container[str]) -> Table:
    rates = [trial.job["recipe"]["learning_rate"] if trial.job else None for trial in plan.trials]
    full = full_config(plan)
    costs = [exact_cost(state.trial.config(), full) for state in states]
    columns = {
        "model": [state.trial.label for state in states],
        "thresholds": [state.trial.threshold_text for state in states],
        "rate": ["" if rate is None else f"{rate:g}" for rate in rates],
        "evals": [f"{cost['evaluations']:.0f}" for cost in costs],
        "FLOPs": [f"{100 * cost['relative_flops']:.0f} %" for cost in costs],
        "KV/token": [gib(cost["kv_bytes_per_token"]) for cost in costs],
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
    plan: SweepPlan, noun: str, states: Sequence[TrialState], price: PlanPrice
) -> list[str]:
    """Say what was merged, what is reused, and what the rest costs.

    Args:
        plan: The sweep.
        noun: What `num_requested` counts, such as `threshold`.
        states: How far its trials are.
        price: Of what is left.
    """
    return [
        _asked_for(plan, noun),
        _found(states),
        *(_left_to_train(price) if price.flops else ["nothing is left to train"]),
    ]


def _asked_for(plan: SweepPlan, noun: str) -> str:
    made = "" if noun == "model" else " schedule" if plan.num_distinct == 1 else " schedules"
    text = f"{counted(plan.num_requested, noun)} asked for, {plan.num_distinct:,} distinct{made}"
    num_seeds = len({trial.seed for trial in plan.trials if trial.seed is not None})
    text += f", each under {counted(num_seeds, 'seed')}" if num_seeds else ""
    num_more = num_models(plan.trials) - plan.num_distinct
    return text + (f"; {num_more:,} more that the search suggested" if num_more else "")


def _found(states: Sequence[TrialState]) -> str:
    names = Counter(state.name for state in states)
    are = "is" if len(states) == 1 else "are"
    text = f"{names['finished']:,} of {counted(len(states), 'trial')} {are} finished and reused"
    if num_stopped := names["stopped early"]:
        text += f", {num_stopped:,} stopped early and left so"
    if num_begun := sum(bool(state.steps_done) for state in states):
        text += f", {num_begun:,} partly trained"
    return text


def _left_to_train(price: PlanPrice) -> list[str]:
    told = price.num_teacher_tokens
    teacher = f", and the teacher reads {told:,}" if told else ""
    clock = "of one GPU" if price.uses_gpus else "of all CPUs here"
    written = [f"checkpoints of up to {gib(price.checkpoint_bytes)}"]
    if price.teacher_bytes:
        written.append(f"the teacher's answers, {gib(price.teacher_bytes)}")
    return [
        f"left to train: {price.num_tokens:,} tokens{teacher}; {price.flops:.3g} FLOPs",
        f"time: {durations(price.hours, price.most_hours)} {clock}, at {price.share:.0%} of "
        f"{teraflops(price.peak_flops, price.usual_flops)} ({price.of_what}); validation, saving "
        "and measuring come on top",
        f"to be written: {' and '.join(written)}",
    ]


def counted(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class _Measured:
    """One metric of a task under every model, as texts."""

    task: str
    metric: str
    cells: list[str]
    num_items: str


def evaluation_table(evaluations: Mapping[str, EvaluationResult]) -> FirstThatFits:
    """Return every task's metrics with their standard errors: one column a model, or where these
    are too wide, one line a model.

    Args:
        evaluations: Name of the model to what was measured; the tasks may differ.
    """
    names, rows = list(evaluations), _measured(list(evaluations.values()))
    return FirstThatFits(
        _side_by_side(names, rows),
        _side_by_side(names, rows, with_items=False),
        _grouped(names, rows),
        _stacked(names, rows),
    )


def _measured(models: Sequence[EvaluationResult]) -> list[_Measured]:
    rows = []
    tasks = dict.fromkeys(name for model in models for name in model.results)
    for task in tasks:
        results = [model.results.get(task) for model in models]
        known = [result for result in results if result]
        for metric in dict.fromkeys(name for result in known for name in result.metrics):
            if not metric.endswith(STDERR):
                cells = [
                    _metric_cell(result.metrics if result else {}, metric) for result in results
                ]
                # The one that the average counts.
                mark = " *" if metric == known[0].accuracy_metric else ""
                rows.append(_Measured(task, metric + mark, cells, f"{known[0].num_items:,}"))
    averages = [model.quality() for model in models]
    if any("accuracy" in average for average in averages):
        cells = [_metric_cell(average, "accuracy") for average in averages]
        num_items = max(model.num_accuracy_items for model in models)
        rows.append(_Measured("average", "accuracy *", cells, f"{num_items:,}"))
    return rows


def _side_by_side(
    names: Sequence[str], rows: Sequence[_Measured], *, with_items: bool = True
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for name in names if len(names) > 1 else ["value ± error"]:
        table.add_column(name, justify="right", no_wrap=True)
    if with_items:
        table.add_column("items", justify="right", no_wrap=True)
    for row in rows:
        if row.task == "average":
            table.add_section()
        items = [row.num_items] if with_items else []
        table.add_row(row.task, row.metric, *row.cells, *items)
    return table


def _grouped(names: Sequence[str], rows: Sequence[_Measured]) -> Table:
    """Return a table whose first column holds the task, with its items, above its metrics."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    for name in names if len(names) > 1 else ["value ± error"]:
        table.add_column(name, justify="right", no_wrap=True)
    for task, metrics in groupby(rows, key=lambda row: row.task):
        if task == "average":
            table.add_section()
        for number, row in enumerate(metrics):
            if not number:
                table.add_row(f"{task}: {row.num_items}")
            table.add_row(f"  {row.metric}", *row.cells)
    return table


def _stacked(names: Sequence[str], rows: Sequence[_Measured]) -> Table:
    """Return a table whose first column holds task, metric and model, each a step further in."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for title in ("value ± error", "items"):
        table.add_column(title, justify="right", no_wrap=True)
    task = ""
    for row in rows:
        if row.task != task:
            if row.task == "average":
                table.add_section()
            table.add_row(row.task, "", row.num_items)
            task = row.task
        if len(names) == 1:
            table.add_row(f"  {row.metric}", row.cells[0], "")
            continue
        table.add_row(f"  {row.metric}", "", "")
        for name, cell in zip(names, row.cells, strict=True):
            table.add_row(f"    {name}", cell, "")
    return table


def about_average(evaluations: Mapping[str, EvaluationResult]) -> list[str]:
    """Say which tasks an average is over, where some that were asked for are not in it."""
    sentences = []
    for name, found in evaluations.items():
        if found.skipped and found.accuracies:
            of_model = f" of {name}" if len(evaluations) > 1 else ""
            sentences.append(
                f"the average{of_model} is over {', '.join(found.accuracies)}, without "
                f"{', '.join(found.skipped)}"
            )
    return sentences


def _metric_cell(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    error = metrics.get(name + STDERR)
    # Held together, so that narrow terminals fold the names and not the numbers.
    return _number(metrics[name]) + ("" if error is None else f"\u00a0±\u00a0{_number(error)}")


def _number(value: float) -> str:
    if abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.1f}" if abs(value) < 1e4 else f"{value:.3g}"


def tasks_with_other_items(evaluations: Sequence[EvaluationResult]) -> list[str]:
    """Return the tasks whose items are not the same in all evaluations that have them."""
    items: dict[str, set[tuple[str, ...]]] = {}
    for evaluation in evaluations:
        for name, result in evaluation.results.items():
            items.setdefault(name, set()).add(tuple(result.items))
    return [name for name, kinds in items.items() if len(kinds) > 1]


def influence_view(influence: InfluenceTable) -> Group:
    """Return an influence table, one row a layer, with standard errors, and under it the residuals
    and the contraction factors; of many corrections in parts below each other where they do not fit
    beside each other.
    """
    most = influence.schedule.max_corrections
    numbers = [f"correction {number}" for number in range(1, most + 1)]
    values = [
        [_with_error(value, error) for value, error in zip(*rows, strict=True)]
        for rows in zip(influence.value_rows, influence.error_rows, strict=True)
    ]
    title = f"Influence ({influence.metric}, {influence.num_tokens:,} tokens)"
    parts = [_by_layer(title, numbers, values)]
    if influence.residual_rows:  # Tables of earlier versions have none.
        residuals = [
            [*(f"{value:.2g}" for value in row), *[""] * (most - len(row)), _factor(contraction)]
            for row, contraction in zip(
                influence.residual_rows, influence.contractions, strict=True
            )
        ]
        title = "Residual |g(e) - e| / |g(e)|, and its contraction factor"
        parts.append(_by_layer(title, [*numbers, "contraction"], residuals))
    return Group(*parts)


def _by_layer(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> FirstThatFits:
    """Return a table with a row for each layer, in as few parts as the width allows."""

    def part(first: int, count: int) -> Table:
        table = Table(title=None if first else title, title_justify="left", box=box.SIMPLE_HEAD)
        for head in ("layer", *heads[first : first + count]):
            table.add_column(head, justify="right", no_wrap=True)
        for layer, cells in enumerate(rows, start=1):
            table.add_row(str(layer), *cells[first : first + count])
        return table

    layouts = (
        Group(*(part(first, count) for first in range(0, len(heads), count)))
        for count in range(len(heads), 0, -1)
    )
    return FirstThatFits(*layouts)


def _factor(contraction: float) -> str:
    return "" if math.isnan(contraction) else f"{contraction:.2g}"


def _with_error(value: float, error: float) -> str:
    """Write an error with two significant digits, and the value as far as these reach."""
    if math.isnan(error):  # A single batch has none.
        return f"{value:.2g}"
    digits = 2
    if value and error:
        digits += max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(error)))
    return f"{value:.{digits}g}\u00a0±\u00a0{error:.2g}"
