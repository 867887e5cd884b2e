"""Charts of reports: Altair describes each once, for the page as well as for PNG and SVG.

The front shows cost against quality with one standard error; on the page, menus choose other axes.
Python finds the front of every pair of axes (`pareto`), so the chart only looks up who is on it.
Colors are Okabe and Ito's, which color-blind readers can distinguish; all distinctions are shapes
or dashes as well. The same results give the same bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import altair
import numpy as np
import vl_convert
from altair import Axis, Chart, Color, InlineData, Legend, Scale, X, Y

from orchestrator.records.evaluation import DepthCurve
from orchestrator.reporting.claims import PAPER_KEPT_SHARE, PAPER_OVERHEAD_SHARE
from orchestrator.reporting.front import (
    COSTS,
    Front,
    FrontAxes,
    Row,
    find_front,
    is_accuracy,
    known,
    metric_title,
)
from orchestrator.reporting.results import OVERHEADS, Curve, vanilla_of
from orchestrator.reporting.statistics import KEEPS_METRIC, ON_FRONT_METRIC
from orchestrator.reporting.tables import confidence_text, model_rows
from orchestrator.terminal.render import format_with_error
from orchestrator.workspace.files import new_file
from orchestrator.workspace.provenance import content_key, installed_version

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, INK, GRAY, GRID = "#CC79A7", "#56B4E9", "#1c1c1c", "#757575", "#e6e6e6"
SERIES_COLORS = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
DASHES = ([1, 0], [6, 4], [2, 2])
"""Of curves; the next one begins where the colors begin again."""
WIDTH, HEIGHT = 700, 400
"""Size of a picture; on the page, a chart is as wide as its place."""
PIXELS_PER_UNIT = 2
COLUMNS = {"expr": "width < 500 ? 2 : 6"}
"""Of a legend; a phone is narrow."""
CONFIG = {
    "aria": False,  # Else each mark of the SVG repeats all of its values.
    "font": "sans-serif",
    "axis": {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal"},
    "legend": {"labelFontSize": 12},
    "title": {"anchor": "start", "fontSize": 14, "subtitleColor": GRAY},
    "view": {"stroke": "#bbbbbb"},
}

LEGEND = "filled: on the front; line: the best quality at each cost; bars: one standard error"
TRIAL, FULL_MODEL, BASELINE = "trial", "full model", "baseline"
STAR = "M0,-1L.24,-.32L.95,-.31L.38,.12L.59,.81L0,.4L-.59,.81L-.38,.12L-.95,-.31L-.24,-.32Z"
CROSS = "M-1,-1L1,1M1,-1L-1,1"
TRIAL_SHAPES = ("circle", "square", "triangle-up", "triangle-down", "triangle-left")
"""Of the trials of each sweep."""
MAX_NAMES = 24
"""Of more members of a front, only the picks are named."""
NAME_PLACES = (
    *(("right", -8, -10), ("left", 8, -10), ("center", 0, -17), ("left", 13, 0), ("right", -13, 0)),
    *(("left", 8, 11), ("right", -8, 11), ("center", 0, 18), ("center", 0, -32), ("center", 0, 33)),
)
"""Where a name may stand, the best first: how it is aligned, and its distance from the model. Above
and left of a member no other member is in the way."""
NAME_WIDTHS, PHONE_WIDTH = (620, 250), 500
"""Names are placed in charts of these widths, the second one below the width of a phone."""
LETTER_WIDTH, LINE_HEIGHT = 6.9, 14
PADDING_X, PADDING_Y = 44, 34
"""Pixels from the outermost models to the edges of a chart."""
MAX_LAYERS_WITH_COMMAS, MAX_LABELED_LAYERS = 4, 12
PAPER_MARK = "paper: 55% less overhead, 99.4% kept"
DEPTH_TITLE = "Quality by corrections at inference"
TOOLTIP_METRICS = (
    *("cost/evaluations", "cost/relative_flops", "cost/decode_ms_per_token"),
    *("cost/kv_bytes_per_token", "cost/num_parameters", "quality/accuracy"),
    *("quality/bits_per_byte", "quality/validation_loss"),
)

Spec = dict[str, Any]
"""A chart in the JSON of Vega-Lite."""


def save_chart(spec: Spec, stem: Path, kinds: Iterable[str] = ("png", "svg")) -> list[Path]:
    """Write a chart as `stem.png` and `stem.svg`; the same chart gives the same bytes.

    An SVG ends with the key of its chart, so one that is there already is not drawn again.
    """
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in kinds]
    mark = f"<!-- {content_key(spec, installed_version('vl-convert-python'))} -->".encode()
    with suppress(OSError):
        if all(map(Path.is_file, paths)) and paths[-1].read_bytes().endswith(mark):
            return paths
    for path in paths:
        if path.suffix == ".svg":
            content = _with_own_ids(vl_convert.vegalite_to_svg(spec)).encode() + mark
        else:
            content = vl_convert.vegalite_to_png(spec, scale=PIXELS_PER_UNIT)
        with new_file(path) as temporary:
            temporary.write_bytes(content)
    return paths


def _with_own_ids(svg: str) -> str:
    """Return an SVG whose ids do not depend on the charts that were drawn before."""
    ids = dict.fromkeys(re.findall(r'id="([a-z]+_?\d+)"', svg))
    names = {name: f"id_{number}" for number, name in enumerate(ids)}
    return re.sub(
        r'(?<=[#"])[a-z]+_?\d+(?=["\)])', lambda found: names.get(found[0], found[0]), svg
    )


def chart_spec(chart: Any, *, title: str | altair.Title | None = None) -> Spec:
    """Return the JSON of a chart with the style of all charts."""
    if title:
        chart = chart.properties(title=title)
    text = chart.to_json(indent=None, sort_keys=False)  # Tooltips keep their order.
    # Titles of axes that follow a menu are signals, which Altair's schema does not know.
    text = re.sub(r'"title": "(titles\[\w+\])"', r'"title": {"signal": "\1"}', text)
    return {**json.loads(text), "config": CONFIG}


def front_chart(front: Front, *, title: str = "", mark_paper: bool = False) -> Spec:
    """Return the chart of a front; the trials of each sweep have a color and a shape.

    The members of the front are filled, and named as are the full model and the baselines.

    Args:
        front: The front.
        title: Title of the picture.
        mark_paper: Mark the paper's headline, scaled to the full model, if the quality is an
            accuracy; on costs that vanilla of the same shape is known to have.

    Raises:
        ValueError: If the front has no point.
    """
    if not front.rows:
        raise ValueError("a front needs at least one result with a cost and a quality")
    rows = model_rows(front)
    measured = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    offered = (front.axes.cost, *COSTS.values(), *(beyond for beyond, _ in OVERHEADS.values()))
    costs = [name for name in dict.fromkeys(offered) if name in measured]
    qualities = [n for n in measured if n.startswith("quality/") and not n.endswith("_stderr")]
    # Places on other axes need the numbers alone.
    numbers = front.table[["key", "role", *(n for n in measured if n in front.table and "/" in n)]]
    fronts = [find_front(numbers, FrontAxes(*p)) for p in itertools.product(costs, qualities)]
    sweeps = front.sweeps
    groups = [*(sweeps or [TRIAL]), FULL_MODEL, BASELINE]
    colors = [*itertools.islice(itertools.cycle(SERIES_COLORS), len(groups) - 2), INK, GRAY]
    shapes = [*itertools.islice(itertools.cycle(TRIAL_SHAPES), len(groups) - 2), STAR, "diamond"]
    paper = [_paper_place(front, placed) if mark_paper else None for placed in fronts]
    if mark_paper and is_accuracy(front.axes.quality):
        groups, colors, shapes = [*groups, PAPER_MARK], [*colors, INK], [*shapes, CROSS]

    # One layer has the axes; they all have the same scales.
    x_scale = Scale(zero=False, nice=False, padding=PADDING_X)
    y_scale = Scale(zero=False, nice=False, padding=PADDING_Y, reverse=altair.ExprRef("is_loss"))

    def across(axis: Axis | None = None) -> X:
        return X("x:Q", axis=axis, scale=x_scale)

    def up(name: str = "y", axis: Axis | None = None) -> Y:
        return Y(f"{name}:Q", axis=axis, scale=y_scale)

    x, y = across(), up()
    whole_steps = altair.ExprRef("cost == 'cost/evaluations' ? 1 : 0")
    x_axis = Axis(title="titles[cost]", gridColor=GRID, tickCount=8, tickMinStep=whole_steps)
    percent = "is_share ? format(datum.value, '.4~p') : datum.label"
    y_axis = Axis(title="titles[quality]", gridColor=GRID, labelExpr=percent)
    key = Legend(title=None, orient="bottom", columns=COLUMNS, labelLimit=260, symbolSize=100)
    color = Color("group:N", scale=Scale(domain=groups, range=colors), legend=key)
    shape = altair.Shape("group:N", scale=Scale(domain=groups, range=shapes), legend=key)
    chart = Chart()
    layers = [
        chart.mark_point(opacity=0).encode(across(x_axis), up(axis=y_axis)),
        *_steps(x, y, altair.value(INK if sweeps else BLUE)),
        chart.transform_filter("datum.error > 0")
        .mark_rule(strokeWidth=1.2)
        .encode(
            x=x,
            y=up("low"),
            y2="high:Q",
            color=color,
            opacity=_opacity(0.8, 0.3),
        ),
        chart.mark_point(strokeWidth=1.6, opacity=1).encode(
            *(x, y, color, shape),
            fill=altair.Fill("fill:N", scale=None),
            strokeOpacity=_opacity(1.0, 0.45),
            size=altair.Size("size:Q", scale=None),
            tooltip=altair.Tooltip("tip:N"),
        ),
        *(_paper_mark(paper, x, y, shape) if mark_paper else ()),
        *_names(x, y),
    ]
    whole = (
        altair.layer(*layers, data=InlineData(values=_front_data(front, fronts, rows, paper)))
        .transform_calculate(x="datum[cost]", y="datum[quality]")
        .transform_filter("isValid(datum.x) && isValid(datum.y)")
        .transform_joinaggregate(most="max(x)")
        .transform_calculate(error="datum[quality + '_stderr'] || 0")
        .transform_calculate(
            low="datum.y - datum.error",
            high="datum.y + datum.error",
            is_member="indexof(datum.members, pair) >= 0",
            is_full=f"datum.group == '{FULL_MODEL}'",
            is_baseline=f"datum.group == '{BASELINE}'",
        )
        .transform_calculate(
            is_bold="datum.is_member || datum.is_full || datum.is_baseline",
            fill=f"datum.is_full ? '{ORANGE}' : datum.is_member ? datum.color : 'white'",
            size="datum.key == hovered ? 400 : datum.is_full ? 240 : datum.is_member ? 110 : 80",
        )
        .transform_calculate(
            name="datum.label + (indexof(datum.knees, pair) >= 0 ? ' (knee)' : '')",
            place=f"datum.places[pair * {len(NAME_WIDTHS)} + (width < {PHONE_WIDTH} ? 1 : 0)]",
        )
        .add_params(*_menus(front, costs, qualities))
        .resolve_axis(x="independent", y="independent")
        .properties(width=WIDTH, height=HEIGHT)
    )
    return chart_spec(whole, title=altair.Title(title, subtitle=LEGEND) if title else None)


def _menus(front: Front, costs: list[str], qualities: list[str]) -> list[Any]:
    """Return the menus of the axes, and what follows from the chosen pair; `pair` is its number."""

    def menu(name: str, names: Sequence[str], value: str) -> altair.Parameter:
        labels = [metric_title(metric) for metric in names]
        bind = altair.binding_select(options=names, labels=labels, name=f"{name.title()} ")
        return altair.param(name=name, value=value, bind=bind)

    def is_one_of(name: str, names: Iterable[str]) -> str:
        return f"indexof({json.dumps([*names])}, {name}) >= 0"

    losses = [name for name in qualities if not FrontAxes(quality=name).higher_is_better]
    pair = f"indexof({json.dumps(costs)}, cost) * {len(qualities)}"
    pair += f" + indexof({json.dumps(qualities)}, quality)"
    return [
        menu("cost", costs, front.axes.cost),
        menu("quality", qualities, front.axes.quality),
        altair.param(name="pair", expr=pair),
        altair.param(name="is_share", expr=is_one_of("quality", filter(is_accuracy, qualities))),
        altair.param(name="is_loss", expr=is_one_of("quality", losses)),
        altair.param(name="hovered", value=""),
        altair.param(name="titles", value={n: metric_title(n) for n in (*costs, *qualities)}),
    ]


def _cost_of_vanilla(front: Front, placed: Front) -> float | None:
    """Return what vanilla of the full model's shape costs on other axes; None if it is unknown."""
    plain, cost = vanilla_of(front.table), placed.axes.cost
    key = placed.full["key"] if placed.full else ""
    if cost == COSTS["evaluations"] and key:
        return int(front.table["num_layers"][key])
    return known(front.table.loc[plain[key]].to_dict(), cost) if key in plain else None


