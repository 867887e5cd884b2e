"""The report as one HTML file that needs no server and no network, for a screen, a phone or paper.

Tables, strips and the heat map are written out, so that the page reads without scripts too; the
script in `web/report.js` draws the front on any two numbers and links points with rows. All
data lie in the page as JSON. Everything that comes from outside is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from orchestrator.analysis.pareto import Axes, Front, Placed
from orchestrator.analysis.style import is_accuracy, title_of
from orchestrator.analysis.tables import columns_for, full_rows

Curve = tuple[str, Sequence[tuple[int, float]]]
"""A name and its points: step and value."""

# Light to dark, one for each number of corrections; more than four share the last.
STRIP_COLORS = ("#eef2f6", "#bcd7ea", "#6baed6", "#2679b5", "#08417c")
HEAT_LOW, HEAT_HIGH = (247, 251, 255), (8, 65, 124)

SHARES = ("cost/relative_flops", "cost/relative_evaluations", "share_of_full")
HOVER = (
    "cost/evaluations",
    "cost/relative_flops",
    "cost/decode_ms_per_token",
    "cost/kv_bytes_per_token",
    "quality/accuracy",
    "quality/bits_per_byte",
    "quality/validation_loss",
    "share_of_full",
)


def report_page(
    front: Front,
    *,
    title: str,
    sentences: Sequence[str] = (),
    influence: tuple[str, Sequence[Sequence[float]]] | None = None,
    curves: Mapping[str, Sequence[Curve]] | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    picture: str | None = None,
) -> str:
    """Return the whole page.

    Args:
        front: Placed results.
        title: Heading, usually the sweep's name.
        sentences: What the front says.
        influence: Name of the measure and its rows, one a layer.
        curves: Title of a chart -> its curves.
        facts: Title of a list -> names and values: settings, provenance, what was reused.
        picture: The front as SVG text, for readers without scripts.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_subtitle(front))}</p>',
        _list_of(sentences),
        _front_section(picture),
        f"<h2>All models, cheapest first</h2>{_rows_table(front)}",
    ]
    if influence is not None:
        parts.append(_influence_section(*influence))
    for name in curves or {}:
        parts.append(f"<h2>{escape(name)}</h2>")
        parts.append(f'<div class="plot" data-curves="{escape(name)}"></div>')
    parts += [_facts_section(name, values) for name, values in (facts or {}).items()]
    return _document(title, "\n".join(parts), _data(front, curves or {}))


def _document(title: str, body: str, data: Mapping[str, Any]) -> str:
    web = resources.files("orchestrator.analysis") / "web"
    # `<` is escaped so that no text in the data can end the script element.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{(web / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
{body}
<script id="data" type="application/json">{text}</script>
<script>
{(web / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _data(front: Front, curves: Mapping[str, Sequence[Curve]]) -> dict[str, Any]:
    rows = full_rows(front)
    names = [name for row in rows for name, value in row.items() if isinstance(value, float)]
    numbers = [name for name in dict.fromkeys(names) if "/" in name]
    costs = [n for n in numbers if n.startswith("cost/") and not n.endswith(("_spread", "_stderr"))]
    qualities = [n for n in numbers if n.startswith("quality/") and not n.endswith("_stderr")]
    return {
        "axes": {"cost": front.axes.cost, "quality": front.axes.quality},
        "rows": rows,
        "costs": costs,
        "qualities": qualities,
        "higher": [name for name in qualities if Axes(quality=name).higher_is_better],
        "percent": [n for n in numbers if is_accuracy(n.removesuffix("_stderr"))] + list(SHARES),
        "titles": {name: title_of(name) for name in numbers}
        | {"share_of_full": f"{title_of(front.axes.quality)}, share of full"},
        "hover": list(HOVER),
        "curves": {
            title: [
                {"name": name, "points": [[s, v] for s, v in points if math.isfinite(v)]}
                for name, points in series
            ]
            for title, series in curves.items()
        },
    }


def _subtitle(front: Front) -> str:
    members, volume = len(front.members), front.hypervolume
    text = f"{len(front.placed)} models, {members} on the front"
    return text if volume is None else f"{text}; hypervolume {volume:.3f} of the full model's box"


def _list_of(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="findings">{items}</ul>' if items else ""


def _front_section(picture: str | None) -> str:
    fallback = f"<noscript>{picture[picture.find('<svg') :]}</noscript>" if picture else ""
    return f"""<h2>The front</h2>
<div class="controls" id="controls" hidden>
<label>Quality <select id="quality"></select></label>
<label>Cost <select id="cost"></select></label>
</div>
<div class="plot" id="front"></div>
<p class="lead">Star: the full model. Filled: on the front. Hollow, faint: dominated. Diamond:
trained from scratch for comparison. Bars: one standard error. The line is what a budget buys.</p>
{fallback}"""


def _rows_table(front: Front) -> str:
    columns = columns_for(front)
    heads = [_head(column.title, is_text=column.justify == "left") for column in columns]
    heads.insert(1, _head("corrections", is_text=True))
    body = []
    for point in front.placed:
        cells = []
        for number, column in enumerate(columns):
            text = column.cell(front, point)
            kind = ' class="text"' if column.justify == "left" else ""
            cells.append(f'<td{kind} data-value="{escape(_sortable(text))}">{escape(text)}</td>')
            if number == 0:
                cells.append(f'<td class="text">{schedule_strip(point.result.schedule)}</td>')
        key = escape(point.result.key)
        body.append(f'<tr class="{_kind(point)}" data-key="{key}">{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="rows"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _head(title: str, *, is_text: bool) -> str:
    kind = ' class="text"' if is_text else ""
    return f"<th{kind}><button>{escape(title)}</button></th>"


def _sortable(text: str) -> str:
    """Return the number that a cell starts with, in its smallest unit, or the text."""
    parts = text.removeprefix(">").rstrip("%").split()
    units = {"kB": 1024, "MB": 1024**2}
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


def _influence_section(metric: str, rows: Sequence[Sequence[float]]) -> str:
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


def _facts_section(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return (
        f"<details><summary>{escape(title)}</summary>"
        f'<div class="scroll"><table class="facts">{rows}</table></div></details>'
    )


def _kind(point: Placed) -> str:
    if not point.is_candidate:
        return "reference"
    if point.on_front:
        return "member"
    return "full" if point.result.role == "teacher" else "dominated"
