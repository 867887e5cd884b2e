"""Boxes, arrows and texts as a chart, for the drawings of the documentation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import altair
from altair import Chart, InlineData, Scale

from orchestrator.reporting.charts import Spec, chart_spec
from orchestrator.reporting.colors import GRAY, INK

Point = tuple[float, float]


def box(left: float, bottom: float, width: float, height: float, color: str) -> dict[str, Any]:
    """Return a box for `diagram`."""
    edges = {"x": left, "y": bottom, "x2": left + width, "y2": bottom + height}
    return {**edges, "color": color}


def text(x: float, y: float, words: str, **look: Any) -> dict[str, Any]:
    """Return words for `diagram`: `color`, `align`, `is_bold` and `halo` if they are not usual."""
    usual = {"color": INK, "align": "center", "is_bold": False, "halo": False}
    return {"x": x, "y": y, "words": words.split("\n"), **usual, **look}


def diagram(
    size: Point,
    unit: Point,
    *,
    boxes: Iterable[dict[str, Any]] = (),
    arrows: Iterable[tuple[Point, Point]] = (),
    texts: Iterable[dict[str, Any]] = (),
    corner: int = 5,
) -> altair.LayerChart:
    """Return a drawing without axes.

    Args:
        size: Width and height; the origin is at the bottom left.
        unit: Pixels of a unit, across and up.
        boxes: From `box`.
        arrows: Start and end.
        texts: From `text`.
        corner: Radius of the boxes' corners in pixels.
    """
    across = Scale(domain=[0, size[0]], nice=False)
    x = altair.X("x:Q", axis=None, scale=across)
    y = altair.Y("y:Q", axis=None, scale=Scale(domain=[0, size[1]], nice=False))
    lines = [{"x": a[0], "y": a[1], "x2": b[0], "y2": b[1]} for a, b in arrows]
    heads = [_head(start, end, unit) for start, end in arrows]
    edges = {"x2": "x2:Q", "y2": "y2:Q"}
    rules = Chart(InlineData(values=lines)).mark_rule(color=GRAY, strokeWidth=1.4)
    marks = Chart(InlineData(values=heads)).mark_point(
        shape="triangle", size=80, filled=True, color=GRAY, opacity=1
    )
    corners = Chart(InlineData(values=[*boxes])).mark_rect(
        stroke=INK, strokeWidth=0.8, cornerRadius=corner
    )
    layers = [
        rules.encode(x, y, **edges),
        corners.encode(x, y, altair.Fill("color:N", scale=None), **edges),
        marks.encode(x, y, angle=altair.Angle("angle:Q", scale=None)),
    ]
    for words in texts:
        own = Chart(InlineData(values=[words]))
        weight = "bold" if words["is_bold"] else "normal"
        rows = -6.5 * (len(words["words"]) - 1)
        look = {"align": words["align"], "fontSize": 12.5, "fontWeight": weight, "dy": rows}
        if words["halo"]:
            halo = own.mark_text(baseline="middle", stroke="white", strokeWidth=5, **look)
            layers.append(halo.encode(x, y, text=altair.value(words["words"])))
        written = own.mark_text(baseline="middle", color=words["color"], **look)
        layers.append(written.encode(x, y, text=altair.value(words["words"])))
    return altair.layer(*layers).properties(width=unit[0] * size[0], height=unit[1] * size[1])


def drawing(chart: Any) -> Spec:
    """Return the JSON of a drawing, without the frame of a chart."""
    spec = chart_spec(chart.to_dict())
    return {**spec, "config": {**spec["config"], "view": {"stroke": None}}}


def _head(start: Point, end: Point, unit: Point) -> dict[str, float]:
    """Return the place of an arrow's head, just before its end, and its angle from upward."""
    across = unit[0] * (end[0] - start[0])
    up = unit[1] * (end[1] - start[1])
    back = 5.0 / math.hypot(across, up)
    x, y = (b - back * (b - a) for a, b in zip(start, end, strict=True))
    return {"x": x, "y": y, "angle": math.degrees(math.atan2(across, up))}