def _paper_place(front: Front, placed: Front) -> tuple[float, float] | None:
    """Return where the paper's headline stands; None on axes where it means nothing."""
    full, plain = placed.full, _cost_of_vanilla(front, placed)
    if full is None or plain is None or not is_accuracy(placed.axes.quality):
        return None
    cost = plain + PAPER_OVERHEAD_SHARE * (full["cost"] - plain)
    return cost, PAPER_KEPT_SHARE * full["quality"]


def _steps(x: X, y: Y, color: Any) -> list[Any]:
    """Return the line of the best quality at each cost; flat after the last member."""
    members = Chart().transform_filter("datum.is_member")
    line = members.mark_line(interpolate="step-after", strokeWidth=2)
    rest = members.transform_joinaggregate(last="max(x)")
    rest = rest.transform_filter("datum.x == datum.last").mark_rule(strokeWidth=2)
    return [
        line.encode(x=x, y=y, color=color),
        rest.encode(x=x, y=y, x2="most:Q", color=color),
    ]


def _names(x: X, y: Y) -> list[Any]:
    """Return the names of models on a white halo, each at its place."""
    look: dict[str, Any] = {
        name: altair.ExprRef(f"{json.dumps(values)}[datum.place]")
        for name, values in zip(("align", "dx", "dy"), zip(*NAME_PLACES, strict=True), strict=True)
    }
    named = Chart().transform_filter("datum.place >= 0").encode(x=x, y=y, text="name:N")
    halo = {"stroke": "white", "strokeWidth": 4, "strokeJoin": "round"}
    return [named.mark_text(fontSize=12, **look, **halo), named.mark_text(fontSize=12, **look)]


