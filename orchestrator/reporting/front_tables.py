"""Tables of a front: all models, and each task separately; for the terminal, Markdown and HTML.

The terminal table drops the least important columns until it fits. The unrounded numbers are in
`reporting.front_data`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from orchestrator.reporting.front_axes import COSTS, is_accuracy, metric_title
from orchestrator.reporting.front_text import (
    confidence_text,
    difference_text,
    full_name,
    model_name,
    quality_text,
    range_text,
    verdict,
)
from orchestrator.reporting.markdown import markdown_table
from orchestrator.reporting.pareto import Front, FrontPoint
from orchestrator.reporting.statistics import INTERVAL_LEVEL, KEPT_SHARE, PairedComparison
from orchestrator.terminal.render import format_bytes, format_parameters, format_with_error

TASK_TABLES_NOTE = (
    f"Each score has its {INTERVAL_LEVEL:.0%} interval over the draws, and so has each difference "
    "over the same items; differences of an accuracy are in points. An interval without zero is a "
    "difference that these items can resolve."
)
ROW_STYLES = {"baseline": "cyan", "member": "bold", "full": "", "dominated": "dim"}
NOTABLE_SIZE_RATIO = 1.1
"""The mix of a method adds less than this to a model; otherwise a column shows parameters."""
SHORT_TITLES = {
    "quality/accuracy": "accuracy %",
    "quality/bits_per_byte": "bits/byte",
    "quality/validation_loss": "loss",
    "cost/flops_per_token": "FLOPs/token",
}


@dataclass(frozen=True)
class FrontColumn:
    """One column of the table of all models."""

    title: str
    cell: Callable[[FrontPoint], str]
    """Text of a cell; empty if there is no value."""
    priority: int = 0
    """The highest number is dropped first if space is short; 0 is never dropped."""
    justify: Literal["left", "right"] = "right"


def front_columns(front: Front) -> list[FrontColumn]:
    """Return the columns of a front's table: schedule, costs, qualities, confidences, place."""
    quality, full = front.axes.quality, front.basis.full if front.basis else "full"

    def keeps(point: FrontPoint) -> str:
        if point is front.full or point.confidence is None:
            return ""
        return confidence_text(point.confidence.keeps)

    def on_front(point: FrontPoint) -> str:
        return confidence_text(point.confidence.on_front) if point.confidence else ""

    columns = [
        FrontColumn("schedule", model_name, justify="left"),
        FrontColumn("threshold", _threshold, 6),
        *_cost_columns(front.axes.cost),
        *_size_columns(front),
        FrontColumn(_short_title(quality), lambda p: quality_text(front, p)),
        FrontColumn("bits/byte", lambda p: _number(p, "quality/bits_per_byte", ".3f"), 5),
        FrontColumn("of full", lambda p: _percent(front.share(p), 1), 2),
        FrontColumn(f"vs {full}", lambda p: _difference(front, p), 8),
        FrontColumn(f"P({KEPT_SHARE:.0%})", keeps, 9),
        FrontColumn("P(front)", on_front, 10),
        FrontColumn("accepted", lambda p: _percent(p.result.value("decoding/acceptance"), 0), 12),
        FrontColumn("exact ms", lambda p: _number(p, "decoding/exact_ms_per_token", ".2f"), 11),
        FrontColumn("front", lambda p: verdict(front, p), justify="left"),
    ]
    if front.sweep_of:
        sweep = FrontColumn("sweep", lambda p: front.sweep_of[p.result.key], justify="left")
        columns.insert(1, sweep)
    if quality == "quality/bits_per_byte":
        columns = [column for column in columns if column.priority != 5]
    points = front.shown
    return [c for c in columns if not c.priority or any(c.cell(p) for p in points)]


def terminal_table(front: Front, *, width: int, title: str = "") -> Table:
    """Return the table of a front for a terminal of `width` columns; dominated rows are dim."""
    columns, points = front_columns(front), front.shown
    # Two spaces after each column, one before all.
    while sum(_width(points, column) + 2 for column in columns) + 1 > width:
        dropped = max(columns, key=lambda column: column.priority)
        if not dropped.priority:
            break
        columns.remove(dropped)
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = "left"
    for number, column in enumerate(columns):
        # If even that is too wide, only the names are cut.
        min_width = _width(points, column) if number else None
        table.add_column(column.title, justify=column.justify, no_wrap=True, min_width=min_width)
    for point in points:
        table.add_row(*(column.cell(point) for column in columns), style=ROW_STYLES[point.kind])
    return table


