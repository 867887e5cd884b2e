"""Charts of reports, described once for the page as well as for PNG and SVG.

A chart is JSON in the language of Vega-Lite, written here as it is documented there. The front
shows cost against quality with one standard error. Every pair of axes has a chart of its own, whose
data say how each mark looks; on the page, menus choose one of them. All distinctions of color are
shapes or dashes as well. The same results give the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.records.metrics import (
    ACCURACY,
    BITS_PER_BYTE,
    CONFIDENCE_KEEPS_99,
    CONFIDENCE_ON_FRONT,
    COSTS,
    DECODE_MS,
    KV_BYTES,
    NFE,
    NUM_PARAMETERS,
    QUALITY,
    RELATIVE_FLOPS,
    STDERR_SUFFIX,
    VALIDATION_LOSS,
    metric_of,
    stderr_name,
)
from orchestrator.records.trial import BASELINE_ROLES
from orchestrator.reporting.claims import PAPER_OVERHEAD_SHARE, PAPER_SHARE_OF_FULL
from orchestrator.reporting.colors import (
    BACKGROUND,
    BLUE,
    FRAME,
    GRAY,
    GRID,
    INK,
    ORANGE,
    RED,
    SERIES_COLORS,
)
from orchestrator.reporting.front import Front, PlacedModel
from orchestrator.reporting.results import Curve, vanilla_of
from orchestrator.reporting.tables import confidence_text, rounded
from orchestrator.terminal.render import format_with_error
from orchestrator.workspace.files import new_file
from orchestrator.workspace.provenance import content_key, installed_version

DASHES = ([1, 0], [6, 4], [2, 2])
"""Dashes of curves: the next kind begins where the colors begin again."""
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.4.1.json"
WIDTH = 700
HEIGHT = 400
"""Size of a picture; on the page, a chart is as wide as its place."""
LOW_HEIGHT = HEIGHT * 3 // 4
PIXELS_PER_UNIT = 2
BELOW: dict[str, Any] = {"title": None, "orient": "bottom"}
"""A legend below the chart."""
PHONE_WIDTH = 500
"""A chart of fewer pixels is on a phone."""
COLUMNS = {"expr": f"width < {PHONE_WIDTH} ? 1 : 6"}
"""Columns of a legend; a phone has room for one, as names may be long."""
CONFIG = {
    "aria": False,  # Else each mark of the SVG repeats all of its values.
    "font": "sans-serif",
    "axis": {
        "labelFontSize": 12,
        "titleFontSize": 13,
        "titleFontWeight": "normal",
        "labelColor": INK,
        "titleColor": INK,
        "domainColor": GRAY,
        "tickColor": GRAY,
        "gridColor": GRID,
    },
    "legend": {"labelFontSize": 12, "labelColor": INK, "titleColor": INK},
    "title": {"anchor": "start", "fontSize": 14, "color": INK, "subtitleColor": GRAY},
    "text": {"color": INK},
    "view": {"stroke": FRAME},
}

TRIAL = "trial"
TEACHER = "teacher"
BASELINE = "baseline"
STAR = "M0,-1L.24,-.32L.95,-.31L.38,.12L.59,.81L0,.4L-.59,.81L-.38,.12L-.95,-.31L-.24,-.32Z"
CROSS = "M-1,-1L1,1M1,-1L-1,1"
TRIAL_SHAPES = ("circle", "square", "triangle-up", "triangle-down", "triangle-left")
"""Shapes of the trials, one for each sweep."""
MAX_NAMES = 24
"""If a front has more members than this, only its picks are named."""
NAME_PLACES = (
    *(("right", -8, -10), ("left", 8, -10), ("center", 0, -17), ("left", 13, 0), ("right", -13, 0)),
    *(("left", 8, 11), ("right", -8, 11), ("center", 0, 18), ("center", 0, -32), ("center", 0, 33)),
    *(("left", 8, -24), ("left", 8, 25)),
)
"""Where a name may stand, the best first: how it is aligned, and its distance from the model. Above
and left of a member no other member is in the way."""
NAME_WIDTHS = (620, 250)
"""Names are placed in charts of these widths: on other devices, and on a phone."""
LETTER_WIDTH = 6.9
LINE_HEIGHT = 14
PADDING_X = 44
PADDING_Y = 34
"""Pixels from the outermost models to the edges of a chart."""
PAPER_MARK = "paper: 55% less overhead, 99.4% kept"
TOOLTIP_METRICS = (
    NFE,
    RELATIVE_FLOPS,
    DECODE_MS,
    KV_BYTES,
    NUM_PARAMETERS,
    ACCURACY,
    BITS_PER_BYTE,
    VALIDATION_LOSS,
)

Spec = dict[str, Any]
"""A chart, or a part of one, in the JSON of Vega-Lite."""


def save_chart(spec: Spec, stem: Path, formats: Iterable[str] = ("png", "svg")) -> list[Path]:
    """Write a chart as `stem.png` and `stem.svg`; the same chart gives the same bytes.

    An SVG ends with the key of its chart, so one that is there already is not drawn again.
    """
    paths = [stem.with_name(f"{stem.name}.{file_format}") for file_format in formats]
    mark = f"<!-- {content_key(spec, installed_version('vl-convert-python'))} -->".encode()
    with suppress(OSError):
        if all(map(Path.is_file, paths)) and paths[-1].read_bytes().endswith(mark):
            return paths
    import vl_convert  # A large library, which only drawing needs.

    svg: str = vl_convert.vegalite_to_svg(spec)
    # Ids must not depend on the charts that were drawn before.
    ids = dict.fromkeys(re.findall(r'id="([a-z]+_?\d+)"', svg))
    for number, name in enumerate(ids):
        svg = re.sub(rf'(?<=[#"]){name}(?=["\)])', f"id_{number}", svg)
    for path in paths:
        is_svg = path.suffix == ".svg"
        png = b"" if is_svg else vl_convert.svg_to_png(svg, scale=PIXELS_PER_UNIT)
        with new_file(path) as temporary:
            temporary.write_bytes(svg.encode() + mark if is_svg else png)
    return paths


def chart_spec(chart: Spec, *, title: str | Spec = "") -> Spec:
    """Return a chart with the style of all charts."""
    return {"$schema": SCHEMA, **({"title": title} if title else {}), **chart, "config": CONFIG}


def number(field: str, **properties: Any) -> Spec:
    """Return the encoding of a field with numbers."""
    return {"field": field, "type": "quantitative", **properties}


def word(field: str, **properties: Any) -> Spec:
    """Return the encoding of a field with names."""
    return {"field": field, "type": "nominal", **properties}


def marks(
    mark: str,
    encoding: Mapping[str, Spec],
    *,
    values: Sequence[Any] | None = None,
    where: Sequence[Spec] = (),
    **look: Any,
) -> Spec:
    """Return a layer of marks.

    Args:
        mark: Such as `line` or `point`.
        encoding: Channel -> field.
        values: Data of the layer, if they are not the chart's.
        where: Transforms of the data.
        look: Properties of the marks.
    """
    data = {} if values is None else {"data": {"values": values}}
    transform = {"transform": [*where]} if where else {}
    return {**data, **transform, "mark": {"type": mark, **look}, "encoding": {**encoding}}


# The front


def front_chart(
    front: Front, *, title: str = "", mark_paper: bool = False, height: int = HEIGHT
) -> Spec:
    """Return the chart of a front; the trials of each sweep have a color and a shape.

    The members of the front are filled, and named as are the full model and the baselines.

    Args:
        front: The front.
        title: Title of the picture.
        mark_paper: Mark the paper's headline, scaled to the full model, if the quality is an
            accuracy; on costs that vanilla of the same shape is known to have.
        height: In pixels; names are placed for it.

    Raises:
        ValueError: If the front has no model.
    """
    if not front.models:
        raise ValueError("a front needs at least one result")
    axes = front.axes
    quality = axes.quality_metric
    paper = _paper_place(front) if mark_paper else None

    sweeps = front.sweeps
    groups = [*(sweeps or [TRIAL]), TEACHER, BASELINE]
    colors = [*islice(cycle(SERIES_COLORS), len(groups) - 2), INK, GRAY]
    shapes = [*islice(cycle(TRIAL_SHAPES), len(groups) - 2), STAR, "diamond"]
    if mark_paper and quality.is_percent:
        groups.append(PAPER_MARK)
        colors.append(INK)
        shapes.append(CROSS)
    legend = {**BELOW, "columns": COLUMNS, "labelLimit": 260, "symbolSize": 100}
    legend["symbolFillColor"] = "transparent"  # Else black, where a mark has a fill of its own.
    color = word("group", legend=legend, scale={"domain": groups, "range": colors})
    shape = word("group", legend=legend, scale={"domain": groups, "range": shapes})

    # One layer has the axes; they all have the same scales.
    scale = {"zero": False, "nice": False}
    # Better is higher up: a loss is drawn upside down.
    y_scale = {**scale, "padding": PADDING_Y, "reverse": not axes.higher_is_better}
    x = number("x", axis=None, scale={**scale, "padding": PADDING_X})
    y = number("y", axis=None, scale=y_scale)
    x_axis: Spec = {"title": axes.cost_metric.title, "tickCount": 8}
    if axes.cost == NFE:
        x_axis["tickMinStep"] = 1
    y_axis: Spec = {"title": quality.title}
    if quality.is_percent:
        y_axis["format"] = ".4~p"

    # The best quality at each cost; flat after the last member.
    points = _points(front)
    members = [point for point in points if point["is_member"]]
    steps = [{"x": member["x"], "y": member["y"]} for member in sorted(members, key=_by_cost)]
    if steps:
        steps.append({**steps[-1], "x": max(point["x"] for point in points)})
    step = {"x": x, "y": y, "color": {"value": INK if sweeps else BLUE}}

    bars = [point for point in points if point["high"] > point["low"]]
    low = number("low", axis=None, scale=y_scale)
    bar = {"x": x, "y": low, "y2": {"field": "high"}, "color": color}
    bar["opacity"] = number("bar_opacity", scale=None)

    size = number("size", scale=None, condition={"test": "datum.key == hovered", "value": 400})
    model = {"x": x, "y": y, "color": color, "shape": shape, "tooltip": word("tip"), "size": size}
    model["fill"] = word("fill", scale=None)
    model["strokeOpacity"] = number("opacity", scale=None)

    def paper_mark(stroke: str, stroke_width: float) -> Spec:
        return marks(
            "point",
            {"x": x, "y": y, "shape": shape},
            values=[{"group": PAPER_MARK, "x": paper[0], "y": paper[1]}] if paper else [],
            size=90,
            opacity=1,
            strokeCap="round",
            stroke=stroke,
            strokeWidth=stroke_width,
        )

    layers = [
        marks("point", {"x": {**x, "axis": x_axis}, "y": {**y, "axis": y_axis}}, opacity=0),
        # Below the line of the front, which it would cut; it covers the grid alone.
        *([paper_mark(BACKGROUND, 8)] if mark_paper else []),
        marks("line", step, values=steps, interpolate="step-after", strokeWidth=2),
        marks("rule", bar, values=bars, strokeWidth=1.2),
        marks("point", model, strokeWidth=1.6, opacity=1),
    ]
    if mark_paper:
        layers.append(paper_mark(INK, 2.4))
    # Names, each above a halo of its letters, so that lines do not cross it.
    text = {"x": x, "y": y, "text": word("name")}
    is_of_width = [{"filter": f"datum.is_on_phone == (width < {PHONE_WIDTH})"}]
    look: Spec = {name: {"expr": f"datum.{name}"} for name in ("align", "dx", "dy")}
    look["fontSize"] = 12
    halo: Spec = {"stroke": BACKGROUND, "strokeWidth": 4, "strokeJoin": "round"}
    for outline in (halo, {}):
        name = marks("text", text, where=is_of_width, **look, **outline)
        layers.append({"data": {"name": "names"}, **name})
    chart = {
        "data": {"values": points},
        "datasets": {"names": _names(front, paper, height)},
        "params": [{"name": "hovered", "value": ""}],
        "layer": layers,
        "resolve": {"axis": {"x": "independent", "y": "independent"}},
        "width": WIDTH,
        "height": height,
    }
    return chart_spec(
        chart, title={"text": title, "subtitle": front_legend(front)} if title else ""
    )


def front_legend(front: Front) -> str:
    """Return what a picture's marks mean."""
    has_baselines = any(not model.is_candidate for model in front.placed)
    models = "the best of teacher and students" if has_baselines else "the best quality"
    return f"filled: on the front; line: {models} at each cost; bars: one standard error"