def place_names(
    placed: Front, names: Mapping[str, str], width: float, mark: tuple[float, float] | None = None
) -> dict[str, int]:
    """Return key of a model -> the place of its name in `NAME_PLACES`, where nothing is covered.

    The first names choose first. One that would cover another name, or end outside, has no place.

    Args:
        placed: The models on their axes.
        names: Key -> name, of those that have one.
        width: Of the chart, in pixels.
        mark: A point that is no model.
    """
    rows = [row for row in placed.rows if math.isfinite(row["cost"] + row["quality"])]
    if not rows:
        return {}
    errors = np.array([known(row, "error") or 0.0 for row in rows])
    others = [mark] if mark else []
    costs = np.array([*(row["cost"] for row in rows), *(cost for cost, _ in others)])
    qualities = np.array([*(row["quality"] for row in rows), *(quality for _, quality in others)])
    low, high = (qualities[: len(rows)] + side * errors for side in (-1, 1))

    def pixels(values: Any, ends: Any, first: float, last: float) -> Any:
        least, most = min(ends), max(ends)
        share = (values - least) / (most - least) if most > least else np.full(len(values), 0.5)
        return first + (last - first) * share

    def boxes(left: Any, top: Any, right: Any, bottom: Any) -> Any:
        return np.stack(np.broadcast_arrays(left, top, right, bottom), axis=-1).reshape(-1, 4)

    def covered(one: Any, other: Any) -> Any:
        """Return the pixels of each box of the first kind that those of the other one cover."""
        corners = np.minimum(one[:, None, 2:], other[None, :, 2:])
        sides = corners - np.maximum(one[:, None, :2], other[None, :, :2])
        return np.clip(sides, 0, None).prod(axis=2).sum(axis=1)

    edges = (HEIGHT - PADDING_Y, PADDING_Y)[:: 1 if placed.axes.higher_is_better else -1]
    heights = [*low, *high, *qualities]
    x = pixels(costs, costs, PADDING_X, width - PADDING_X)
    y, one_end, other_end = (pixels(each, heights, *edges) for each in (qualities, low, high))
    points = boxes(x - 7, y - 7, x + 7, y + 7)
    tops, bottoms = np.minimum(one_end, other_end), np.maximum(one_end, other_end)
    bars = boxes(x[: len(rows)] - 1, tops, x[: len(rows)] + 1, bottoms)
    inside = np.array([[2, 2, width - 2, HEIGHT - 2]])
    taken = np.empty((0, 4))
    found = {}
    place_of = {row["key"]: number for number, row in enumerate(rows)}
    shares = np.array([{"left": 0.0, "center": 0.5, "right": 1.0}[a] for a, _, _ in NAME_PLACES])
    shifts = np.array([shift for _, *shift in NAME_PLACES], dtype=float)
    for key, name in names.items():
        if key not in place_of:
            continue
        own, size = place_of[key], LETTER_WIDTH * len(name)
        left, middle = x[own] + shifts[:, 0] - shares * size, y[own] + shifts[:, 1]
        reach = LINE_HEIGHT / 2
        free = boxes(left, middle - reach, left + size, middle + reach)
        over_names = covered(free, taken)
        outside = size * LINE_HEIGHT - covered(free, inside)
        costs_of = 100 * (over_names + outside) + 10 * covered(free, points) + covered(free, bars)
        best = int(np.argmin(costs_of))
        if over_names[best] + outside[best] < 1:
            found[key] = best
            taken = np.vstack([taken, free[best]])
    return found


