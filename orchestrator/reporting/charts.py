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
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import altair
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
from orchestrator.reporting.results import Curve, vanilla_of
from orchestrator.reporting.statistics import KEEPS_METRIC, ON_FRONT_METRIC, difference_metric
from orchestrator.reporting.tables import confidence_text, model_rows
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
MANY_NAMES, MAX_NAMES = 6, 24
"""From the first number of members on, their names are tilted; beyond the second, only the picks of
the front are named."""
MAX_LAYERS_WITH_COMMAS, MAX_LABELED_LAYERS = 4, 12
PAPER_MARK = "paper: 55% less overhead, 99.4% kept"
DEPTH_TITLE = "Quality by corrections at inference"
TOOLTIP_METRICS = (
    *("cost/evaluations", "cost/relative_flops", "cost/decode_ms_per_token"),
    *("cost/kv_bytes_per_token", "cost/num_parameters", "quality/accuracy"),
    *("quality/bits_per_byte", "quality/validation_loss", "share_of_full"),
)
SHARES = (
    *("cost/relative_flops", "cost/relative_evaluations", "share_of_full"),
    *("cost/overhead_share", "cost/overhead_ms_share"),
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

    The members of the front are filled, and named as are the full model and the baselines. The
    other axes show shares of the full model.

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
    costs = [n for n in measured if n.startswith("cost/") and not n.endswith("_spread")]
    qualities = [n for n in measured if n.startswith("quality/") and not n.endswith("_stderr")]
    # Places on other axes need the numbers alone.
    numbers = front.table[["key", "role", *(n for n in measured if n in front.table and "/" in n)]]
    fronts = [find_front(numbers, FrontAxes(*p)) for p in itertools.product(costs, qualities)]
    sweeps = front.sweeps
    groups = [*(sweeps or [TRIAL]), FULL_MODEL, BASELINE]
    colors = [*itertools.islice(itertools.cycle(SERIES_COLORS), len(groups) - 2), INK, GRAY]
    shapes = [*itertools.islice(itertools.cycle(TRIAL_SHAPES), len(groups) - 2), STAR, "diamond"]
    if mark_paper and is_accuracy(front.axes.quality):
        groups, colors, shapes = [*groups, PAPER_MARK], [*colors, INK], [*shapes, CROSS]

    is_crowded = len(front.members) >= MANY_NAMES
    # One layer has the axes, another one those of the shares; they all have the same scales.
    longest = max((len(_label(row)) for row in front.members), default=0)
    x_scale = Scale(
        zero=False, nice=False, padding=min(44 if is_crowded else 100, 30 + 6 * longest)
    )
    y_scale = Scale(
        zero=False, nice=False, padding=52 if is_crowded else 34, reverse=altair.ExprRef("is_loss")
    )

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
        chart.mark_point(opacity=0).encode(across(x_axis), up("y", y_axis)),
        chart.mark_point(opacity=0).encode(
            across(_share_axis("top", 0)), up("y", _share_axis("right", 1))
        ),
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
        *(_paper_mark(x, y, shape) if PAPER_MARK in groups else ()),
        *_names(x, y),
    ]
    whole = (
        altair.layer(*layers, data=InlineData(values=_front_data(front, fronts, rows)))
        .transform_calculate(x="datum[cost]", y="datum[quality]")
        .transform_filter("isValid(datum.x) && isValid(datum.y)")
        .transform_joinaggregate(least="min(x)", most="max(x)")
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
            is_trial="!datum.is_full && !datum.is_baseline",
            is_left="datum.is_baseline && datum.x < 0.3 * datum.least + 0.7 * datum.most",
            is_right="datum.is_baseline && datum.x >= 0.3 * datum.least + 0.7 * datum.most",
            fill=f"datum.is_full ? '{ORANGE}' : datum.is_member ? datum.color : 'white'",
            size="datum.key == hovered ? 400 : datum.is_full ? 240 : datum.is_member ? 110 : 80",
        )
        .transform_joinaggregate(num_members="sum(is_member)")
        .transform_calculate(
            name="!datum.is_bold || indexof(datum.unnamed, pair) >= 0 ? '' : "
            "datum.label + (indexof(datum.knees, pair) >= 0 ? ' (knee)' : '')"
        )
        .add_params(*_menus(front, costs, qualities, fronts))
        .resolve_axis(x="independent", y="independent")
        .properties(width=WIDTH, height=HEIGHT)
    )
    return chart_spec(whole, title=altair.Title(title, subtitle=LEGEND) if title else None)


