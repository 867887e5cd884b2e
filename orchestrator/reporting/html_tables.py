"""The tables of the page, written out so that they read without scripts: all models with their
schedules as strips, each task, the heat map of influences. Everything from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from orchestrator.reporting.front_tables import (
    TASK_TABLES_NOTE,
    FrontColumn,
    front_columns,
    task_tables,
)
from orchestrator.reporting.pareto import Front, FrontPoint

# Light to dark, one for each number of corrections; more than four share the last.
STRIP_COLORS = ("#eef2f6", "#bcd7ea", "#6baed6", "#2679b5", "#08417c")
HEAT_LOW, HEAT_HIGH = (247, 251, 255), (8, 65, 124)


def rows_table(front: Front) -> str:
    """Return the table of all models, each schedule also as a strip."""
    columns = front_columns(front)
    heads = [_head(column.title, _classes(column)) for column in columns]
    heads.insert(1, _head("corrections", "text"))
    body = []
    for point in front.points:
        cells = []
        for number, column in enumerate(columns):
            text = column.cell(front, point)
            value = escape(_sortable(text))
            cells.append(f'<td class="{_classes(column)}" data-value="{value}">{escape(text)}</td>')
            if number == 0:
                cells.append(f'<td class="text">{schedule_strip(point.result.schedule)}</td>')
        key = escape(point.result.key)
        body.append(f'<tr class="{_kind(point)}" data-key="{key}">{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="rows"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def tasks_section(front: Front) -> str:
    """Return the tables of the single tasks; empty where there are no values by item."""
    tables = task_tables(front)
    if not tables:
        return ""
    parts = [f'<h2>Task by task</h2><p class="lead">{escape(TASK_TABLES_NOTE)}</p>']
    for number, table in enumerate(tables):
        heads = "".join(_head(head, "" if i else "text") for i, head in enumerate(table.heads))
        body = "".join(_task_row(point, cells) for point, cells in table.rows)
        parts.append(
            f"<details{'' if number else ' open'}><summary>{escape(table.title)}</summary>"
            f'<div class="scroll"><table class="rows"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{body}</tbody></table></div></details>"
        )
    return "".join(parts)


def _task_row(point: FrontPoint, cells: Sequence[str]) -> str:
    first, *others = cells
    texts = [f'<td class="text">{escape(first)}</td>']
    texts += [f'<td data-value="{escape(_sortable(text))}">{escape(text)}</td>' for text in others]
    return f'<tr class="{_kind(point)}" data-key="{escape(point.result.key)}">{"".join(texts)}</tr>'


def _head(title: str, classes: str) -> str:
    return f'<th class="{classes}"><button>{escape(title)}</button></th>'


def _classes(column: FrontColumn) -> str:
    """Return how a column is set, and whether a phone leaves it out."""
    return " ".join(["text"] * (column.justify == "left") + ["minor"] * (2 < column.priority < 8))


def _sortable(text: str) -> str:
    """Return the number that a cell starts with, in its smallest unit, or the text."""
    parts = text.removeprefix(">").rstrip("%").split()
    units = {"KiB": 1024, "MiB": 1024**2}
    try:
        return str(float(parts[0]) * (units.get(parts[1], 1) if len(parts) > 1 else 1))
    except (ValueError, IndexError):
        return text


def schedule_strip(schedule: Sequence[int] | None) -> str:
    """Return an iteration schedule as a strip of cells, one a layer, darker for more
    corrections."""
    if schedule is None:
        return ""
    cells = []
    for layer, r in enumerate(schedule, start=1):
        color = STRIP_COLORS[min(r, len(STRIP_COLORS) - 1)]
        ink = "#fff" if r >= 2 else "#333"
        cells.append(
            f'<i style="background:{color};color:{ink}" title="layer {layer}: {r}">{r}</i>'
        )
    kind = "strip long" if len(schedule) > 12 else "strip"
    return f'<span class="{kind}">{"".join(cells)}</span>'


def influence_section(metric: str, rows: Sequence[Sequence[float]]) -> str:
    """Return the heat map of influences, a row a layer."""
    width = max((len(row) for row in rows), default=0)
    positive = [math.log10(v) for row in rows for v in row if v > 0]
    low, high = min(positive, default=0.0), max(positive, default=0.0)
    heads = "".join(f"<th>{i}</th>" for i in range(1, width + 1))
    body = "".join(
        f"<tr><th>{layer}</th>{''.join(_heat_cell(v, low, high) for v in row)}</tr>"
        for layer, row in enumerate(rows, start=1)
    )
    return (
        f"<h2>Influence of each correction ({escape(metric)})</h2>"
        '<p class="lead">How much each correction matters; darker is more, on a logarithmic scale. '
        "A threshold drops corrections from a layer's last one backwards.</p>"
        '<div class="scroll"><table class="heat">'
        f"<tr><th>layer</th>{heads}</tr>{body}</table></div>"
    )


def _heat_cell(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "<td></td>"
    share = (math.log10(value) - low) / (high - low) if value > 0 and high > low else 0.0
    mixed = [round(a + (b - a) * share) for a, b in zip(HEAT_LOW, HEAT_HIGH, strict=True)]
    ink = "#fff" if share > 0.5 else "#222"
    color = f"rgb({mixed[0]} {mixed[1]} {mixed[2]})"
    return f'<td style="background:{color};color:{ink}">{value:.2g}</td>'


def _kind(point: FrontPoint) -> str:
    if not point.is_candidate:
        return "baseline"
    if point.on_front:
        return "member"
    return "full" if point.result.role == "teacher" else "dominated"