def _opacity(bold: float, faint: float) -> Any:
    return altair.condition("datum.is_bold", altair.value(bold), altair.value(faint))


def _paper_mark(places: Sequence[tuple[float, float] | None], x: X, y: Y, shape: Any) -> list[Any]:
    values = [
        {"group": PAPER_MARK, "number": number, "x": place[0], "y": place[1]}
        for number, place in enumerate(places)
        if place
    ]
    mark = Chart(InlineData(values=values)).transform_filter("datum.number == pair")
    mark = mark.encode(x=x, y=y, shape=shape)
    looks = ({"stroke": "white", "strokeWidth": 8}, {"stroke": INK, "strokeWidth": 2.4})
    return [mark.mark_point(size=90, opacity=1, strokeCap="round", **look) for look in looks]


def _front_data(
    front: Front,
    fronts: Sequence[Front],
    rows: Sequence[Row],
    paper: Sequence[tuple[float, float] | None],
) -> list[Row]:
    """Return the rows that are drawn.

    A row knows by the number of the pair of axes on which fronts it is, and where its name stands.
    """
    all_rows = {row["key"]: row for row in (*front.rows, *front.unmeasured)}
    marks: dict[str, dict[str, list[int]]] = {
        key: {"members": [], "knees": [], "places": []} for key in all_rows
    }
    for number, placed in enumerate(fronts):
        picks = [row["key"] for row in placed.picks.values()]
        names: dict[str, str] = {}
        named: set[tuple[float, float]] = set()
        for row in sorted(placed.members, key=lambda row: row["key"] not in picks):
            marks[row["key"]]["members"].append(number)
            point = row["cost"], row["quality"]
            if point not in named and (len(placed.members) <= MAX_NAMES or row["key"] in picks):
                names[row["key"]] = _label(all_rows[row["key"]])
            named.add(point)
        if placed.knee is not None:
            marks[placed.knee["key"]]["knees"].append(number)
            names[placed.knee["key"]] += " (knee)"
        others = [row for row in placed.rows if row["role"] != "trial" and row["key"] not in names]
        for row in sorted(others, key=lambda row: row["role"] != "teacher"):
            names[row["key"]] = _label(all_rows[row["key"]])
        for width in NAME_WIDTHS:
            places = place_names(placed, names, width, paper[number])
            for key, own in marks.items():
                own["places"].append(places.get(key, -1))
    found = []
    for row in rows:
        key, sweep = row["key"], row.get("sweep")
        roles = {"teacher": FULL_MODEL, "baseline": BASELINE}
        number = front.sweeps.index(sweep) if sweep else 0
        found.append(
            {
                **{
                    name: value
                    for name, value in row.items()
                    if name.startswith(("cost/", "quality/")) and value is not None
                },
                "label": _label(all_rows[key]),
                "group": roles.get(row["role"], sweep or TRIAL),
                "color": SERIES_COLORS[number % len(SERIES_COLORS)],
                **marks[key],
                "tip": _tooltip(row),
                "key": key,
            }
        )
    # Trials first, so that full models and baselines are drawn above them.
    return sorted(found, key=lambda row: row["group"] in (FULL_MODEL, BASELINE))


