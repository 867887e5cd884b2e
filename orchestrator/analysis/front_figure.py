"""The picture of a front: what each model costs and how good it is, with errors, for a paper.

The line is a staircase, because it says what a budget buys: the best model that costs no more.
Dominated trials stay in the picture, faint; the teacher and the references have shapes of their
own; the axes on the far sides read as shares of the full model. Several fronts on the same two
numbers can lie over each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orchestrator.analysis.labels import LabelPlacer
from orchestrator.analysis.pareto import Front, Placed
from orchestrator.analysis.style import (
    DOTS_PER_INCH,
    GRAY,
    GRID,
    ORANGE,
    PAPER_COST_SHARE,
    PAPER_MARK,
    PAPER_QUALITY_SHARE,
    RED,
    SERIES,
    is_accuracy,
    title_of,
)

LONGEST_LABELED_SCHEDULE = 12
REFERENCE_MARKERS = "Ds^vP<"


def draw_front(
    fronts: Front | Sequence[Front],
    *,
    title: str = "",
    names: Sequence[str] = (),
    mark_paper: bool = False,
) -> Figure:
    """Draw one front, or several over each other.

    Args:
        fronts: What to draw; all on the same two numbers.
        title: Stands above the picture.
        names: One for each front, for the legend; needed for several.
        mark_paper: Mark the paper's headline, scaled to the first front's full model; only where
            the quality is an accuracy.

    Raises:
        ValueError: If there is nothing to draw, or the fronts have different axes.
    """
    fronts = [fronts] if isinstance(fronts, Front) else list(fronts)
    if not any(front.placed for front in fronts):
        raise ValueError("a front needs at least one result with a cost and a quality")
    if len({front.axes for front in fronts}) > 1:
        raise ValueError("fronts over each other need the same axes")
    names = list(names) or ["front"] * len(fronts)
    figure = Figure(figsize=(7.0, 4.6), layout="constrained", dpi=DOTS_PER_INCH)
    panel = figure.add_subplot()
    labels = LabelPlacer(panel)
    for front, name, color in zip(fronts, names, SERIES, strict=False):
        _draw_steps(panel, labels, front, color, name)
        _draw_points(panel, front, color, is_first=front is fronts[0])
    if mark_paper and is_accuracy(fronts[0].axes.quality):
        _draw_paper_mark(panel, fronts[0])
    _dress(panel, fronts[0])
    if title:
        panel.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=12)
    for front in fronts:
        _ask_for_labels(labels, front)
    # The layout has to be final before labels can look for room.
    figure.draw_without_rendering()
    labels.place()
    return figure


def _scale(front: Front) -> float:
    return 100.0 if is_accuracy(front.axes.quality) else 1.0


def _is_trial(point: Placed) -> bool:
    return point.result.role == "trial"


def _draw_steps(panel: Panel, labels: LabelPlacer, front: Front, color: str, name: str) -> None:
    members = front.members
    if not members:
        return
    costs = [point.cost for point in members]
    heights = [_scale(front) * point.quality for point in members]
    # Flat behind the last member: spending more buys nothing more.
    costs.append(max(point.cost for point in front.placed))
    heights.append(heights[-1])
    panel.step(costs, heights, where="post", color=color, lw=1.6, zorder=2, label=name)
    labels.avoid_steps(costs, heights)


def _draw_points(panel: Panel, front: Front, color: str, *, is_first: bool) -> None:
    groups: list[tuple[str, list[Placed], dict[str, Any]]] = [
        (
            "teacher",
            [p for p in front.placed if p.result.role == "teacher"],
            {"marker": "*", "markersize": 14, "mfc": ORANGE, "mec": "black", "zorder": 5},
        ),
        (
            "trial on the front",
            [p for p in front.placed if _is_trial(p) and p.on_front],
            {"marker": "o", "markersize": 6.5, "mfc": color, "zorder": 4},
        ),
        (
            "dominated trial",
            [p for p in front.placed if _is_trial(p) and not p.on_front],
            {"marker": "o", "markersize": 5.5, "mfc": "white", "alpha": 0.4, "zorder": 3},
        ),
    ]
    defaults: dict[str, Any] = {"mec": color, "ecolor": color, "zorder": 4}
    references = [point for point in front.placed if not point.is_candidate]
    hollow = {"markersize": 6, "mfc": "white", "mec": "black", "ecolor": GRAY}
    if len(references) <= len(REFERENCE_MARKERS):
        for point, marker in zip(references, REFERENCE_MARKERS, strict=False):
            groups.append((point.result.name, [point], {**hollow, "marker": marker}))
    else:
        groups.append(("reference", references, {**hollow, "marker": REFERENCE_MARKERS[0]}))
    for name, points, style in groups:
        errors = [_scale(front) * (point.error or 0.0) for point in points]
        if points:
            panel.errorbar(
                [point.cost for point in points],
                [_scale(front) * point.quality for point in points],
                yerr=errors if any(errors) else None,
                label=name if is_first else None,
                linestyle="none",
                **defaults | style,
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
            color=RED,
            zorder=3.5,
        )


def _dress(panel: Panel, front: Front) -> None:
    quality = title_of(front.axes.quality)
    panel.set_xlabel(title_of(front.axes.cost))
    panel.set_ylabel(f"{quality} (%)" if is_accuracy(front.axes.quality) else quality)
    panel.grid(True, color=GRID, lw=0.6)
    panel.set_axisbelow(True)
    panel.margins(x=0.1, y=0.1)
    panel.spines[["top", "right"]].set_color("#bbbbbb")
    if not front.axes.higher_is_better:
        panel.invert_yaxis()
    if all(point.cost == int(point.cost) for point in front.placed):
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
    """Queue the labels, the most important first; references are named in the legend."""
    scale, knee = _scale(front), front.knee
    for point in front.placed:
        labels.avoid_point(point.cost, scale * point.quality, scale * (point.error or 0.0))
    for point in sorted(front.members, key=lambda member: member is not knee):
        if _is_trial(point):
            text = f"{_short(point)} (knee)" if point is knee else _short(point)
            labels.add(point.cost, scale * point.quality, text, important=point is knee)
    for point in front.placed:
        if _is_trial(point) and not point.on_front:
            labels.add(point.cost, scale * point.quality, _short(point), color=GRAY)


def _short(point: Placed) -> str:
    schedule = point.result.schedule
    if schedule is None or len(schedule) > LONGEST_LABELED_SCHEDULE:
        return point.result.name
    return ("" if max(schedule) < 10 else ",").join(str(r) for r in schedule)
