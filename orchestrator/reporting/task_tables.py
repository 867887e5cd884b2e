"""Each task by itself: every model's score, its interval, and paired differences to the full model
and the baselines.

One value, read by the page and by Markdown. The average stands first; where the quality of the
front has no values by item, only the tasks are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.reporting.bootstrap import LEVEL
from orchestrator.reporting.pareto import Compared, Front, Placed
from orchestrator.reporting.style import is_accuracy, title_of
from orchestrator.reporting.texts import difference_text, full_name, range_text, with_error

ABOUT_TASKS = (
    f"Scores with the range that {LEVEL:.0%} of the draws fall in, and differences over the same "
    "items with theirs; of an accuracy in points. A range without zero is a difference that these "
    "items can tell."
)


@dataclass(frozen=True)
class TaskTable:
    """One task under every model."""

    title: str
    """The task and its metric."""
    heads: tuple[str, ...]
    """Titles of the columns."""
    rows: tuple[tuple[Placed, tuple[str, ...]], ...]
    """Model and its cells, cheapest first."""


def task_tables(front: Front) -> list[TaskTable]:
    """Return the average, then every task; nothing where no values of single items are at hand."""
    if front.basis is None:
        return []
    quality = front.axes.quality
    tables = [
        _table(
            front,
            title_of(quality),
            lambda point: point.confidence.overall if point.confidence else None,
            is_percent=is_accuracy(quality),
        )
    ]
    if len(front.basis.metrics) > 1 or not tables[0].rows:
        tables += [_of_task(front, name, metric) for name, metric in front.basis.metrics.items()]
    return [table for table in tables if table.rows]


def markdown_of_table(table: TaskTable) -> str:
    """Return a task's table in Markdown."""
    lines = ["| " + " | ".join(table.heads) + " |"]
    lines.append("| --- |" + " ---: |" * (len(table.heads) - 1))
    for _, cells in table.rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _of_task(front: Front, task: str, metric: str) -> TaskTable:
    def compared(point: Placed) -> Compared | None:
        return point.confidence.tasks.get(task) if point.confidence else None

    title = task if task == metric else f"{task} ({metric})"
    return _table(front, title, compared, is_percent="bits" not in metric)


def _table(
    front: Front,
    title: str,
    compared: Callable[[Placed], Compared | None],
    *,
    is_percent: bool,
) -> TaskTable:
    found = [(point, one) for point in front.placed if (one := compared(point)) is not None]
    rivals = list(dict.fromkeys(name for _, one in found for name in one.against))
    # The full model stands first with all but itself.
    rivals.sort(key=lambda name: front.basis is not None and name != front.basis.full)
    score = "score %" if is_percent else "score"
    heads = ("model", score, f"{LEVEL:.0%} interval", *(f"vs {name}" for name in rivals))
    rows = []
    for point, one in found:
        differences = [
            difference_text(one.against[name], is_percent=is_percent) if name in one.against else ""
            for name in rivals
        ]
        cells = (
            full_name(front, point),
            with_error(one.own.value, None, is_percent=is_percent),
            range_text(one.own, is_percent=is_percent),
            *differences,
        )
        rows.append((point, cells))
    return TaskTable(title, heads, tuple(rows))