def _label(row: Row) -> str:
    schedule = row["trial"].schedule
    # A student of one of several teachers has its teacher's name before its schedule.
    has_name = row["role"] != "trial" or ": " in row["label"]
    if has_name or schedule is None or len(schedule) > MAX_LABELED_LAYERS:
        return str(row["label"] if row["is_placed"] else row["name"])
    is_long = len(schedule) > MAX_LAYERS_WITH_COMMAS and max(schedule) < 10
    return ("" if is_long else ",").join(map(str, schedule))


def _tooltip(row: Row) -> dict[str, str]:
    """Return title -> number of what a reader looks up of a model."""
    parts = (row["name"], row.get("sweep"), row["threshold"] and f"threshold {row['threshold']}")
    found = {"title": ", ".join(part for part in parts if part)}
    for name in TOOLTIP_METRICS:
        if (value := row.get(name)) is not None:
            is_share = is_accuracy(name) or name == "cost/relative_flops"
            error = row.get(f"{name}_stderr")
            text = format_with_error(value, error, is_percent=True) + "%" if is_share else ""
            found[metric_title(name)] = text or f"{value:,.4g}"
    for name in (KEEPS_METRIC, ON_FRONT_METRIC):
        if row.get(name) is not None:
            found[metric_title(name)] = confidence_text(row[name])
    return found