def menu_fronts(front: Front) -> list[Front]:
    """Return the front on each pair of axes that the page's menus offer: those that a model has.

    The quality changes first. The front's own axes are the first cost, and one of the qualities.
    """
    measured = {front.axes.cost, front.axes.quality}
    for model in front.models:
        measured |= {name for name, value in model.numbers.items() if rounded(value) is not None}
    offered = (front.axes.cost, *COSTS.values())
    costs = [name for name in dict.fromkeys(offered) if name in measured]
    qualities = [
        name
        for name in sorted(measured)
        if name.startswith(QUALITY) and not name.endswith(STDERR_SUFFIX)
    ]
    fronts = []
    for cost, quality in product(costs, qualities):
        axes = replace(front.axes, cost=cost, quality=quality)
        fronts.append(front if axes == front.axes else front.on(axes))
    return fronts


def _paper_place(front: Front) -> tuple[float, float] | None:
    """Return where the paper's headline stands; None on axes where it means nothing.

    That is without a full model, on a loss, and on costs that vanilla of the full model's shape is
    not known to have.
    """
    full = front.full
    cost = front.axes.cost
    if full is None or not front.axes.quality_metric.is_percent:
        return None
    if cost == NFE:
        least: float | None = full.config.num_layers
    else:
        vanilla = vanilla_of(front.models).get(full.key)
        by_key = {model.key: model for model in front.models}
        least = by_key[vanilla].number(cost) if vanilla else None
    if least is None:
        return None
    place = least + PAPER_OVERHEAD_SHARE * (full.cost - least)
    return place, PAPER_SHARE_OF_FULL * full.quality


