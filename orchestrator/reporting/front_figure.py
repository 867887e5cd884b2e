"""The picture of a front: what each model costs and how good it is, with errors, for a paper.

The line is a staircase, because it says what a budget buys: the best model that costs no more.
Dominated trials stay in the picture, faint; the teacher and the baselines have shapes of their
own; the axes on the far sides read as shares of the full model. Bars are one standard error.

Several sweeps share a picture by color and shape: the front of each is faint, the front of all is
drawn over them, and only what is on that one is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orchestrator.reporting.figure_style import DOTS_PER_INCH, GRAY, GRID, ORANGE, SERIES
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

LONGEST_LABELED_SCHEDULE = 12
BASELINE_MARKERS = "Ds^vP<"
SERIES_MARKERS = "oshpd8"
INK = "#1c1c1c"


def draw_front(front: Front, *, title: str = "", mark_paper: bool = False) -> Figure:
    """Draw a front, or that of several sweeps with each one's own.

    Args:
        front: What to draw.
        title: Stands above the picture.
        mark_paper: Mark the paper's headline, scaled to the full model; only where the quality is
            an accuracy.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not front.points:
        raise ValueError("a front needs at least one result with a cost and a quality")
    figure = Figure(figsize=(7.0, 4.6), layout="constrained", dpi=DOTS_PER_INCH)
    panel = figure.add_subplot()
    labels = LabelPlacer(panel)
    if front.sweep_of:
        _draw_series(panel, labels, front)
    else:
        _draw_steps(panel, labels, front, {"color": SERIES[0], "lw": 1.6, "label": "front"})
        _draw_trials(panel, front, front.points, color=SERIES[0])
    _draw_others(panel, front)
    if mark_paper and is_accuracy(front.axes.quality):
        _draw_paper_mark(panel, front)
    _dress(panel, front)
    if title:
        panel.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=12)
    _ask_for_labels(labels, front)
    # The layout has to be final before labels can look for room.
    figure.draw_without_rendering()
    labels.place()
    return figure


def _draw_series(panel: Panel, labels: LabelPlacer, front: Front) -> None:
    _draw_steps(panel, labels, front, {"color": INK, "lw": 1.8, "label": "front of all"})
    for number, (name, part) in enumerate(front.by_sweep.items()):
        color = SERIES[number % len(SERIES)]
        marker = SERIES_MARKERS[number % len(SERIES_MARKERS)]
        own = [point for point in front.points if front.sweep_of[point.result.key] == name]
        _draw_steps(panel, labels, part, {"color": color, "lw": 1.2, "alpha": 0.45})
        _draw_trials(panel, front, own, color=color, marker=marker, is_named=False)
        panel.plot([], [], color=color, marker=marker, lw=1.2, label=name)


def _scale(front: Front) -> float:
    return 100.0 if is_accuracy(front.axes.quality) else 1.0


def _is_trial(point: FrontPoint) -> bool:
    return point.result.role == "trial"


def _draw_steps(panel: Panel, labels: LabelPlacer, front: Front, look: Mapping[str, Any]) -> None:
    members = front.members
    if not members:
        return
    costs = [point.cost for point in members]
    heights = [_scale(front) * point.quality for point in members]
    # Flat behind the last member: spending more buys nothing more.
    costs.append(max(point.cost for point in front.points))
    heights.append(heights[-1])
    panel.step(costs, heights, where="post", zorder=2, **look)
    labels.avoid_steps(costs, heights)


def _draw_trials(
    panel: Panel,
    front: Front,
    points: Sequence[FrontPoint],
    *,
    color: str,
    marker: str = "o",
    is_named: bool = True,
) -> None:
    trials = [point for point in points if _is_trial(point)]
    look = {"marker": marker, "mec": color, "ecolor": color}
    on_front = {**look, "markersize": 6.5, "mfc": color, "zorder": 4}
    dominated = {**look, "markersize": 5.5, "mfc": "white", "alpha": 0.4, "zorder": 3}
    names = ("trial on the front", "dominated trial") if is_named else ("", "")
    _draw_bars(panel, front, [p for p in trials if p.on_front], names[0], on_front)
    _draw_bars(panel, front, [p for p in trials if not p.on_front], names[1], dominated)


