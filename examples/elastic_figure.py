"""The picture of the elastic study: what a longer elastic training buys, schedule by schedule.

One panel for each teacher. From left to right the elastic training gets longer; its cost is given
as a share of that of the separate students. A line is a schedule: how much worse the elastic
weights are than its student. Dashed lines are the bars: the study asks for points below and left
of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import altair
from altair import Chart, InlineData, Scale

from orchestrator.reporting.charts import GRAY, INK, chart_spec, save_chart

Lines = dict[str, list[tuple[float, float]]]
"""Schedule -> share of the training FLOPs, and how much worse than its student."""


def write_figure(
    panels: Mapping[str, tuple[str, Lines, float]], max_share: float, stem: Path
) -> list[Path]:
    """Write the picture as PNG and SVG.

    Args:
        panels: Teacher -> label of the vertical axis, lines, and the most that is allowed.
        max_share: Largest share of the FLOPs that is allowed.
        stem: Path without the ending.
    """
    charts = [_panel(teacher, *content, max_share) for teacher, content in panels.items()]
    whole = altair.hconcat(*charts).resolve_scale(color="independent", shape="independent")
    return save_chart(chart_spec(whole), stem)


def _panel(
    teacher: str, label: str, lines: Lines, most: float, max_share: float
) -> altair.LayerChart:
    rows = [
        {"schedule": name, "percent": 100 * share, "worse": worse}
        for name, points in lines.items()
        for share, worse in points
    ]
    # From the costliest schedule, dark, to the cheapest, light.
    shades = Scale(domain=[*lines], scheme=altair.SchemeParams("viridis", extent=[0, 0.85]))
    x = altair.X("percent:Q", title="training FLOPs, % of the separate students'")
    y = altair.Y("worse:Q", title=label)
    shape = altair.Shape("schedule:N", scale=Scale(domain=[*lines]))
    curves = Chart(InlineData(values=rows)).encode(
        x, y, altair.Color("schedule:O", scale=shades, sort=[*lines])
    )
    bars = [
        Chart(InlineData(values=[bar])).mark_rule(color=color, strokeDash=dash).encode(**place)
        for bar, place, color, dash in (
            ({"worse": most}, {"y": "worse:Q"}, GRAY, [6, 4]),
            ({"percent": 100 * max_share}, {"x": "percent:Q"}, GRAY, [6, 4]),
            ({"worse": 0.0}, {"y": "worse:Q"}, INK, [1, 0]),
        )
    ]
    points = curves.mark_point(filled=True, size=50).encode(shape)
    return altair.layer(*bars, curves.mark_line(strokeWidth=1.3), points).properties(
        title=teacher, width=360, height=320
    )
