"""Charts of reports, described once for the page as well as for PNG and SVG.

A chart is JSON in the language of Vega-Lite, written here as it is documented there. The front
shows cost against quality with one standard error; on the page, menus choose other axes. Python
finds the front of every pair of axes, so the chart only looks up who is on it. All distinctions of
color are shapes or dashes as well. The same results give the same bytes.
"""

from __future__ import annotations

import json
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
    COST,
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
from orchestrator.reporting.front import Front, Row, known
from orchestrator.reporting.results import Curve, vanilla_of
from orchestrator.reporting.tables import confidence_text, model_rows
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
    front: Front,
    *,
    fronts: Sequence[Front] = (),
    title: str = "",
    mark_paper: bool = False,
    height: int = HEIGHT,
) -> Spec:
    """Return the chart of a front; the trials of each sweep have a color and a shape.

    The members of the front are filled, and named as are the full model and the baselines.

    Args:
        front: The front.
        fronts: What `menu_fronts` returns of it, if that is known already.
        title: Title of the picture.
        mark_paper: Mark the paper's headline, scaled to the full model, if the quality is an
            accuracy; on costs that vanilla of the same shape is known to have.
        height: In pixels; names are placed for it.

    Raises:
        ValueError: If the front has no point.
    """
    if not front.rows:
        raise ValueError("a front needs at least one result with a cost and a quality")
    rows = model_rows(front)
    fronts = fronts or menu_fronts(front)
    costs = list(dict.fromkeys(placed.axes.cost for placed in fronts))
    qualities = list(dict.fromkeys(placed.axes.quality for placed in fronts))
    paper = [_paper_place(front, placed) if mark_paper else None for placed in fronts]

    sweeps = front.sweeps
    groups = [*(sweeps or [TRIAL]), TEACHER, BASELINE]
    colors = [*islice(cycle(SERIES_COLORS), len(groups) - 2), INK, GRAY]
    shapes = [*islice(cycle(TRIAL_SHAPES), len(groups) - 2), STAR, "diamond"]
    if mark_paper and front.axes.quality_metric.is_percent:
        groups.append(PAPER_MARK)
        colors.append(INK)
        shapes.append(CROSS)
    legend = {**BELOW, "columns": COLUMNS, "labelLimit": 260, "symbolSize": 100}
    color = word("group", legend=legend, scale={"domain": groups, "range": colors})
    shape = word("group", legend=legend, scale={"domain": groups, "range": shapes})

    # One layer has the axes; they all have the same scales.
    scale = {"zero": False, "nice": False}
    # Better is higher up: a loss is drawn upside down.
    y_scale = {**scale, "padding": PADDING_Y, "reverse": {"expr": "is_loss"}}
    x = number("x", axis=None, scale={**scale, "padding": PADDING_X})
    y = number("y", axis=None, scale=y_scale)
    low = number("low", axis=None, scale=y_scale)
    x_axis = {"title": {"signal": "titles[cost]"}, "tickCount": 8}
    x_axis["tickMinStep"] = {"expr": f"cost == '{NFE}' ? 1 : 0"}
    y_axis: Spec = {"title": {"signal": "titles[quality]"}}
    y_axis["labelExpr"] = "is_share ? format(datum.value, '.4~p') : datum.label"

    members = {"filter": "datum.is_member"}
    last = {"joinaggregate": [{"op": "max", "field": "x", "as": "last"}]}
    step = {"x": x, "y": y, "color": {"value": INK if sweeps else BLUE}}
    bar = {"x": x, "y": low, "y2": {"field": "high"}, "color": color}
    point = {"x": x, "y": y, "color": color, "shape": shape, "tooltip": word("tip")}
    point |= {"fill": word("fill", scale=None), "size": number("size", scale=None)}
    paper_points = [
        {"group": PAPER_MARK, "number": pair, "x": place[0], "y": place[1]}
        for pair, place in enumerate(paper)
        if place
    ]
    name_look: Spec = {"fontSize": 12}
    # The chart looks up in lists how the name at a place is aligned and shifted.
    by_place = zip(*NAME_PLACES, strict=True)
    for name, values in zip(("align", "dx", "dy"), by_place, strict=True):
        name_look[name] = {"expr": f"{json.dumps(values)}[datum.place]"}

    def paper_mark(stroke: str, stroke_width: float) -> Spec:
        return marks(
            "point",
            {"x": x, "y": y, "shape": shape},
            values=paper_points,
            where=[{"filter": "datum.number == pair"}],
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
        # The best quality at each cost; flat after the last member.
        marks("line", step, where=[members], interpolate="step-after", strokeWidth=2),
        marks(
            "rule",
            {**step, "x2": {"field": "most"}},
            where=[members, last, {"filter": "datum.x == datum.last"}],
            strokeWidth=2,
        ),
        marks(
            "rule",
            {**bar, "opacity": _bold_or_faint(0.8, 0.3)},
            where=[{"filter": "datum.error > 0"}],
            strokeWidth=1.2,
        ),
        marks(
            "point",
            {**point, "strokeOpacity": _bold_or_faint(1.0, 0.45)},
            strokeWidth=1.6,
            opacity=1,
        ),
    ]
    if mark_paper:
        layers.append(paper_mark(INK, 2.4))
    # Names, each above a halo of its letters, so that lines do not cross it.
    halo: Spec = {"stroke": BACKGROUND, "strokeWidth": 4, "strokeJoin": "round"}
    text = {"x": x, "y": y, "text": word("name")}
    is_named = [{"filter": "datum.place >= 0"}]
    layers.append(marks("text", text, where=is_named, **name_look, **halo))
    layers.append(marks("text", text, where=is_named, **name_look))
    place = f"datum.places[pair * {len(NAME_WIDTHS)} + (width < {PHONE_WIDTH} ? 1 : 0)]"
    calculated = {
        "error": f"datum[quality + '{STDERR_SUFFIX}'] || 0",
        "low": "datum.y - datum.error",
        "high": "datum.y + datum.error",
        "is_member": "indexof(datum.members, pair) >= 0",
        "is_full": f"datum.group == '{TEACHER}'",
        "is_baseline": f"datum.group == '{BASELINE}'",
        "is_bold": "datum.is_member || datum.is_full || datum.is_baseline",
        "fill": f"datum.is_full ? '{ORANGE}' : datum.is_member ? datum.color : '{BACKGROUND}'",
        "size": "datum.key == hovered ? 400 : datum.is_full ? 240 : datum.is_member ? 110 : 80",
        "name": "datum.label + (indexof(datum.knees, pair) >= 0 ? ' (knee)' : '')",
        "place": place,
    }
    chart = {
        "data": {"values": _front_data(front, fronts, rows, paper, height)},
        "transform": [
            {"calculate": "datum[cost]", "as": "x"},
            {"calculate": "datum[quality]", "as": "y"},
            {"filter": "isValid(datum.x) && isValid(datum.y)"},
            {"joinaggregate": [{"op": "max", "field": "x", "as": "most"}]},
            *({"calculate": formula, "as": name} for name, formula in calculated.items()),
        ],
        "params": _params(front, costs, qualities),
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
    has_baselines = any(not row["is_candidate"] for row in front.rows)
    models = "the best of teacher and students" if has_baselines else "the best quality"
    return f"filled: on the front; line: {models} at each cost; bars: one standard error"


def menu_fronts(front: Front) -> list[Front]:
    """Return the front on each pair of axes that the page's menus offer: those that a model has.

    The quality changes first. The front's own axes are the first cost, and one of the qualities.
    """
    rows = model_rows(front)
    measured = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    offered = (front.axes.cost, *COSTS.values())
    costs = [name for name in dict.fromkeys(offered) if name in measured]
    qualities = [
        name for name in measured if name.startswith(QUALITY) and not name.endswith(STDERR_SUFFIX)
    ]
    fronts = []
    for cost, quality in product(costs, qualities):
        axes = replace(front.axes, cost=cost, quality=quality)
        fronts.append(front if axes == front.axes else front.on(axes))
    return fronts


def _bold_or_faint(bold: float, faint: float) -> Spec:
    return {"condition": {"test": "datum.is_bold", "value": bold}, "value": faint}


def _params(front: Front, costs: list[str], qualities: list[str]) -> list[Spec]:
    """Return the menus of the axes, and what follows from the chosen pair; `pair` is its number."""
    losses = [name for name in qualities if not metric_of(name).higher_is_better]
    shares = [name for name in qualities if metric_of(name).is_percent]
    titles = {name: metric_of(name).title for name in (*costs, *qualities)}
    menus = [
        {
            "name": name,
            "bind": {
                "input": "select",
                "options": metrics,
                "labels": [titles[metric] for metric in metrics],
                "name": f"{name.title()} ",
            },
            "value": value,
        }
        for name, metrics, value in (
            ("cost", costs, front.axes.cost),
            ("quality", qualities, front.axes.quality),
        )
    ]
    # Pairs are numbered as in `menu_fronts`: the quality changes first.
    first_of_cost = f"indexof({json.dumps(costs)}, cost) * {len(qualities)}"
    pair = f"{first_of_cost} + indexof({json.dumps(qualities)}, quality)"
    return [
        *menus,
        {"name": "pair", "expr": pair},
        {"name": "is_share", "expr": f"indexof({json.dumps(shares)}, quality) >= 0"},
        {"name": "is_loss", "expr": f"indexof({json.dumps(losses)}, quality) >= 0"},
        {"name": "hovered", "value": ""},
        {"name": "titles", "value": titles},
    ]


def _paper_place(front: Front, placed: Front) -> tuple[float, float] | None:
    """Return where the paper's headline stands; None on axes where it means nothing.

    That is without a full model, on a loss, and on costs that vanilla of the full model's shape is
    not known to have.
    """
    full = placed.full
    cost = placed.axes.cost
    if full is None or not placed.axes.quality_metric.is_percent:
        return None
    if cost == NFE:
        least: float | None = int(front.table["num_layers"][full["key"]])
    else:
        vanilla = vanilla_of(front.table).get(full["key"])
        least = known(front.table.loc[vanilla].to_dict(), cost) if vanilla else None
    if least is None:
        return None
    place = least + PAPER_OVERHEAD_SHARE * (full["cost"] - least)
    return place, PAPER_SHARE_OF_FULL * full["quality"]


def _front_data(
    front: Front,
    fronts: Sequence[Front],
    rows: Sequence[Row],
    paper: Sequence[tuple[float, float] | None],
    height: int,
) -> list[Row]:
    """Return the rows that are drawn.

    A row knows by the number of the pair of axes on which fronts it is, and where its name stands.
    """
    labels = {row["key"]: row["label"] for row in (*front.rows, *front.unmeasured)}
    marks: dict[str, dict[str, list[int]]] = {
        key: {"members": [], "knees": [], "places": []} for key in labels
    }
    for pair, placed in enumerate(fronts):
        picks = [row["key"] for row in placed.picks.values()]
        names: dict[str, str] = {}
        named: set[tuple[float, float]] = set()
        for row in sorted(placed.members, key=lambda row: row["key"] not in picks):
            key = row["key"]
            point = (row["cost"], row["quality"])
            marks[key]["members"].append(pair)
            if point not in named and (len(placed.members) <= MAX_NAMES or key in picks):
                names[key] = labels[key]
            named.add(point)
        if knee := placed.named_picks.get("knee"):
            marks[knee["key"]]["knees"].append(pair)
            names[knee["key"]] += " (knee)"
        beside_front = [
            row for row in placed.rows if row["role"] != "trial" and row["key"] not in names
        ]
        for row in sorted(beside_front, key=lambda row: row["role"] != "teacher"):
            names[row["key"]] = labels[row["key"]]
        for width in NAME_WIDTHS:
            places = place_names(placed, names, (width, height), paper[pair])
            for key, marks_of_model in marks.items():
                marks_of_model["places"].append(places.get(key, -1))
    groups = {"teacher": TEACHER, **dict.fromkeys(BASELINE_ROLES, BASELINE)}
    drawn_rows = []
    for row in rows:
        key = row["key"]
        sweep = row.get("sweep")
        color = SERIES_COLORS[(front.sweeps.index(sweep) if sweep else 0) % len(SERIES_COLORS)]
        measured = {name: row[name] for name in row if name.startswith((COST, QUALITY))}
        drawn_rows.append(
            {name: value for name, value in measured.items() if value is not None}
            | {"label": labels[key], "group": groups.get(row["role"], sweep or TRIAL)}
            | {"color": color, **marks[key], "tip": _tooltip(row), "key": key}
        )
    # Trials first, so that full models and baselines are drawn above them.
    return sorted(drawn_rows, key=lambda row: row["group"] in (TEACHER, BASELINE))


def place_names(
    placed: Front,
    names: Mapping[str, str],
    size: tuple[float, float],
    mark: tuple[float, float] | None = None,
) -> dict[str, int]:
    """Return key of a model -> the place of its name in `NAME_PLACES`, where nothing is covered.

    The first names choose first. One that would cover another name, or end outside, has no place.

    Args:
        placed: The models on their axes.
        names: Key -> name, of those that have one.
        size: Width and height of the chart, in pixels.
        mark: A point that is no model.
    """
    rows = [row for row in placed.rows if math.isfinite(row["cost"] + row["quality"])]
    if not rows:
        return {}
    points = [(row["cost"], row["quality"], known(row, "error") or 0.0) for row in rows]
    costs, qualities, errors = np.array([*points, *([(*mark, 0.0)] if mark else [])]).T

    # What a name must not cover: models, their bars, the line of the front, and what lies outside.
    ends = np.stack([qualities - errors, qualities + errors])
    # Pixels count from the top, and a better quality stands higher.
    width, height = size
    lowest = height - PADDING_Y
    highest = PADDING_Y
    edges = (lowest, highest) if placed.axes.higher_is_better else (highest, lowest)
    x = _pixels(costs, costs, (PADDING_X, width - PADDING_X))
    y = _pixels(qualities, ends, edges)
    ends_of_bars = np.sort([_pixels(values, ends, edges) for values in ends], axis=0)
    circles = _boxes(x - 7, y - 7, x + 7, y + 7)
    bars = _boxes(x - 1, ends_of_bars[0], x + 1, ends_of_bars[1])[: len(rows)]
    inside = _boxes(2, 2, width - 2, height - 2)
    number_of = {row["key"]: number for number, row in enumerate(rows)}
    members = [number_of[row["key"]] for row in placed.members if row["key"] in number_of]
    line = _step_boxes(x[members], y[members], x[: len(rows)].max())

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


def _tooltip(row: Row) -> dict[str, str]:
    """Return title -> number of what a reader looks up of a model."""
    parts = (row["name"], row.get("sweep"), row["threshold"] and f"threshold {row['threshold']}")
    texts = {"title": ", ".join(part for part in parts if part)}
    for name in TOOLTIP_METRICS:
        if (value := row.get(name)) is not None:
            metric = metric_of(name)
            if metric.is_percent:
                error = row.get(stderr_name(name))
                texts[metric.title] = format_with_error(value, error, is_percent=True) + "%"
            else:
                texts[metric.title] = f"{value:,.4g}"
    for name in (CONFIDENCE_KEEPS_99, CONFIDENCE_ON_FRONT):
        if row.get(name) is not None:
            texts[metric_of(name).title] = confidence_text(row[name])
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
