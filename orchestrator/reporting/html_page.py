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

from orchestrator.reporting.confidence import CONFIDENCES, difference_metric
from orchestrator.reporting.front_axes import (
    PAPER_COST_SHARE,
    PAPER_MARK,
    PAPER_QUALITY_SHARE,
    FrontAxes,
    is_accuracy,
    metric_title,
)
from orchestrator.reporting.front_data import front_rows
from orchestrator.reporting.front_text import hypervolume_text
from orchestrator.reporting.html_tables import influence_section, rows_table, tasks_section
from orchestrator.reporting.pareto import Front

Curve = tuple[str, Sequence[tuple[int, float]]]
"""A name and its points: step and value."""

SCRIPTS = ("plot.js", "front.js", "report.js")
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


def render_page(
    front: Front,
    *,
    title: str,
    sentences: Sequence[str] = (),
    mark_paper: bool = False,
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
        mark_paper: Mark the paper's headline where the quality is an accuracy.
        influence: Name of the measure and its rows, one a layer.
        curves: Title of a chart -> its curves.
        facts: Title of a list -> names and values: settings, provenance, what was reused.
        picture: The front as SVG text, for readers without scripts.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_subtitle(front))}</p>',
        _list_of(sentences),
        _front_section(picture, mark_paper=mark_paper),
        '<section class="wide"><h2>All models, cheapest first</h2>',
        f"{rows_table(front)}{tasks_section(front)}</section>",
    ]
    if influence is not None:
        parts.append(influence_section(*influence))
    for name in curves or {}:
        parts.append(f"<h2>{escape(name)}</h2>")
        parts.append(f'<div class="plot" data-curves="{escape(name)}"></div>')
    parts += [_facts_section(name, values) for name, values in (facts or {}).items()]
    data = {**_data(front, curves or {}), "paper": _paper_mark() if mark_paper else None}
    return _document(title, "\n".join(parts), data)


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


def _data(front: Front, curves: Mapping[str, Sequence[Curve]]) -> dict[str, Any]:
    rows = front_rows(front)
    names = [name for row in rows for name, value in row.items() if isinstance(value, float)]
    against_full = _against_full(front)
    numbers = [name for name in dict.fromkeys(names) if "/" in name]
    costs = [n for n in numbers if n.startswith("cost/") and not n.endswith(("_spread", "_stderr"))]
    qualities = [n for n in numbers if n.startswith("quality/") and not n.endswith("_stderr")]
    return {
        "axes": {"cost": front.axes.cost, "quality": front.axes.quality},
        "rows": rows,
        "costs": costs,
        "qualities": qualities,
        "higher": [name for name in qualities if FrontAxes(quality=name).higher_is_better],
        "percent": [n for n in numbers if is_accuracy(n.removesuffix("_stderr"))] + list(SHARES),
        "points": against_full if is_accuracy(front.axes.quality) else [],
        "confidences": list(CONFIDENCES),
        "titles": {name: metric_title(name) for name in numbers}
        | {"share_of_full": f"{metric_title(front.axes.quality)}, share of full"}
        | {name: f"Difference to {front.basis.full}" for name in against_full if front.basis},
        "hover": [*HOVER, *against_full, *CONFIDENCES],
        "series": list(dict.fromkeys(front.sweep_of.values())),
        "curves": {
            title: [
                {"name": name, "points": [[s, v] for s, v in points if math.isfinite(v)]}
                for name, points in series
            ]
            for title, series in curves.items()
        },
    }


def _against_full(front: Front) -> list[str]:
    """Return the tracked name of the paired difference to the full model, if there is one."""
    if front.basis is None:
        return []
    return [difference_metric(front.basis.full)]


def _paper_mark() -> dict[str, Any]:
    return {"cost": PAPER_COST_SHARE, "quality": PAPER_QUALITY_SHARE, "name": PAPER_MARK}


def _subtitle(front: Front) -> str:
    volume = hypervolume_text(front)
    text = f"{len(front.points)} models, {len(front.members)} on the front"
    return f"{text}; {volume}." if volume else f"{text}."


def _list_of(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="findings">{items}</ul>' if items else ""


def _front_section(picture: str | None, *, mark_paper: bool) -> str:
    less, kept = 1 - PAPER_COST_SHARE, PAPER_QUALITY_SHARE
    headline = f"{less:.0%} less cost at {kept:.1%} of the accuracy"
    paper = f" Cross: the paper's headline, {headline}, on this full model." if mark_paper else ""
    fallback = f"<noscript>{picture[picture.find('<svg') :]}</noscript>" if picture else ""
    return f"""<h2>The front</h2>
<div class="controls" id="controls" hidden>
<label>Quality <select id="quality"></select></label>
<label>Cost <select id="cost"></select></label>
</div>
<div class="plot" id="front"></div>
<div class="key" id="series"></div>
<p class="lead">Star: the full model. Filled: on the front. Hollow, faint: dominated. Diamond:
trained from scratch for comparison. Bars: one standard error. The line is what a budget
buys.{paper}</p>
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
