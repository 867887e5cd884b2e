"""The front as rows for people: in the terminal, in Markdown, in the page.

One list of columns serves all: rounded numbers with their errors, cheapest first. The terminal's
table drops columns from the least telling on until it fits, and shortens long schedules by counting
repetitions (`3*4,1*20`), which is also how they are typed. Machines read `analysis.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table

from orchestrator.reporting.bootstrap import INTERVAL_LEVEL
from orchestrator.reporting.front_axes import is_accuracy, metric_title
from orchestrator.reporting.front_text import (
    confidence_text,
    difference_text,
    full_name,
    model_name,
    quality_text,
    range_text,
    verdict,
)
from orchestrator.reporting.pareto import KEPT_SHARE, Front, FrontPoint, PairedComparison
from orchestrator.terminal.formatting import format_with_error


@dataclass(frozen=True)
class FrontColumn:
    """One column as people read it."""

    title: str
    """What stands above it."""
    cell: Callable[[Front, FrontPoint], str]
    """Text of a cell; empty where there is nothing to say."""
    priority: int = 0
    """Columns of the highest numbers go first when room is short; 0 stays."""
    justify: Literal["left", "right"] = "right"


def front_columns(front: Front) -> list[FrontColumn]:
    """Return the columns of a front's table: what the models are, cost, quality, verdict."""
    quality = front.axes.quality
    columns = [
        FrontColumn("schedule", lambda _, p: model_name(p), justify="left"),
        FrontColumn("threshold", lambda _, p: _threshold(p), 6),
        *_cost_columns(front.axes.cost),
        FrontColumn(_short_title(quality), lambda f, p: quality_text(f, p)),
        FrontColumn("bits/byte", lambda _, p: _number(p, "quality/bits_per_byte", ".3f"), 5),
        FrontColumn("of full", lambda f, p: _percent(f.share(p), 1), 2),
        FrontColumn(f"vs {front.basis.full if front.basis else 'full'}", _difference, 8),
        FrontColumn(f"P({KEPT_SHARE:.0%})", _keeps, 9),
        FrontColumn("P(front)", _on_front, 10),
        FrontColumn("front", lambda f, p: verdict(f, p), justify="left"),
    ]
    if front.sweep_of:
        columns.insert(
            1, FrontColumn("sweep", lambda f, p: f.sweep_of[p.result.key], justify="left")
        )
    if quality == "quality/bits_per_byte":
        columns = [column for column in columns if column.priority != 5]
    return [c for c in columns if not c.priority or any(c.cell(front, p) for p in front.points)]


def terminal_table(front: Front, *, width: int, title: str = "") -> Table:
    """Return the table of a front for a terminal, cheapest first; dim rows are dominated.

    Args:
        front: What to show.
        width: Columns of the terminal.
        title: Stands above the table.
    """
    columns = front_columns(front)
    while _width_of(front, columns) > width and any(column.priority for column in columns):
        columns.remove(max(columns, key=lambda column: column.priority))
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = "left"
    for number, column in enumerate(columns):
        # Where even that is too wide, only the names are cut.
        least = None if number == 0 else _cells_of(front, column)
        table.add_column(column.title, justify=column.justify, no_wrap=True, min_width=least)
    for point in front.points:
        table.add_row(*(column.cell(front, point) for column in columns), style=_style(point))
    return table


def markdown_table(front: Front) -> str:
    """Return the table of a front in Markdown; members of the front are bold."""
    columns = front_columns(front)
    lines = [
        "| " + " | ".join(column.title for column in columns) + " |",
        "|" + "|".join(" ---: " if c.justify == "right" else " --- " for c in columns) + "|",
    ]
    for point in front.points:
        cells = [column.cell(front, point) for column in columns]
        if point.on_front:
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _cost_columns(axis: str) -> list[FrontColumn]:
    """Return the costs that are always of interest, and the one that the front lies on."""
    columns = {
        "cost/evaluations": FrontColumn("evals", lambda _, p: _number(p, "cost/evaluations", "g")),
        "cost/relative_flops": FrontColumn(
            "FLOPs", lambda _, p: _percent(p.result.value("cost/relative_flops"), 0), 4
        ),
        "cost/kv_bytes_per_token": FrontColumn(
            "KV/token", lambda _, p: _bytes(p.result.value("cost/kv_bytes_per_token")), 7
        ),
        "cost/decode_ms_per_token": FrontColumn(
            "ms/token", lambda _, p: _number(p, "cost/decode_ms_per_token", ".2f"), 3
        ),
    }
    if axis in columns:
        columns[axis] = replace(columns[axis], priority=0)
        return list(columns.values())
    return [
        FrontColumn(_short_title(axis), lambda _, p: _number(p, axis, ".4g")),
        *columns.values(),
    ]