def _drawn_models(front: Front) -> list[PlacedModel]:
    """Return the models that have a place on a page: an infinite loss has none."""
    return [model for model in front.placed if math.isfinite(model.cost + model.quality)]


def _points(front: Front) -> list[dict[str, Any]]:
    """Return what is drawn of each model, in the order in which they are drawn."""
    groups = {"teacher": TEACHER, **dict.fromkeys(BASELINE_ROLES, BASELINE)}
    points = []
    for model in _drawn_models(front):
        series = front.sweeps.index(model.sweep) if model.sweep else 0
        color = SERIES_COLORS[series % len(SERIES_COLORS)]
        is_full = model.role == "teacher"
        is_bold = model.on_front or is_full or model.role in BASELINE_ROLES
        fill = BACKGROUND
        size = 80
        if is_full:
            fill = ORANGE
            size = 240
        elif model.on_front:
            fill = color
            size = 110
        error = rounded(model.error) or 0.0
        points.append(
            {
                "key": model.key,
                "group": groups.get(model.role, model.sweep or TRIAL),
                "x": rounded(model.cost),
                "y": rounded(model.quality),
                "low": rounded(model.quality - error),
                "high": rounded(model.quality + error),
                "is_member": model.on_front,
                "fill": fill,
                "size": size,
                "opacity": 1.0 if is_bold else 0.45,
                "bar_opacity": 0.8 if is_bold else 0.3,
                "tip": _tooltip(model),
            }
        )
    # Trials first, so that full models and baselines are drawn above them.
    return sorted(points, key=lambda point: point["group"] in (TEACHER, BASELINE))