@dataclass(frozen=True)
class FrontTable:
    """The table of a front, in the width of the terminal that prints it."""

    front: Front
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table."""
        yield terminal_table(self.front, width=options.max_width, title=self.title)


def front_markdown(front: Front) -> str:
    """Return the table of a front in Markdown; members of the front are bold."""
    columns = front_columns(front)
    points = front.shown
    rows = [[column.cell(point) for column in columns] for point in points]
    for point, cells in zip(points, rows, strict=True):
        if point.on_front:
            cells[0] = f"**{cells[0]}**"
    left = [number for number, column in enumerate(columns) if column.justify == "left"]
    return markdown_table([column.title for column in columns], rows, left=left) + "\n"


def _cost_columns(axis: str) -> list[FrontColumn]:
    flops, kv, ms = "cost/relative_flops", COSTS["kv"], COSTS["ms"]
    columns = {
        "cost/evaluations": FrontColumn("NFE", lambda p: _number(p, "cost/evaluations", "g")),
        flops: FrontColumn("FLOPs", lambda p: _percent(p.result.value(flops), 0), 4),
        kv: FrontColumn("KV/token", lambda p: _bytes(p.result.value(kv)), 7),
        ms: FrontColumn("ms/token", lambda p: _number(p, ms, ".2f"), 3),
    }
    # The cost axis of the front is never dropped.
    if axis in columns:
        columns[axis] = replace(columns[axis], priority=0)
        return list(columns.values())
    return [FrontColumn(_short_title(axis), lambda p: _number(p, axis, ".4g")), *columns.values()]


def _short_title(name: str) -> str:
    return SHORT_TITLES.get(name, metric_title(name))


def _number(point: FrontPoint, name: str, form: str) -> str:
    value = point.result.value(name)
    return "" if value is None else f"{value:{form}}"


def _difference(front: Front, point: FrontPoint) -> str:
    overall = point.confidence and point.confidence.overall
    interval = overall.against.get(front.basis.full) if overall and front.basis else None
    is_percent = is_accuracy(front.axes.quality)
    return difference_text(interval, is_percent=is_percent) if interval else ""


def _threshold(point: FrontPoint) -> str:
    """Return the largest threshold that gives the schedule, which a user would type."""
    text = point.result.threshold_text
    return text if text.startswith(">") else text.removeprefix("<=").rpartition(" to ")[2]


def _size_columns(front: Front) -> list[FrontColumn]:
    """Return the columns of layers and parameters, those in which models differ notably."""
    columns, name = [], "cost/num_parameters"
    if len({point.result.model.num_layers for point in front.points}) > 1:
        columns.append(FrontColumn("layers", lambda p: str(p.result.model.num_layers), 4))
    counts = [count for p in front.points if (count := p.result.value(name))]
    if counts and max(counts) >= NOTABLE_SIZE_RATIO * min(counts):
        columns.append(
            FrontColumn("parameters", lambda p: format_parameters(p.result.value(name) or 0.0), 4)
        )
    return columns


def _percent(share: float | None, digits: int) -> str:
    return "" if share is None else f"{share:.{digits}%}"


def _bytes(count: float | None) -> str:
    return "" if count is None else format_bytes(count)


def _width(points: Sequence[FrontPoint], column: FrontColumn) -> int:
    return max(map(cell_len, [column.title, *(column.cell(p) for p in points)]))


@dataclass(frozen=True)
class TaskTable:
    """Scores of every model on one task, with paired differences."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[FrontPoint, tuple[str, ...]], ...]
    """Models and their cells, cheapest first."""

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        return markdown_table(self.heads, (cells for _, cells in self.rows))


def task_tables(front: Front) -> list[TaskTable]:
    """Return the table of the average, then of every task; none without values of single items."""
    if front.basis is None:
        return []
    quality, metrics = front.axes.quality, front.basis.metrics
    overall = {p.result.key: p.confidence.overall for p in front.points if p.confidence}
    tables = [_task_table(front, metric_title(quality), overall, is_percent=is_accuracy(quality))]
    if len(metrics) > 1 or not tables[0].rows:
        for task, metric in metrics.items():
            title = task if task == metric else f"{task} ({metric})"
            scores = {p.result.key: p.confidence.tasks[task] for p in front.points if p.confidence}
            tables.append(_task_table(front, title, scores, is_percent="bits" not in metric))
    return [table for table in tables if table.rows]


def _task_table(
    front: Front,
    title: str,
    comparisons: Mapping[str, PairedComparison | None],
    *,
    is_percent: bool,
) -> TaskTable:
    found = [(p, one) for p in front.points if (one := comparisons.get(p.result.key))]
    others = list(dict.fromkeys(name for _, one in found for name in one.against))
    # The full model first; its own row comes without it.
    others.sort(key=lambda name: front.basis is not None and name != front.basis.full)
    score = "score %" if is_percent else "score"
    heads = ("model", score, f"{INTERVAL_LEVEL:.0%} interval", *(f"vs {name}" for name in others))
    rows = []
    for point, one in found:
        differences = [
            difference_text(one.against[name], is_percent=is_percent) if name in one.against else ""
            for name in others
        ]
        own = format_with_error(one.own.value, None, is_percent=is_percent)
        interval = range_text(one.own, is_percent=is_percent)
        rows.append((point, (full_name(front, point), own, interval, *differences)))
    return TaskTable(title, heads, tuple(rows))
