"""Figure of a front: cost and quality of each model with standard errors, for a paper.

The line is a staircase: the best quality at each cost budget. The top and right axes show shares of
the full model. With several sweeps, each has a color, a shape and a faint front; only the members
of the front of all sweeps are filled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from iiet.methods import METHODS
from orchestrator.reporting.figure_style import (
    DOTS_PER_INCH,
    GRAY,
    GRID,
    INK,
    ORANGE,
    SWEEP_COLORS,
    fix_layout,
)
from orchestrator.reporting.front_axes import (
    PAPER_COST_SHARE,
    PAPER_MARK,
    PAPER_QUALITY_SHARE,
    is_accuracy,
    metric_title,
)
from orchestrator.reporting.front_text import full_name
from orchestrator.reporting.label_placement import LabelPlacer
from orchestrator.reporting.pareto import Front, FrontPoint
from orchestrator.terminal.render import format_count

MAX_LABELED_LAYERS = 12
BASELINE_MARKERS = "Ds^vP<"
SWEEP_MARKERS = "oshpd8"

Style = Mapping[str, Any]
"""Keyword arguments of Matplotlib's drawing functions."""


def draw_front(front: Front, *, title: str = "", mark_paper: bool = False) -> Figure:
    """Draw a front; with several sweeps, each one's own front too.

    Args:
        front: The front.
        title: Title of the figure.
        mark_paper: Mark the paper's headline, scaled to the full model, if the quality is an
            accuracy.

    Raises:
        ValueError: If the front has no point.
    """
    if not front.points:
        raise ValueError("a front needs at least one result with a cost and a quality")
    figure = Figure(figsize=(7.0, 4.6), layout="constrained", dpi=DOTS_PER_INCH)
    panel = figure.add_subplot()
    labels = LabelPlacer(panel)
    if front.sweep_of:
        _draw_sweeps(panel, labels, front)
    else:
        _draw_steps(panel, labels, front, {"color": SWEEP_COLORS[0], "lw": 1.6, "label": "front"})
        names = ("trial on the front", "dominated trial")
        _draw_trials(panel, front, front.points, names, color=SWEEP_COLORS[0])
    _draw_teachers_and_baselines(panel, front)
    if mark_paper and is_accuracy(front.axes.quality):
        _draw_paper_mark(panel, front)
    _finish_panel(panel, front)
    if title:
        panel.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=12)
    _add_labels(labels, front)
    # Labels can be placed only in the final layout.
    fix_layout(figure)
    labels.place()
    return figure


def _scale(front: Front) -> float:
    return 100.0 if is_accuracy(front.axes.quality) else 1.0


def _is_trial(point: FrontPoint) -> bool:
    return point.result.role == "trial"


def _draw_sweeps(panel: Panel, labels: LabelPlacer, front: Front) -> None:
    _draw_steps(panel, labels, front, {"color": INK, "lw": 1.8, "label": "front of all"})
    for number, (name, sweep_front) in enumerate(front.by_sweep.items()):
        color = SWEEP_COLORS[number % len(SWEEP_COLORS)]
        marker = SWEEP_MARKERS[number % len(SWEEP_MARKERS)]
        points = [point for point in front.points if front.sweep_of[point.result.key] == name]
        _draw_steps(panel, labels, sweep_front, {"color": color, "lw": 1.2, "alpha": 0.45})
        _draw_trials(panel, front, points, ("", ""), color=color, marker=marker)
        panel.plot([], [], color=color, marker=marker, lw=1.2, label=name)


def _draw_steps(panel: Panel, labels: LabelPlacer, front: Front, style: Style) -> None:
    members = front.members
    if not members:
        return
    costs = [point.cost for point in members]
    qualities = [_scale(front) * point.quality for point in members]
    # Flat after the last member: a higher cost gives no better quality.
    costs.append(max(point.cost for point in front.points))
    qualities.append(qualities[-1])
    panel.step(costs, qualities, where="post", zorder=2, **style)
    labels.avoid_steps(costs, qualities)


def _draw_trials(
    panel: Panel,
    front: Front,
    points: Sequence[FrontPoint],
    names: tuple[str, str],
    *,
    color: str,
    marker: str = "o",
) -> None:
    """Draw trials; `names` are the legend entries of members and of dominated trials."""
    style = {"marker": marker, "mec": color, "ecolor": color}
    on_front = {**style, "markersize": 6.5, "mfc": color, "zorder": 4}
    dominated = {**style, "markersize": 5.5, "mfc": "white", "alpha": 0.4, "zorder": 3}
    trials = [point for point in points if _is_trial(point)]
    shown = {point.result.key for point in front.shown}
    near = [p for p in trials if not p.on_front and p.result.key in shown]
    _draw_points(panel, front, [p for p in trials if p.on_front], names[0], on_front)
    _draw_points(panel, front, near, names[1], dominated)
    if far := [p for p in trials if p.result.key not in shown]:
        # An image, because an SVG of thousands of points takes megabytes.
        xs, ys = zip(*((p.cost, _scale(front) * p.quality) for p in far), strict=True)
        panel.plot(xs, ys, ".", color=color, alpha=0.15, ms=2, zorder=1, rasterized=True)