def _by_cost(point: Mapping[str, Any]) -> float:
    return float(point["x"])


def _names(front: Front, paper: tuple[float, float] | None, height: int) -> list[dict[str, Any]]:
    """Return the names of models with their places: those of screens, then those of phones."""
    picks = [pick.key for pick in front.picks.values()]
    names: dict[str, str] = {}
    named: set[tuple[float, float]] = set()
    for member in sorted(front.members, key=lambda member: member.key not in picks):
        point = (member.cost, member.quality)
        if point not in named and (len(front.members) <= MAX_NAMES or member.key in picks):
            names[member.key] = member.label
        named.add(point)
    if knee := front.named_picks.get("knee"):
        names[knee.key] += " (knee)"
    others = [model for model in front.placed if model.role != "trial" and model.key not in names]
    for model in sorted(others, key=lambda model: model.role != "teacher"):
        names[model.key] = model.label

    placed_names = []
    for width in NAME_WIDTHS:
        places = place_names(front, names, (width, height), paper)
        for model in front.placed:
            if model.key not in places:
                continue
            align, dx, dy = NAME_PLACES[places[model.key]]
            place = {"align": align, "dx": dx, "dy": dy, "is_on_phone": width < PHONE_WIDTH}
            x = rounded(model.cost)
            y = rounded(model.quality)
            placed_names.append({"name": names[model.key], "x": x, "y": y, **place})
    return placed_names


