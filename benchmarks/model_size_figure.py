"""Draws the benchmark `model_size`: `python -m benchmarks.model_size_figure NUMBERS.json STEM`.

NUMBERS.json comes from `python -m benchmarks model_size --json NUMBERS.json`. Writes STEM.png: one
column for each cost, milliseconds above, the ratio to the vanilla model below.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair
from altair import Axis, Chart, InlineData, Scale

from benchmarks.model_size import COSTS, MODELS, VANILLA
from orchestrator.reporting.charts import BLUE, GRAY, RED, Spec, chart_spec, save_chart


def draw(rows: Sequence[dict[str, Any]]) -> Spec:
    """Return the chart of a benchmark's rows."""
    columns = []
    for cost in COSTS:
        milliseconds, ratios = [], []
        for number, label in enumerate([*MODELS][1:]):
            for row in (row for row in rows if row["what"].startswith(f"{cost}, {label} /")):
                size = _spread(row, "size")["median"]
                ratios.append({"size": size, "model": label, **row["ratio"]})
                # The vanilla model stands in the rows of both.
                for name in (label,) if number else (VANILLA, label):
                    milliseconds.append({"size": size, "model": name, **_spread(row, name)})
        bounds = [{"model": n, "bound": 1 + (MODELS[n] or 0)} for n in [*MODELS][1:]]
        expected = Chart(InlineData(values=bounds)).mark_rule(strokeDash=[2, 2])
        expected = expected.encode(y="bound:Q", color="model:N")
        above = _panel(milliseconds, "milliseconds", Scale(type="log"))
        below = _panel(ratios, "ratio to vanilla", Scale(zero=True))
        columns.append(above.properties(title=cost) & altair.layer(expected, below))
    return chart_spec(altair.hconcat(*columns))


def _panel(rows: list[dict[str, Any]], title: str, scale: Scale) -> altair.LayerChart:
    sizes = sorted({row["size"] for row in rows})
    x_axis = Axis(values=sizes, format=".2~g")
    x = altair.X("size:Q", title="parameters (millions)", scale=Scale(type="log"), axis=x_axis)
    domain = [*MODELS]
    model = Chart(InlineData(values=rows)).encode(
        x,
        altair.Color(
            "model:N",
            scale=Scale(domain=domain, range=[GRAY, BLUE, RED]),
            legend=altair.Legend(title=None, orient="bottom"),
        ),
    )
    median = altair.Y("median:Q", title=title, scale=scale)
    shapes = Scale(domain=domain, range=["square", "circle", "triangle-up"])
    return altair.layer(
        model.mark_rule().encode(y=altair.Y("low:Q", scale=scale), y2="high:Q"),
        model.mark_line().encode(median),
        model.mark_point(filled=True, size=50).encode(
            median, altair.Shape("model:N", scale=shapes)
        ),
    ).properties(width=260, height=200)


def _spread(row: dict[str, Any], label: str) -> dict[str, float]:
    found: dict[str, float] = next(q["spread"] for q in row["quantities"] if q["label"] == label)
    return found


def main(numbers: Path, stem: Path) -> None:
    """Draw the numbers of a JSON file."""
    stored = json.loads(numbers.read_text(encoding="utf-8"))
    [path] = save_chart(draw(stored["benchmarks"]["model_size"]["rows"]), stem, kinds=["png"])
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
