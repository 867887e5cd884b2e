"""A comparison of two models as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from orchestrator.reporting.comparison import ComparedScore, Comparison
from orchestrator.reporting.comparison_findings import format_p_value, format_score
from orchestrator.terminal.render import ResponsiveLayout


def comparison_table(comparison: Comparison) -> ResponsiveLayout:
    """Return a row for each task and average; narrow terminals show fewer columns.

    The columns `A` and `B` are the two models, `b` and `c` the items that only A, and only B, gets
    right.
    """
    rows = (*comparison.tasks, *comparison.averages)
    section_after = len(comparison.tasks) if comparison.averages else None
    layouts = [_table(rows, section_after, names) for names in _LAYOUTS]
    return ResponsiveLayout(*layouts)


_INTERVAL = "95 % interval"
_LAYOUTS = (
    ("metric", "A", "B", "B - A", _INTERVAL, "items", "left out", "b", "c", "p"),
    ("metric", "A", "B", "B - A", _INTERVAL, "items", "p"),
    ("A", "B", "B - A", _INTERVAL, "items", "p"),
    ("A", "B", "B - A", "p"),
    ("B - A", "p"),
)


def _table(
    rows: tuple[ComparedScore, ...], section_after: int | None, names: tuple[str, ...]
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for name in names:
        is_text = name == "metric"
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for number, row in enumerate(rows):
        if number == section_after:
            table.add_section()
        cells = _cells(row)
        table.add_row(row.task, *(cells[name] for name in names))
    return table


def _cells(row: ComparedScore) -> dict[str, str]:
    def score(value: float, *, is_difference: bool = False) -> str:
        return format_score(value, is_accuracy=row.is_accuracy, is_difference=is_difference)

    low, high = (
        score(end, is_difference=True) for end in (row.difference.low, row.difference.high)
    )
    test = row.mcnemar
    return {
        "metric": f"{row.metric}, %" if row.is_accuracy else row.metric,
        "A": score(row.first),
        "B": score(row.second),
        "B - A": score(row.difference.value, is_difference=True),
        _INTERVAL: f"{low} to {high}",
        "items": f"{row.num_items:,}",
        "left out": f"{row.num_left_out:,}",
        "b": f"{test.only_first:,}" if test else "",
        "c": f"{test.only_second:,}" if test else "",
        "p": format_p_value(test.p_value) if test else "",
    }