def _short_title(name: str) -> str:
    short = {"quality/accuracy": "accuracy %", "quality/bits_per_byte": "bits/byte"}
    short |= {"quality/validation_loss": "loss", "cost/flops_per_token": "FLOPs/token"}
    return short.get(name, metric_title(name))


def _number(point: FrontPoint, name: str, form: str) -> str:
    value = point.result.value(name)
    return "" if value is None else f"{value:{form}}"


def _difference(front: Front, point: FrontPoint) -> str:
    """Return the paired difference to the full model; empty for that one itself."""
    sure = point.confidence
    if sure is None or sure.overall is None or front.basis is None:
        return ""
    found = sure.overall.against.get(front.basis.full)
    return difference_text(found, is_percent=is_accuracy(front.axes.quality)) if found else ""


def _on_front(_: Front, point: FrontPoint) -> str:
    return "" if point.confidence is None else confidence_text(point.confidence.on_front)


def _keeps(front: Front, point: FrontPoint) -> str:
    # The full model keeps all of itself, which says nothing.
    sure = point.confidence
    return "" if sure is None or point is front.full else confidence_text(sure.keeps)


def _threshold(point: FrontPoint) -> str:
    """Return the largest threshold that gives the schedule: what one would type to get it."""
    text = point.result.threshold_text
    return text if text.startswith(">") else text.removeprefix("<=").rpartition(" to ")[2]


def _percent(share: float | None, digits: int) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}%"


def _bytes(count: float | None) -> str:
    if count is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024 or unit == "MiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def _style(point: FrontPoint) -> str:
    if not point.is_candidate:
        return "cyan"
    if point.on_front:
        return "bold"
    return "" if point.result.role == "teacher" else "dim"


def _width_of(front: Front, columns: Sequence[FrontColumn]) -> int:
    """Return the terminal cells that the table takes: two behind each column, one before all."""
    return sum(_cells_of(front, column) + 2 for column in columns) + 1


def _cells_of(front: Front, column: FrontColumn) -> int:
    texts = [column.title, *(column.cell(front, point) for point in front.points)]
    return max(cell_len(text) for text in texts)


TASK_TABLES_NOTE = (
    f"Scores with the range that {INTERVAL_LEVEL:.0%} of the draws fall in, and differences over "
    "the same items with theirs; of an accuracy in points. A range without zero is a difference "
    "that these items can tell."
)


@dataclass(frozen=True)
class TaskTable:
    """One task under every model."""

    title: str
    """The task and its metric."""
    heads: tuple[str, ...]
    """Titles of the columns."""
    rows: tuple[tuple[FrontPoint, tuple[str, ...]], ...]
    """Model and its cells, cheapest first."""


def task_tables(front: Front) -> list[TaskTable]:
    """Return the average, then every task; nothing where no values of single items are at hand."""
    if front.basis is None:
        return []
    quality = front.axes.quality
    tables = [
        _table(
            front,
            metric_title(quality),
            lambda point: point.confidence.overall if point.confidence else None,
            is_percent=is_accuracy(quality),
        )
    ]
    if len(front.basis.metrics) > 1 or not tables[0].rows:
        tables += [_of_task(front, name, metric) for name, metric in front.basis.metrics.items()]
    return [table for table in tables if table.rows]


def task_table_markdown(table: TaskTable) -> str:
    """Return a task's table in Markdown."""
    lines = ["| " + " | ".join(table.heads) + " |"]
    lines.append("| --- |" + " ---: |" * (len(table.heads) - 1))
    for _, cells in table.rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _of_task(front: Front, task: str, metric: str) -> TaskTable:
    def compared(point: FrontPoint) -> PairedComparison | None:
        return point.confidence.tasks.get(task) if point.confidence else None

    title = task if task == metric else f"{task} ({metric})"
    return _table(front, title, compared, is_percent="bits" not in metric)


def _table(
    front: Front,
    title: str,
    compared: Callable[[FrontPoint], PairedComparison | None],
    *,
    is_percent: bool,
) -> TaskTable:
    found = [(point, one) for point in front.points if (one := compared(point)) is not None]
    rivals = list(dict.fromkeys(name for _, one in found for name in one.against))
    # The full model stands first with all but itself.
    rivals.sort(key=lambda name: front.basis is not None and name != front.basis.full)
    score = "score %" if is_percent else "score"
    heads = ("model", score, f"{INTERVAL_LEVEL:.0%} interval", *(f"vs {name}" for name in rivals))
    rows = []
    for point, one in found:
        differences = [
            difference_text(one.against[name], is_percent=is_percent) if name in one.against else ""
            for name in rivals
        ]
        cells = (
            full_name(front, point),
            format_with_error(one.own.value, None, is_percent=is_percent),
            range_text(one.own, is_percent=is_percent),
            *differences,
        )
        rows.append((point, cells))
    return TaskTable(title, heads, tuple(rows))
