"""Evaluations side by side, with standard errors, as a terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.table import Table

from orchestrator.records.evaluation import STDERR_SUFFIX, EvaluationResult
from orchestrator.terminal.layout import ResponsiveLayout


@dataclass(frozen=True)
class _Measured:
    """One metric of a task under every model, as texts."""

    task: str
    metric: str
    cells: list[str]
    num_items: str


def evaluation_table(evaluations: Mapping[str, EvaluationResult]) -> ResponsiveLayout:
    """Return every task's metrics with their standard errors: one column a model, or where these
    are too wide, one line a model.

    Args:
        evaluations: Name of the model to what was measured; the tasks may differ.
    """
    names, rows = list(evaluations), _measured(list(evaluations.values()))
    return ResponsiveLayout(
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
            if not metric.endswith(STDERR_SUFFIX):
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


def average_notes(evaluations: Mapping[str, EvaluationResult]) -> list[str]:
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
    error = metrics.get(name + STDERR_SUFFIX)
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