def _menus(front: Front, costs: list[str], qualities: list[str], fronts: list[Front]) -> list[Any]:
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
    fulls = [[f.full["cost"], f.full["quality"]] if f.full else [None, None] for f in fronts]
    plain = vanilla_of(front.table)

    def cost_of_vanilla(placed: Front) -> float | None:
        key, cost = placed.full["key"] if placed.full else "", placed.axes.cost
        if cost == COSTS["evaluations"] and key:
            return int(front.table["num_layers"][key])
        return known(front.table.loc[plain[key]].to_dict(), cost) if key in plain else None

    return [
        menu("cost", costs, front.axes.cost),
        menu("quality", qualities, front.axes.quality),
        altair.param(name="pair", expr=pair),
        altair.param(name="full", expr=f"{json.dumps(fulls)}[pair]"),
        altair.param(name="plain", expr=f"{json.dumps([*map(cost_of_vanilla, fronts)])}[pair]"),
        altair.param(name="is_share", expr=is_one_of("quality", filter(is_accuracy, qualities))),
        altair.param(name="is_loss", expr=is_one_of("quality", losses)),
        altair.param(name="hovered", value=""),
        altair.param(name="titles", value={n: metric_title(n) for n in (*costs, *qualities)}),
    ]


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
    """Return the names of models on a white halo; `rank` counts those of a kind from the left."""
    texts: list[Any] = []

    def add(which: str, *conditions: str, align: Any = "right", **look: Any) -> None:
        named = Chart().transform_filter(f"datum.name != '' && {which}")
        named = named.transform_window(
            rank="row_number()", sort=[altair.SortField(name) for name in ("x", "y")]
        )
        for condition in conditions:
            named = named.transform_filter(condition)
        for halo in ({"stroke": "white", "strokeWidth": 4, "strokeJoin": "round"}, {}):
            text = named.mark_text(fontSize=12, align=align, **look, **halo)
            texts.append(text.encode(x=x, y=y, text="name:N"))

    # Above and left of a member no other model of the front is in the way of its name.
    add("datum.is_trial", f"datum.num_members < {MANY_NAMES}", dx=-8, dy=-9)
    add("datum.is_trial", f"datum.num_members >= {MANY_NAMES}", dx=-6, dy=-8, angle=45)
    # Several full models may cost as much as each other.
    add("datum.is_full", "datum.rank % 2 == 1", align="center", dy=-20)
    add("datum.is_full", "datum.rank % 2 == 0", align="center", dy=24)
    # Baselines alternate between below and above.
    add("datum.is_left", "datum.rank % 2", align="left", dx=10, dy=7)
    add("datum.is_left", "datum.rank % 2 == 0", align="left", dx=10, dy=-7)
    add("datum.is_right", "datum.rank % 2", dx=-10, dy=9)
    add("datum.is_right", "datum.rank % 2 == 0", dx=-10, dy=22)
    return texts


def _share_axis(side: Any, part: int) -> Axis:
    title = None if part else "share of the full model's, also on the right"
    gray = {"domainColor": "#bbbbbb", "tickColor": GRAY, "labelColor": GRAY, "titleColor": GRAY}
    label = f"full[{part}] ? format(datum.value / full[{part}], '.3~p') : ''"
    look = {"grid": False, "tickCount": 8, "titleFontSize": 11}
    return Axis(orient=side, title=title, labelExpr=label, **look, **gray)


def _opacity(bold: float, faint: float) -> Any:
    return altair.condition("datum.is_bold", altair.value(bold), altair.value(faint))