def influence_chart(
    rows: Sequence[Sequence[float]],
    *,
    metric: str,
    title: str = "",
    kept: Sequence[int] | None = None,
    kept_name: str = "",
) -> Spec:
    """Return the heat map of the influence of every correction.

    Colors are on a logarithmic scale, because influence falls by powers of ten.

    Args:
        rows: Influence of correction 1, 2, ... for each layer; rows may differ in length. NaN is a
            correction that the layer does not have.
        metric: Name of the measure.
        title: Title of the picture.
        kept: An iteration schedule; a line is drawn after the last correction that it keeps.
        kept_name: Name of that schedule in the legend.

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
    least, most = min(positive), max(positive)
    for cell in cells:
        cell["shown"] = max(cell["influence"], least)
        cell["ink"] = "white" if cell["shown"] ** 2 < least * most else "black"
    width = max(cell["correction"] for cell in cells)
    columns, lines = _cells("Correction", width), _cells("Layer", len(rows), reverse=True)
    x, y = X("from:Q", **columns), Y("top:Q", **lines)
    edges = {"from": "datum.correction - 0.5", "to": "datum.correction + 0.5"}
    edges |= {"top": "datum.layer - 0.5", "bottom": "datum.layer + 0.5"}
    chart = Chart(InlineData(values=cells)).transform_calculate(**edges)
    scale = Scale(type="log", scheme="viridis", domain=[least, most if most > least else 2 * least])
    bar = Legend(title=f"Influence ({metric})", format=".1~g", orient="bottom", gradientLength=180)
    bar.values = sorted({least, math.sqrt(least * most), most})
    layers = [
        chart.mark_rect().encode(
            x=x, x2="to:Q", y=y, y2="bottom:Q", color=Color("shown:Q", scale=scale, legend=bar)
        ),
        chart.mark_text(fontSize=12).encode(
            x=X("correction:Q", **columns),
            y=Y("layer:Q", **lines),
            text="text:N",
            color=Color("ink:N", scale=None),
        ),
    ]
    if kept is not None:
        name = f"kept: {kept_name}" if kept_name else "kept"
        corners = [
            {"from": r + 0.5, "top": layer + edge, "order": 2 * layer + edge, "name": name}
            for layer, r in enumerate(kept, start=1)
            for edge in (-0.5, 0.5)
        ]
        line = Chart(InlineData(values=corners)).mark_line(strokeWidth=3, clip=False)
        legend = Legend(title=None, orient="bottom", symbolType="stroke", labelLimit=300)
        stroke = altair.Stroke("name:N", scale=Scale(range=[RED]), legend=legend)
        layers.append(line.encode(x=x, y=y, order="order:Q", stroke=stroke))
    whole = altair.layer(*layers).resolve_scale(color="independent")
    size = {"width": max(180, 90 * width), "height": max(60, 28 * len(rows))}
    return chart_spec(whole.properties(**size), title=title)


def _cells(title: str, count: int, **more: Any) -> dict[str, Any]:
    """Return scale and axis of a heat map, whose ticks are the middles of `count` cells."""
    values = [*range(1, count + 1)]
    axis = Axis(title=title, values=values, format="d", grid=False, ticks=False, domain=False)
    return {"scale": Scale(domain=[0.5, count + 0.5], nice=False, **more), "axis": axis}


def curves_chart(title: str, curves: Sequence[Curve]) -> Spec:
    """Return the chart of curves over steps; `title` is `WHAT` or `WHAT against STEPS`."""
    what, _, against = title.partition(" against ")
    points = [
        {"name": name, "step": step, "value": value}
        for name, values in curves
        for step, value in values
        if math.isfinite(value)
    ]
    names = list(dict.fromkeys(name for name, _ in curves))
    colors = [SERIES_COLORS[n % len(SERIES_COLORS)] for n in range(len(names))]
    dashes = [DASHES[n // len(SERIES_COLORS) % len(DASHES)] for n in range(len(names))]
    legend = Legend(
        title=None, orient="bottom", columns=COLUMNS, labelLimit=200, symbolType="stroke"
    )
    x = X("step:Q", title=against or "Step", scale=Scale(nice=False))
    y = Y("value:Q", title=what, scale=Scale(zero=False))
    dash = altair.StrokeDash("name:N", scale=Scale(domain=names, range=dashes), legend=legend)
    chart = Chart(InlineData(values=points)).mark_line(strokeWidth=1.8, tooltip=True)
    chart = chart.encode(
        x=x,
        y=y,
        color=Color("name:N", scale=Scale(domain=names, range=colors), legend=legend),
        strokeDash=dash,
    )
    return chart_spec(chart.properties(width=WIDTH, height=HEIGHT * 3 // 4))


def depth_chart(curve: DepthCurve) -> Spec:
    """Return the chart of the first of the qualities against the corrections of every layer."""
    quality = curve.qualities[0]
    scale, unit = (100, " (%)") if is_accuracy(quality) else (1, "")
    values: list[dict[str, float]] = []
    for point in curve.points:
        value, error = (scale * (number or 0.0) for number in point.measured(quality))
        ends = {"value": value, "low": value - error, "high": value + error}
        values.append({"r": point.corrections, **ends})
    last = curve.points[-1].corrections
    axis = Axis(values=[*range(last + 1)], format="d", grid=False)
    domain = Scale(domain=[-0.2, last + 0.2], nice=False)
    x = X("r:Q", title="Corrections of every layer", axis=axis, scale=domain)
    title = metric_title(f"quality/{quality}") + unit
    y = Y("value:Q", title=title, scale=Scale(zero=False))
    chart = Chart(InlineData(values=values)).encode(x=x)
    layers = [
        chart.mark_line(color=BLUE, strokeWidth=1.8).encode(y=y),
        chart.mark_rule(color=BLUE, clip=False).encode(y=Y("low:Q"), y2="high:Q"),
        chart.mark_point(color=BLUE, filled=True, size=70, opacity=1, clip=False).encode(y=y),
    ]
    if len(set(curve.trained)) == 1:
        trained = Chart(InlineData(values=[{"r": curve.trained[0], "name": "trained"}]))
        rule = trained.mark_rule(color=GRAY, strokeDash=[4, 4]).encode(x=x)
        text = trained.mark_text(color=GRAY, align="left", dx=6, y=HEIGHT * 3 // 4 - 10)
        layers = [rule, text.encode(x=x, text="name:N"), *layers]
    whole = altair.layer(*layers).properties(width=WIDTH, height=HEIGHT * 3 // 4)
    return chart_spec(whole, title=DEPTH_TITLE)
