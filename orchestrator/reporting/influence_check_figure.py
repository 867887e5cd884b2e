"""Scatter of influence against what dropping a correction costs: a panel for each metric."""

from __future__ import annotations

from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from orchestrator.reporting.figure_style import (
    DOTS_PER_INCH,
    GRAY,
    GRID,
    SWEEP_COLORS,
    fix_layout,
)
from orchestrator.reporting.influence_check import InfluenceCheck, correlation_text
from orchestrator.reporting.label_placement import LabelPlacer

MARKERS = "osD^vP*X<>"
"""One for each layer, with a color; both repeat, at different layers."""


def draw_influence_check(check: InfluenceCheck, *, title: str = "") -> Figure:
    """Draw influence against cost, with labels `layer,correction`.

    Raises:
        ValueError: If the model makes no corrections.
    """
    if not check.costs:
        raise ValueError("a scatter of influence needs at least one correction")
    width = 0.6 + 3.4 * len(check.tables)
    figure = Figure(figsize=(width, 3.9), layout="constrained", dpi=DOTS_PER_INCH)
    panels = figure.subplots(1, len(check.tables), sharey=True, squeeze=False)[0]
    placers = [
        _draw_panel(panel, check, metric)
        for panel, metric in zip(panels, check.tables, strict=True)
    ]
    cost = check.cost_name
    panels[0].set_ylabel(cost[0].upper() + cost[1:])
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=8,
        fontsize=8,
        frameon=False,
    )
    if title:
        figure.suptitle(title, fontsize=11, fontweight="bold")
    # Labels can be placed only in the final layout.
    fix_layout(figure)
    for placer in placers:
        placer.place()
    return figure


def _draw_panel(panel: Panel, check: InfluenceCheck, metric: str) -> LabelPlacer:
    influences = check.influences(metric)
    placer = LabelPlacer(panel)
    panel.axhline(0, color=GRAY, lw=0.8, zorder=1)
    if min(influences) > 0:
        panel.set_xscale("log")
        # Influences within one power of ten have ticks between them, too.
        narrow = max(influences) < 30 * min(influences)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    points = list(zip(check.names, influences, check.costs, strict=True))
    for layer in dict.fromkeys(layer for layer, _ in check.names):
        xs, ys = zip(*((x, y) for (own, _), x, y in points if own == layer), strict=True)
        panel.plot(
            xs,
            ys,
            linestyle="none",
            color=SWEEP_COLORS[(layer - 1) % len(SWEEP_COLORS)],
            marker=MARKERS[(layer - 1) % len(MARKERS)],
            label=f"layer {layer}",
            zorder=3,
        )
    for (layer, i), x, y in sorted(points, key=lambda point: -point[2]):
        placer.avoid_point(x, y)
        placer.add(x, y, f"{layer},{i}")
    rho, rho_of_maxima = map(correlation_text, check.correlations(metric))
    panel.set_title(f"{metric}: rank correlation {rho}\n(suffix maxima {rho_of_maxima})", size=9)
    panel.set_xlabel(f"Influence ({metric})")
    panel.margins(0.12)
    panel.grid(color=GRID, lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    return placer