def _paper_mark(x: X, y: Y, shape: altair.Shape) -> list[Any]:
    mark = (
        Chart(InlineData(values=[{"group": PAPER_MARK}]))
        .transform_calculate(
            x=f"plain + {PAPER_OVERHEAD_SHARE} * (full[0] - plain)",
            y=f"{PAPER_KEPT_SHARE} * full[1]",
        )
        .transform_filter("is_share && isValid(full[0]) && isValid(plain)")
        .encode(x=x, y=y, shape=shape)
    )
    looks = ({"stroke": "white", "strokeWidth": 8}, {"stroke": INK, "strokeWidth": 2.4})
    return [mark.mark_point(size=90, opacity=1, strokeCap="round", **look) for look in looks]


def _front_data(front: Front, fronts: Sequence[Front], rows: Sequence[Row]) -> list[Row]:
    """Return the rows that are drawn: the shown models, and the members of all other fronts.

    A row knows by the number of the pair of axes on which fronts it is.
    """
    marks: dict[str, dict[str, list[int]]] = {
        row["key"]: {"members": [], "knees": [], "unnamed": []} for row in rows
    }
    for number, placed in enumerate(fronts):
        picks = [row["key"] for row in placed.picks.values()]
        named: set[tuple[float, float]] = set()
        for row in sorted(placed.members, key=lambda row: row["key"] not in picks):
            marks[row["key"]]["members"].append(number)
            point = row["cost"], row["quality"]
            is_minor = len(placed.members) > MAX_NAMES and row["key"] not in picks
            if is_minor or point in named:
                marks[row["key"]]["unnamed"].append(number)
            named.add(point)
        if placed.knee is not None:
            marks[placed.knee["key"]]["knees"].append(number)
    are_all_shown = len(front.shown) == len(front.rows)
    needed = {row["key"] for row in front.shown} | {k for k, m in marks.items() if m["members"]}
    found = []
    for row, place in zip(rows, (*front.rows, *front.unmeasured), strict=True):
        key, sweep = row["key"], row.get("sweep")
        if not are_all_shown and key not in needed:
            continue
        numbers = {
            name: value
            for name, value in row.items()
            if name.startswith(("cost/", "quality/")) and value is not None
        }
        number = front.sweeps.index(sweep) if sweep else 0
        roles = {"teacher": FULL_MODEL, "baseline": BASELINE}
        found.append(
            {
                **numbers,
                "label": _label(place),
                "group": roles.get(row["role"], sweep or TRIAL),
                "color": SERIES_COLORS[number % len(SERIES_COLORS)],
                **marks[key],
                "tip": _tooltip(front, row),
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


def _tooltip(front: Front, row: Row) -> dict[str, str]:
    """Return title -> number of what a reader looks up of a model."""
    difference = difference_metric(front.basis.full) if front.basis else ""
    parts = (row["name"], row.get("sweep"), row["threshold"] and f"threshold {row['threshold']}")
    found = {"title": ", ".join(part for part in parts if part)}
    titles = {
        "share_of_full": f"{metric_title(front.axes.quality)}, share of full",
        difference: f"Difference to {front.basis.full}" if front.basis else "",
    }

    def text(name: str, value: float) -> str:
        if name in (KEEPS_METRIC, ON_FRONT_METRIC):
            return confidence_text(value)
        if name == difference and is_accuracy(front.axes.quality):
            return f"{100 * value:.1f}"
        if is_accuracy(name) or name in SHARES:
            return f"{100 * value:.1f}%"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    for name in (*TOOLTIP_METRICS, difference, KEEPS_METRIC, ON_FRONT_METRIC):
        if row.get(name) is None:
            continue
        shown = text(name, row[name])
        if row.get(f"{name}_stderr"):
            shown += f" ± {text(name, row[f'{name}_stderr'])}"
        if row.get(f"{name}_low") is not None:
            shown += f" ({text(name, row[f'{name}_low'])} to {text(name, row[f'{name}_high'])})"
        found[titles.get(name) or metric_title(name)] = shown
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
