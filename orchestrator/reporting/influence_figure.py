"""Heat map of the influence of each correction of each layer.

Colors are on a logarithmic scale, because influence falls by powers of ten; each cell also has its
number. A line can show which corrections an iteration schedule keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from orchestrator.reporting.figure_style import DOTS_PER_INCH, RED


def draw_influence(
    rows: Sequence[Sequence[float]],
    *,
    metric: str,
    title: str = "",
    kept: Sequence[int] | None = None,
    kept_name: str = "",
) -> Figure:
    """Draw the influence of every correction.

    Args:
        rows: Influence of correction 1, 2, ... for each layer; rows may differ in length. NaN is a
            correction that the layer does not have.
        metric: Name of the measure.
        title: Title of the figure.
        kept: An iteration schedule; a line is drawn after the last correction that it keeps.
        kept_name: Name of that schedule in the legend.

    Raises:
        ValueError: If there is no correction to draw.
    """
    width = max((len(row) for row in rows), default=0)
    cells = [[row[i] if i < len(row) else math.nan for i in range(width)] for row in rows]
    if all(math.isnan(value) for row in cells for value in row):
        raise ValueError("an influence heat map needs at least one correction")
    logs = _logarithms(cells)
    size = (2.9 + 0.95 * width, 1.6 + 0.3 * len(rows))
    figure = Figure(figsize=size, layout="constrained", dpi=DOTS_PER_INCH)
    panel = figure.add_subplot()
    picture = panel.imshow(logs, cmap="viridis", aspect="auto")
    _write_numbers(panel, cells, logs, picture.get_clim())
    if kept is not None:
        _draw_cut(panel, kept)
        panel.plot([], [], color=RED, lw=2.5, label=f"kept: {kept_name}" if kept_name else "kept")
        figure.legend(loc="outside lower center", fontsize=9, frameon=False)
    panel.set_xticks(range(width), [str(i + 1) for i in range(width)])
    panel.set_yticks(range(len(rows)), [str(layer + 1) for layer in range(len(rows))])
    panel.set_xlabel("Correction")
    panel.set_ylabel("Layer")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    bar = figure.colorbar(picture, ax=panel, pad=0.03, aspect=28)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 5, 10]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda log, _: f"{10**log:.1g}"))
    bar.outline.set_visible(False)
    bar.set_label(f"Influence ({metric})")
    if title:
        panel.set_title(title, fontsize=11, fontweight="bold", pad=10)
    return figure


def _logarithms(cells: Sequence[Sequence[float]]) -> list[list[float]]:
    # Zero, and negative values from noise, get the color of the smallest positive influence.
    floor = min((v for row in cells for v in row if v > 0), default=1.0)
    return [[v if math.isnan(v) else math.log10(max(v, floor)) for v in row] for row in cells]


def _write_numbers(
    panel: Panel,
    cells: Sequence[Sequence[float]],
    logs: Sequence[Sequence[float]],
    limits: tuple[float, float],
) -> None:
    middle = sum(limits) / 2
    for layer, row in enumerate(cells):
        for i, value in enumerate(row):
            if not math.isnan(value):
                text = panel.text(i, layer, f"{value:.2g}", ha="center", va="center", fontsize=9)
                text.set_color("white" if logs[layer][i] < middle else "black")


def _draw_cut(panel: Panel, kept: Sequence[int]) -> None:
    xs, ys = [], []
    for layer, r in enumerate(kept):
        xs += [r - 0.5, r - 0.5]
        ys += [layer - 0.5, layer + 0.5]
    panel.plot(xs, ys, color=RED, lw=2.5, clip_on=False, solid_capstyle="butt")