def _draw_others(panel: Panel, front: Front) -> None:
    """Draw the full models and the baselines, which have shapes of their own."""
    teachers = [point for point in front.points if point.result.role == "teacher"]
    star = {"marker": "*", "markersize": 14, "mfc": ORANGE, "mec": "black", "zorder": 5}
    _draw_bars(panel, front, teachers, "teacher", {**star, "ecolor": ORANGE})
    baselines = [point for point in front.points if point.is_baseline]
    hollow = {"markersize": 6, "mfc": "white", "mec": "black", "ecolor": GRAY, "zorder": 4}
    if len(baselines) > len(BASELINE_MARKERS):
        look = {**hollow, "marker": BASELINE_MARKERS[0]}
        _draw_bars(panel, front, baselines, "baseline", look)
        return
    for point, marker in zip(baselines, BASELINE_MARKERS, strict=False):
        _draw_bars(panel, front, [point], full_name(front, point), {**hollow, "marker": marker})


def _draw_bars(
    panel: Panel, front: Front, points: Sequence[FrontPoint], name: str, look: Mapping[str, Any]
) -> None:
    """Draw points with their standard errors, where there are any."""
    errors = [_scale(front) * (point.error or 0.0) for point in points]
    if points:
        panel.errorbar(
            [point.cost for point in points],
            [_scale(front) * point.quality for point in points],
            yerr=errors if any(errors) else None,
            label=name or None,
            linestyle="none",
            **look,
            mew=1.2,
            elinewidth=0.7,
            capsize=2,
        )


def _draw_paper_mark(panel: Panel, front: Front) -> None:
    full = front.full
    if full is not None:
        panel.plot(
            [PAPER_COST_SHARE * full.cost],
            [_scale(front) * PAPER_QUALITY_SHARE * full.quality],
            label=PAPER_MARK,
            linestyle="none",
            marker="x",
            markersize=9,
            mew=2,
            color=INK,
            zorder=3.5,
        )


def _dress(panel: Panel, front: Front) -> None:
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
    legend = panel.legend(
        fontsize=8,
        title="labels: corrections per layer",
        title_fontsize=7.5,
        loc="lower right",
        framealpha=0.95,
        edgecolor=GRID,
    )
    legend.set_zorder(8)
    full = front.full
    if full is not None and full.cost and full.quality:
        _add_share_axes(panel, full.cost, _scale(front) * full.quality, quality)


def _add_share_axes(panel: Panel, cost: float, quality: float, name: str) -> None:
    top = panel.secondary_xaxis("top", functions=_percent_of(cost))
    right = panel.secondary_yaxis("right", functions=_percent_of(quality))
    top.set_xlabel("% of the full model's cost", fontsize=8, color=GRAY)
    right.set_ylabel(f"{name}, % of the full model's", fontsize=8, color=GRAY)
    for side in (top, right):
        side.tick_params(labelsize=8, colors=GRAY)


def _percent_of(whole: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return the functions to and from percent that a secondary axis takes."""
    return (lambda part: 100 * part / whole), (lambda percent: percent * whole / 100)


def _ask_for_labels(labels: LabelPlacer, front: Front) -> None:
    """Queue the labels, the most important first; baselines are named in the legend."""
    scale, knee = _scale(front), front.knee
    for point in front.points:
        labels.avoid_point(point.cost, scale * point.quality, scale * (point.error or 0.0))
    for point in sorted(front.members, key=lambda member: member is not knee):
        if _is_trial(point):
            text = f"{_short(point)} (knee)" if point is knee else _short(point)
            labels.add(point.cost, scale * point.quality, text, important=point is knee)
    for point in front.points:
        if _is_trial(point) and not point.on_front:
            labels.add(point.cost, scale * point.quality, _short(point), color=GRAY)


def _short(point: FrontPoint) -> str:
    schedule = point.result.schedule
    if schedule is None or len(schedule) > LONGEST_LABELED_SCHEDULE:
        return point.result.name
    return ("" if max(schedule) < 10 else ",").join(str(r) for r in schedule)
