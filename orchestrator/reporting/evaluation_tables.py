"""Evaluations of several models side by side, with standard errors, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.table import Table

from orchestrator.records.evaluation import STDERR_SUFFIX, EvaluationResult
from orchestrator.terminal.render import ResponsiveLayout

AVERAGE = "average"


@dataclass(frozen=True)
class _MetricRow:
    """One metric of a task under every model, as texts."""

    task: str
    metric: str
    cells: list[str]
    num_items: str


def evaluation_table(evaluations: Mapping[str, EvaluationResult]) -> ResponsiveLayout:
    """Return every task's metrics: a column for each model, or on narrow terminals a row.

    The evaluations are by name of the model; their tasks may differ.
    """
    names, rows = list(evaluations), _metric_rows(list(evaluations.values()))
    heads = names if len(names) > 1 else ["value ± error"]
    return ResponsiveLayout(
        _model_columns(heads, rows, with_items=True),
        _model_columns(heads, rows, with_items=False),
        _grouped_by_task(heads, rows),
        _model_rows(names, rows),
    )


def average_notes(evaluations: Mapping[str, EvaluationResult]) -> list[str]:
    """Return sentences on averages that lack some of the requested tasks."""
    notes = []
    for name, evaluation in evaluations.items():
        if evaluation.skipped and evaluation.accuracies:
            of_model = f" of {name}" if len(evaluations) > 1 else ""
            notes.append(
                f"the average{of_model} is over {', '.join(evaluation.accuracies)}, without "
                f"{', '.join(evaluation.skipped)}"
            )
    return notes


def tasks_with_other_items(evaluations: Sequence[EvaluationResult]) -> list[str]:
    """Return the tasks whose items differ between the evaluations that include them."""
    items: dict[str, set[tuple[str, ...]]] = {}
    for evaluation in evaluations:
        for name, result in evaluation.results.items():
            items.setdefault(name, set()).add(tuple(result.items))
    return [name for name, kinds in items.items() if len(kinds) > 1]


def _metric_rows(models: Sequence[EvaluationResult]) -> list[_MetricRow]:
    rows = []
    for task in dict.fromkeys(name for model in models for name in model.results):
        results = [model.results.get(task) for model in models]
        measured = [result for result in results if result]
        for metric in dict.fromkeys(name for result in measured for name in result.metrics):
            if not metric.endswith(STDERR_SUFFIX):
                cells = [_cell(result.metrics if result else {}, metric) for result in results]
                # The average is over the marked metrics.
                mark = " *" if metric == measured[0].accuracy_metric else ""
                rows.append(_MetricRow(task, metric + mark, cells, f"{measured[0].num_items:,}"))
    averages = [model.quality() for model in models]
    if any("accuracy" in average for average in averages):
        cells = [_cell(average, "accuracy") for average in averages]
        num_items = max(model.num_accuracy_items for model in models)
        rows.append(_MetricRow(AVERAGE, "accuracy *", cells, f"{num_items:,}"))
    return rows


def _model_columns(heads: Sequence[str], rows: Sequence[_MetricRow], *, with_items: bool) -> Table:
    table = _table("task", "metric", numbers=[*heads, "items"] if with_items else heads)
    for row in rows:
        if row.task == AVERAGE:
            table.add_section()
        items = [row.num_items] if with_items else []
        table.add_row(row.task, row.metric, *row.cells, *items)
    return table


def _grouped_by_task(heads: Sequence[str], rows: Sequence[_MetricRow]) -> Table:
    table = _table("task", numbers=heads)
    for task, metrics in groupby(rows, key=lambda row: row.task):
        if task == AVERAGE:
            table.add_section()
        for number, row in enumerate(metrics):
            if not number:
                table.add_row(f"{task}: {row.num_items}")
            table.add_row(f"  {row.metric}", *row.cells)
    return table


def _model_rows(names: Sequence[str], rows: Sequence[_MetricRow]) -> Table:
    table = _table(numbers=["value ± error", "items"], folded="task")
    for task, metrics in groupby(rows, key=lambda row: row.task):
        if task == AVERAGE:
            table.add_section()
        for number, row in enumerate(metrics):
            if not number:
                table.add_row(task, "", row.num_items)
            if len(names) == 1:
                table.add_row(f"  {row.metric}", row.cells[0], "")
                continue
            table.add_row(f"  {row.metric}", "", "")
            for name, cell in zip(names, row.cells, strict=True):
                table.add_row(f"    {name}", cell, "")
    return table


def _table(*texts: str, numbers: Sequence[str], folded: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    if folded:
        table.add_column(folded, overflow="fold")
    for head in texts:
        table.add_column(head, no_wrap=True)
    for head in numbers:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _cell(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    error = metrics.get(name + STDERR_SUFFIX)
    # No-break spaces, so that narrow terminals fold the names and not the numbers.
    return _number(metrics[name]) + ("" if error is None else f"\u00a0±\u00a0{_number(error)}")


def _number(value: float) -> str:
    if abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.1f}" if abs(value) < 1e4 else f"{value:.3g}"