def place_names(
    front: Front,
    names: Mapping[str, str],
    size: tuple[float, float],
    mark: tuple[float, float] | None = None,
) -> dict[str, int]:
    """Return key of a model -> the place of its name in `NAME_PLACES`, where nothing is covered.

    The first names choose first. One that would cover another name, or end outside, has no place.

    Args:
        front: The models on their axes.
        names: Key -> name, of those that have one.
        size: Width and height of the chart, in pixels.
        mark: A point that is no model.
    """
    models = _drawn_models(front)
    if not models:
        return {}
    points = [(model.cost, model.quality, model.error or 0.0) for model in models]
    costs, qualities, errors = np.array([*points, *([(*mark, 0.0)] if mark else [])]).T

    # What a name must not cover: models, their bars, the line of the front, and what lies outside.
    ends = np.stack([qualities - errors, qualities + errors])
    # Pixels count from the top, and a better quality stands higher.
    width, height = size
    lowest = height - PADDING_Y
    highest = PADDING_Y
    edges = (lowest, highest) if front.axes.higher_is_better else (highest, lowest)
    x = _pixels(costs, costs, (PADDING_X, width - PADDING_X))
    y = _pixels(qualities, ends, edges)
    ends_of_bars = np.sort([_pixels(values, ends, edges) for values in ends], axis=0)
    circles = _boxes(x - 7, y - 7, x + 7, y + 7)
    bars = _boxes(x - 1, ends_of_bars[0], x + 1, ends_of_bars[1])[: len(models)]
    inside = _boxes(2, 2, width - 2, height - 2)
    number_of = {model.key: number for number, model in enumerate(models)}
    members = [number_of[member.key] for member in front.members if member.key in number_of]
    line = _step_boxes(x[members], y[members], x[: len(models)].max())

    # How much of a name lies left of the point that it is aligned to, at each place.
    part_by_alignment = {"left": 0.0, "center": 0.5, "right": 1.0}
    parts_left = np.array([part_by_alignment[alignment] for alignment, _, _ in NAME_PLACES])
    right, down = np.array([shift for _, *shift in NAME_PLACES], dtype=float).T
    taken_boxes = np.empty((0, 4))
    place_by_key: dict[str, int] = {}
    for key, name in names.items():
        if key not in number_of:
            continue
        number = number_of[key]
        length = LETTER_WIDTH * len(name)
        left = x[number] + right - parts_left * length
        middle = y[number] + down
        boxes = _boxes(left, middle - LINE_HEIGHT / 2, left + length, middle + LINE_HEIGHT / 2)
        # Pixels of each place that another name has, or that lie outside.
        lost = _covered(boxes, taken_boxes) + length * LINE_HEIGHT - _covered(boxes, inside)
        covered = 10 * _covered(boxes, circles) + _covered(boxes, bars) + _covered(boxes, line)
        best = int(np.argmin(np.where(lost < 1, covered, np.inf)))
        if lost[best] < 1:
            place_by_key[key] = best
            taken_boxes = np.vstack([taken_boxes, boxes[best]])
    return place_by_key


