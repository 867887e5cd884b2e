"""The report as one HTML file without server or network, for a screen, a phone or paper.

Tables, schedule strips and the heat map are static HTML, so the page is readable without scripts.
The scripts in `web/` draw the front on any two metrics and link its points with the rows; their
data are JSON inside the page. All text from outside is escaped.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from orchestrator.reporting.front_axes import (
    PAPER_COST_SHARE,
    PAPER_MARK,
    PAPER_QUALITY_SHARE,
    FrontAxes,
    is_accuracy,
    metric_title,
)
from orchestrator.reporting.front_data import model_rows
from orchestrator.reporting.front_text import hypervolume_text
from orchestrator.reporting.html_tables import (
    elastic_html,
    influence_section,
    models_table,
    tasks_section,
)
from orchestrator.reporting.pareto import Front, FrontPoint, find_front
from orchestrator.reporting.report_content import SweepReport
from orchestrator.reporting.statistics import KEEPS_METRIC, ON_FRONT_METRIC, difference_metric

SCRIPTS = ("plot.js", "front.js", "report.js")
SHARES = ("cost/relative_flops", "cost/relative_evaluations", "share_of_full")
TOOLTIP_METRICS = (
    "cost/evaluations",
    "cost/relative_flops",
    "cost/decode_ms_per_token",
    "cost/kv_bytes_per_token",
    "cost/num_parameters",
    "quality/accuracy",
    "quality/bits_per_byte",
    "quality/validation_loss",
    "share_of_full",
)


def render_page(report: SweepReport, *, picture: str | None = None) -> str:
    """Return the whole page; `picture` is the front as SVG text, for readers without scripts."""
    front = report.front
    volume = hypervolume_text(front)
    counts = f"{len(front.points)} models, {len(front.members)} on the front"
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="lead">{escape(f"{counts}; {volume}." if volume else f"{counts}.")}</p>',
        _findings(report.sentences),
        _front_section(picture, mark_paper=report.mark_paper),
        '<section class="wide"><h2>All models, cheapest first</h2>',
        f"{models_table(front)}{tasks_section(front)}</section>",
    ]
    if report.elastic is not None:
        parts.append(elastic_html(report.elastic))
    if report.influence is not None:
        parts.append(influence_section(report.influence))
    for name in report.curves:
        parts.append(f"<h2>{escape(name)}</h2>")
        parts.append(f'<div class="plot" data-curves="{escape(name)}"></div>')
    parts += [_facts_section(name, values) for name, values in report.facts.items()]
    return _document(report.title, "\n".join(parts), _script_data(report))


def _document(title: str, body: str, data: Mapping[str, Any]) -> str:
    web = resources.files("orchestrator.reporting") / "web"
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
{"".join((web / name).read_text(encoding="utf-8") for name in SCRIPTS)}</script>
</body>
</html>
"""


def _script_data(report: SweepReport) -> dict[str, Any]:
    front = report.front
    rows = model_rows(front)
    names = [name for row in rows for name, value in row.items() if isinstance(value, float)]
    metrics = [name for name in dict.fromkeys(names) if "/" in name]
    costs = [n for n in metrics if n.startswith("cost/") and not n.endswith(("_spread", "_stderr"))]
    qualities = [n for n in metrics if n.startswith("quality/") and not n.endswith("_stderr")]
    fronts = {
        (cost, quality): find_front(front.table, FrontAxes(cost, quality))
        for cost, quality in itertools.product(costs, qualities)
    }
    rows = _shown_rows(front, rows, fronts.values())
    differences = [difference_metric(front.basis.full)] if front.basis else []
    paper = {"cost": PAPER_COST_SHARE, "quality": PAPER_QUALITY_SHARE, "name": PAPER_MARK}
    return {
        "axes": {"cost": front.axes.cost, "quality": front.axes.quality},
        "rows": rows,
        "costs": costs,
        "qualities": qualities,
        "fronts": {
            cost: {quality: _front_by_row(rows, fronts[cost, quality]) for quality in qualities}
            for cost in costs
        },
        "higher": [name for name in qualities if FrontAxes(quality=name).higher_is_better],
        "percent": [n for n in metrics if is_accuracy(n.removesuffix("_stderr"))] + list(SHARES),
        "points": differences if is_accuracy(front.axes.quality) else [],
        "confidences": [KEEPS_METRIC, ON_FRONT_METRIC],
        "titles": {name: metric_title(name) for name in metrics}
        | {"share_of_full": f"{metric_title(front.axes.quality)}, share of full"}
        | {name: f"Difference to {front.basis.full}" for name in differences if front.basis},
        "hover": [*TOOLTIP_METRICS, *differences, KEEPS_METRIC, ON_FRONT_METRIC],
        "series": list(dict.fromkeys(front.sweep_of.values())),
        "curves": {
            title: [
                {"name": name, "points": [[s, v] for s, v in points if math.isfinite(v)]}
                for name, points in series
            ]
            for title, series in report.curves.items()
        },
        "paper": paper if report.mark_paper else None,
    }


def _shown_rows(
    front: Front, rows: Sequence[dict[str, Any]], fronts: Iterable[Front]
) -> list[dict[str, Any]]:
    """Return the rows that the page draws: `Front.shown`, and the members of all other fronts."""
    shown = front.shown
    if len(shown) == len(front.points):
        return list(rows)
    needed = [
        *shown,
        *(p for f in fronts for own in (f, *f.by_sweep.values()) for p in own.members),
    ]
    keys = {point.result.key for point in needed}
    return [row for row in rows if row["key"] in keys]


def _front_by_row(rows: Sequence[Mapping[str, Any]], placed: Front) -> dict[str, Any]:
    """Return the full model and the members of a front, as row numbers."""
    axes = placed.axes
    # Rows have no infinite numbers, so a model with one cannot be drawn.
    number_of = {
        row["key"]: number
        for number, row in enumerate(rows)
        if row[axes.cost] is not None and row[axes.quality] is not None
    }

    def numbers(points: Iterable[FrontPoint]) -> list[int]:
        keys = (point.result.key for point in points)
        return [number_of[key] for key in keys if key in number_of]

    return {
        "full": next(iter(numbers([placed.full] if placed.full else [])), None),
        "members": numbers(placed.members),
        "sweeps": [numbers(own.members) for own in placed.by_sweep.values()],
    }


def _findings(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="findings">{items}</ul>' if items else ""


def _front_section(picture: str | None, *, mark_paper: bool) -> str:
    saved, kept = 1 - PAPER_COST_SHARE, PAPER_QUALITY_SHARE
    headline = f"{saved:.0%} less cost at {kept:.1%} of the accuracy"
    paper = f" Cross: the paper's headline, {headline}, on this full model." if mark_paper else ""
    fallback = f"<noscript>{picture[picture.find('<svg') :]}</noscript>" if picture else ""
    return f"""<h2>The front</h2>
<div class="controls" id="controls" hidden>
<label>Quality <select id="quality"></select></label>
<label>Cost <select id="cost"></select></label>
</div>
<div class="plot" id="front"></div>
<div class="key" id="series"></div>
<p class="lead">Star: full model. Filled: on the front. Hollow and faint: dominated. Diamond:
baseline. Bars: one standard error. Line: the best quality at each cost
budget.{paper}</p>
{fallback}"""


def _facts_section(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return (
        f"<details><summary>{escape(title)}</summary>"
        f'<div class="scroll columns"><table class="facts">{rows}</table></div></details>'
    )