def _draw_teachers_and_baselines(panel: Panel, front: Front) -> None:
    teachers = [point for point in front.points if point.result.role == "teacher"]
    star = {"marker": "*", "markersize": 14, "mfc": ORANGE, "mec": "black", "ecolor": ORANGE}
    _draw_points(panel, front, teachers, "teacher", {**star, "zorder": 5})
    series: dict[str, list[FrontPoint]] = {}
    for point in front.points:
        if point.is_baseline:
            series.setdefault(_series_name(front, point), []).append(point)
    hollow = {"markersize": 6, "mfc": "white", "mec": "black", "ecolor": GRAY, "zorder": 4}
    if len(series) > len(BASELINE_MARKERS):
        series = {"baseline": [point for points in series.values() for point in points]}
    for (name, points), marker in zip(series.items(), BASELINE_MARKERS, strict=False):
        _draw_points(panel, front, points, name, {**hollow, "marker": marker})


def _series_name(front: Front, baseline: FrontPoint) -> str:
    """Return the legend's name: distilled baselines of one kind differ in their layers only."""
    if not baseline.result.is_distilled_baseline:
        return full_name(front, baseline)
    method = baseline.result.method
    return "fewer layers" if METHODS[method].has_corrections else f"{method}, distilled"


def _draw_points(
    panel: Panel, front: Front, points: Sequence[FrontPoint], name: str, style: Style
) -> None:
    """Draw points with their standard errors; `name` is their legend entry."""
    if not points:
        return
    scale = _scale(front)
    costs, qualities = zip(*((point.cost, scale * point.quality) for point in points), strict=True)
    errors = [scale * (point.error or 0.0) for point in points]
    bars: Style = {"yerr": errors if any(errors) else None, "elinewidth": 0.7, "capsize": 2}
    panel.errorbar(costs, qualities, label=name or None, linestyle="none", mew=1.2, **bars, **style)


def _draw_paper_mark(panel: Panel, front: Front) -> None:
    full = front.full
    if full is not None:
        cost = PAPER_COST_SHARE * full.cost
        quality = _scale(front) * PAPER_QUALITY_SHARE * full.quality
        style: Style = {"marker": "x", "markersize": 9, "mew": 2, "color": INK, "zorder": 3.5}
        panel.plot([cost], [quality], label=PAPER_MARK, linestyle="none", **style)


def _finish_panel(panel: Panel, front: Front) -> None:
    quality = metric_title(front.axes.quality)
    panel.set_xlabel(metric_title(front.axes.cost))
    panel.set_ylabel(f"{quality} (%)" if is_accuracy(front.axes.quality) else quality)
    panel.grid(True, color=GRID, lw=0.6)
    panel.set_axisbelow(True)
    panel.margins(x=0.1, y=0.1)
    panel.spines[["top", "right"]].set_color("#bbbbbb")
    if not front.axes.higher_is_better:
        panel.invert_yaxis()
    if all(point.cost == int(point.cost) for point in front.points):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    style: Style = {"fontsize": 8, "title_fontsize": 7.5, "framealpha": 0.95, "edgecolor": GRID}
    legend = panel.legend(title="labels: corrections per layer", loc="best", **style)
    legend.set_zorder(8)
    full = front.full
    if full is not None and full.cost and full.quality:
        scales = _percent_of(full.cost), _percent_of(_scale(front) * full.quality)
        top = panel.secondary_xaxis("top", functions=scales[0])
        right = panel.secondary_yaxis("right", functions=scales[1])
        top.set_xlabel("% of the full model's cost", fontsize=8, color=GRAY)
        right.set_ylabel(f"{quality}, % of the full model's", fontsize=8, color=GRAY)
        for side in (top, right):
            side.tick_params(labelsize=8, colors=GRAY)


def _percent_of(whole: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return the functions to and from percent of `whole`, for a secondary axis."""
    return (lambda part: 100 * part / whole), (lambda percent: percent * whole / 100)


def _add_labels(labels: LabelPlacer, front: Front) -> None:
    # The most important first; the legend names baselines.
    scale, knee, shown = _scale(front), front.knee, front.shown
    for point in shown:
        labels.avoid_point(point.cost, scale * point.quality, scale * (point.error or 0.0))
    for point in sorted(front.members, key=lambda member: member is not knee):
        if _is_trial(point):
            text = f"{_label(point)} (knee)" if point is knee else _label(point)
            labels.add(point.cost, scale * point.quality, text, important=point is knee)
    if len(shown) < len(front.points):
        return
    for point in front.points:
        if _is_trial(point) and not point.on_front:
            labels.add(point.cost, scale * point.quality, _label(point), color=GRAY)
        elif point.result.is_distilled_baseline:
            layers = format_count(point.result.model.num_layers, "layer")
            labels.add(point.cost, scale * point.quality, layers, color=GRAY)


def _label(point: FrontPoint) -> str:
    schedule = point.result.schedule
    if schedule is None or len(schedule) > MAX_LABELED_LAYERS:
        return point.result.name
    return ("" if max(schedule) < 10 else ",").join(str(r) for r in schedule)