def _pixels(values: Any, range_of: Any, edges: tuple[float, float]) -> Any:
    """Return where values stand between two edges, which are the ends of a range."""
    least = range_of.min()
    most = range_of.max()
    relative = (values - least) / (most - least) if most > least else np.full(len(values), 0.5)
    return edges[0] + (edges[1] - edges[0]) * relative


def _step_boxes(x: Any, y: Any, end: float) -> Any:
    """Return the boxes of a line of steps: each height lasts until the next point, or the end."""
    ends = np.append(x[1:], end)
    flat = _boxes(x, y - 1, ends, y + 1)
    steep = _boxes(
        ends[:-1] - 1, np.minimum(y[:-1], y[1:]), ends[:-1] + 1, np.maximum(y[:-1], y[1:])
    )
    return np.concatenate([flat, steep])


def _boxes(left: Any, top: Any, right: Any, bottom: Any) -> Any:
    return np.stack(np.broadcast_arrays(left, top, right, bottom), axis=-1).reshape(-1, 4)


def _covered(boxes: Any, covers: Any) -> Any:
    """Return how many pixels of each box all covers cover, those of two covers twice."""
    corners = np.minimum(boxes[:, None, 2:], covers[None, :, 2:])
    sides = corners - np.maximum(boxes[:, None, :2], covers[None, :, :2])
    return np.clip(sides, 0, None).prod(axis=2).sum(axis=1)


def _tooltip(model: PlacedModel) -> dict[str, str]:
    """Return title -> number of what a reader looks up of a model."""
    threshold = model.trial.threshold_text
    parts = (model.trial.name, model.sweep, threshold and f"threshold {threshold}")
    texts = {"title": ", ".join(part for part in parts if part)}
    for name in TOOLTIP_METRICS:
        if (value := rounded(model.number(name))) is not None:
            metric = metric_of(name)
            if metric.is_percent:
                error = rounded(model.number(stderr_name(name)))
                texts[metric.title] = format_with_error(value, error, is_percent=True) + "%"
            else:
                texts[metric.title] = f"{value:,.4g}"
    for name in (CONFIDENCE_KEEPS_99, CONFIDENCE_ON_FRONT):
        if (confidence := model.number(name)) is not None:
            texts[metric_of(name).title] = confidence_text(confidence)
    return texts


# Influence, curves and depth


