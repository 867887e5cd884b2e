"""HTML tables of the report page, readable without scripts; all text from outside is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from iiet.influence import InfluenceTable
from orchestrator.reporting.elastic_section import ELASTIC_TITLE, ElasticSection
from orchestrator.reporting.front_tables import (
    TASK_TABLES_NOTE,
    FrontColumn,
    front_columns,
    task_tables,
)
from orchestrator.reporting.pareto import Front, FrontPoint
from orchestrator.terminal.render import BYTE_UNITS

# Light to dark, one for each number of corrections; higher numbers share the last.
STRIP_COLORS = ("#eef2f6", "#bcd7ea", "#6baed6", "#2679b5", "#08417c")
HEAT_LOW, HEAT_HIGH = (247, 251, 255), (8, 65, 124)
LAST_PHONE_PRIORITY = 3
"""A phone leaves out the columns that are less important than this."""
LONG_STRIP = 12


def models_table(front: Front) -> str:
    """Return the table of all models, each schedule also as a strip."""
    columns = front_columns(front)
    heads = [_head(column.title, _classes(column)) for column in columns]
    heads.insert(1, _head("corrections", "text minor"))
    rows = []
    for point in front.shown:
        cells = [_cell(column.cell(point), _classes(column)) for column in columns]
        cells.insert(1, f'<td class="text minor">{schedule_strip(point.result.schedule)}</td>')
        rows.append(_row(point, cells))
    return _table(heads, rows)


def tasks_section(front: Front) -> str:
    """Return the tables of the single tasks; empty without values by item."""
    tables = task_tables(front)
    if not tables:
        return ""
    parts = [f'<h2>Task by task</h2><p class="lead">{escape(TASK_TABLES_NOTE)}</p>']
    for number, table in enumerate(tables):
        heads = [_head(head, "" if i else "text") for i, head in enumerate(table.heads)]
        rows = [
            _row(point, [f'<td class="text">{escape(name)}</td>', *map(_cell, numbers)])
            for point, (name, *numbers) in table.rows
        ]
        parts.append(
            f"<details{'' if number else ' open'}><summary>{escape(table.title)}</summary>"
            f"{_table(heads, rows)}</details>"
        )
    return "".join(parts)


def elastic_html(elastic: ElasticSection) -> str:
    """Return the section on elastic weights against separate students."""
    explanation, heads = elastic.explanation, elastic.heads
    return _section(ELASTIC_TITLE, explanation, heads, elastic.cells, elastic.notes)


def _section(
    title: str,
    explanation: str,
    heads: Sequence[str],
    cells: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> str:
    cells_of_head = [_head(head, "" if number else "text") for number, head in enumerate(heads)]
    rows = []
    for name, *numbers in cells:
        row = [f'<td class="text">{escape(name)}</td>', *map(_cell, numbers)]
        rows.append(f"<tr>{''.join(row)}</tr>")
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<h2>{escape(title)}</h2><p class="lead">{escape(explanation)}</p>'
        f'{_table(cells_of_head, rows)}<ul class="findings">{listed}</ul>'
    )


def schedule_strip(schedule: Sequence[int] | None) -> str:
    """Return an iteration schedule as a strip with a cell for each layer; darker is a higher r."""
    if schedule is None:
        return ""
    cells = []
    for layer, r in enumerate(schedule, start=1):
        background = STRIP_COLORS[min(r, len(STRIP_COLORS) - 1)]
        style = f"background:{background};color:{'#fff' if r >= 2 else '#333'}"
        cells.append(f'<i style="{style}" title="layer {layer}: {r}">{r}</i>')
    kind = "strip long" if len(schedule) > LONG_STRIP else "strip"
    return f'<span class="{kind}">{"".join(cells)}</span>'


def influence_section(influence: InfluenceTable) -> str:
    """Return the heat map of influences, a row for each layer."""
    rows = influence.rows()
    width = max((len(row) for row in rows), default=0)
    positive = [math.log10(v) for row in rows for v in row if v > 0]
    low, high = min(positive, default=0.0), max(positive, default=0.0)
    heads = "".join(f"<th>{i}</th>" for i in range(1, width + 1))
    body = "".join(
        f"<tr><th>{layer}</th>{''.join(_heat_cell(v, low, high) for v in row)}</tr>"
        for layer, row in enumerate(rows, start=1)
    )
    return (
        f"<h2>Influence of each correction ({escape(influence.metric)})</h2>"
        '<p class="lead">How much each correction matters; darker is more, on a logarithmic scale. '
        "A threshold drops corrections from a layer's last one backwards.</p>"
        '<div class="scroll"><table class="heat">'
        f"<tr><th>layer</th>{heads}</tr>{body}</table></div>"
    )


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    return (
        f'<div class="scroll"><table class="rows"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _head(title: str, classes: str) -> str:
    return f'<th class="{classes}"><button>{escape(title)}</button></th>'


def _row(point: FrontPoint, cells: Iterable[str]) -> str:
    key = escape(point.result.key)
    return f'<tr class="{point.kind}" data-key="{key}">{"".join(cells)}</tr>'


def _cell(text: str, classes: str = "") -> str:
    return f'<td class="{classes}" data-value="{escape(_sort_value(text))}">{escape(text)}</td>'


def _classes(column: FrontColumn) -> str:
    classes = {"text": column.justify == "left", "minor": column.priority > LAST_PHONE_PRIORITY}
    return " ".join(name for name, applies in classes.items() if applies)


def _sort_value(text: str) -> str:
    # The number at the start of the cell, in bytes or billions if it has a unit; else the text.
    words = text.removeprefix(">").rstrip("%").split()
    units = {unit: 1024.0**power for power, unit in enumerate(BYTE_UNITS)}
    units |= {"M": 1e-3, "K": 1e-6}  # Of parameters, whose B are billions.
    try:
        return str(float(words[0]) * (units.get(words[1], 1) if len(words) > 1 else 1))
    except (ValueError, IndexError):
        return text


def _heat_cell(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "<td></td>"
    share = (math.log10(value) - low) / (high - low) if value > 0 and high > low else 0.0
    r, g, b = (round(a + (b - a) * share) for a, b in zip(HEAT_LOW, HEAT_HIGH, strict=True))
    style = f"background:rgb({r} {g} {b});color:{'#fff' if share > 0.5 else '#222'}"
    return f'<td style="{style}">{value:.2g}</td>'