def influence_chart(
    rows: Sequence[Sequence[float]],
    *,
    metric: str,
    title: str = "",
    marked_schedule: Sequence[int] | None = None,
    marked_name: str = "",
) -> Spec:
    """Return the heat map of the influence of every correction.

    Colors are on a logarithmic scale, because influence falls by powers of ten.

    Args:
        rows: Influence of correction 1, 2, ... for each layer; rows may differ in length. NaN is a
            correction that the layer does not have.
        metric: Name of the measure.
        title: Title of the picture.
        marked_schedule: A line is drawn after the last correction that it keeps of each layer.
        marked_name: Name of that schedule in the legend.

    Raises:
        ValueError: If there is no correction to draw.
    """
    cells: list[dict[str, Any]] = [
        {"layer": layer, "correction": number, "influence": value, "text": f"{value:.2g}"}
        for layer, row in enumerate(rows, start=1)
        for number, value in enumerate(row, start=1)
        if not math.isnan(value)
    ]
    if not cells:
        raise ValueError("an influence heat map needs at least one correction")
    # Zero, and negative values from noise, get the color of the smallest positive influence.
    positive = [cell["influence"] for cell in cells if cell["influence"] > 0] or [1.0]
    least = min(positive)
    most = max(positive)
    for cell in cells:
        cell["shown"] = max(cell["influence"], least)
        cell["ink"] = "white" if cell["shown"] ** 2 < least * most else "black"
    width = max(cell["correction"] for cell in cells)

    def cell_axis(title: str, count: int, **scale: Any) -> Spec:
        """Return scale and axis of cells from 1 on, whose middles have the ticks."""
        ticks = {"values": [*range(1, count + 1)], "format": "d"}
        bare = {"grid": False, "ticks": False, "domain": False}
        return {
            "scale": {"domain": [0.5, count + 0.5], "nice": False, **scale},
            "axis": {"title": title, **ticks, **bare},
        }

    columns = cell_axis("Correction", width)
    lines = cell_axis("Layer", len(rows), reverse=True)
    x = number("from", **columns)
    y = number("top", **lines)
    domain = [least, most if most > least else 2 * least]
    bar: Spec = {"title": f"Influence ({metric})", "format": ".1~g", "orient": "bottom"}
    bar |= {"gradientLength": 180, "values": sorted({least, math.sqrt(least * most), most})}
    color = number(
        "shown", scale={"type": "log", "scheme": "viridis", "domain": domain}, legend=bar
    )
    with_edges = [
        {"calculate": f"datum.{formula}", "as": name}
        for name, formula in (
            ("from", "correction - 0.5"),
            ("to", "correction + 0.5"),
            ("top", "layer - 0.5"),
            ("bottom", "layer + 0.5"),
        )
    ]
    area = {"x": x, "x2": {"field": "to"}, "y": y, "y2": {"field": "bottom"}, "color": color}
    middle = {"x": number("correction", **columns), "y": number("layer", **lines)}
    text = {**middle, "text": word("text"), "color": word("ink", scale=None)}
    layers = [
        marks("rect", area, where=with_edges),
        marks("text", text, where=with_edges, fontSize=12),
    ]
    if marked_schedule is not None:
        name = f"kept: {marked_name}" if marked_name else "kept"
        corners = [
            {"from": r + 0.5, "top": layer + edge, "order": 2 * layer + edge, "name": name}
            for layer, r in enumerate(marked_schedule, start=1)
            for edge in (-0.5, 0.5)
        ]
        legend = {**BELOW, "symbolType": "stroke", "labelLimit": 300}
        stroke = word("name", scale={"range": [RED]}, legend=legend)
        cut = {"x": x, "y": y, "order": number("order"), "stroke": stroke}
        layers.append(marks("line", cut, values=corners, strokeWidth=3, clip=False))
    chart = {
        "data": {"values": cells},
        "layer": layers,
        "resolve": {"scale": {"color": "independent"}},
        "width": max(180, 90 * width),
        "height": max(60, 28 * len(rows)),
    }
    return chart_spec(chart, title=title)


def curves_chart(title: str, curves: Sequence[Curve]) -> Spec:
    """Return the chart of curves over steps."""
    points = [
        {"name": name, "step": step, "value": value}
        for name, values in curves
        for step, value in values
        if math.isfinite(value)
    ]
    names = list(dict.fromkeys(name for name, _ in curves))
    colors = [SERIES_COLORS[n % len(SERIES_COLORS)] for n in range(len(names))]
    dashes = [DASHES[n // len(SERIES_COLORS) % len(DASHES)] for n in range(len(names))]
    legend = {**BELOW, "columns": COLUMNS, "labelLimit": 200, "symbolType": "stroke"}
    encoding = {
        "x": number("step", title="Step", scale={"nice": False}),
        "y": number("value", title=title, scale={"zero": False}),
        "color": word("name", scale={"domain": names, "range": colors}, legend=legend),
        "strokeDash": word("name", scale={"domain": names, "range": dashes}, legend=legend),
    }
    chart = marks("line", encoding, values=points, strokeWidth=1.8, tooltip=True)
    return chart_spec({**chart, "width": WIDTH, "height": LOW_HEIGHT})
