"""The picture of the elastic study: what a longer elastic training buys, schedule by schedule.

One panel for each teacher. From left to right the elastic training gets longer; its cost is given
as a share of that of the separate students. A line is a schedule: how much worse the elastic
weights are than its student. Dashed lines are the bars: the study asks for points below and left
of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure

from orchestrator.reporting.figure_style import DOTS_PER_INCH, GRAY, GRID, INK, save_figure

Lines = dict[str, list[tuple[float, float]]]
"""Schedule -> share of the training FLOPs, and how much worse than its student."""


def write_figure(
    panels: Mapping[str, tuple[str, Lines, float]], max_share: float, stem: Path
) -> list[Path]:
    """Write the picture as PNG and SVG.

    Args:
        panels: Teacher -> label of the vertical axis, lines, and the most that is allowed.
        max_share: Largest share of the FLOPs that is allowed.
        stem: Path without the ending.
    """
    size = (4.6 * len(panels) + 0.4, 4.2)
    figure = Figure(figsize=size, layout="constrained", dpi=DOTS_PER_INCH)
    for panel, (teacher, content) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _draw_panel(panel, teacher, *content, max_share)
    return save_figure(figure, stem)


def _draw_panel(
    panel: Panel, teacher: str, label: str, lines: Lines, most: float, max_share: float
) -> None:
    for color, marker, (name, points) in zip(
        _shades(len(lines)), "osD^vP*X<>" * 3, lines.items(), strict=False
    ):
        shares, worse = zip(*sorted(points), strict=True)
        percents = [100 * share for share in shares]
        panel.plot(percents, worse, f"{marker}-", color=color, lw=1.3, ms=5, label=name)
    panel.axhline(most, color=GRAY, ls="--", lw=1)
    panel.axvline(100 * max_share, color=GRAY, ls="--", lw=1)
    panel.axhline(0, color=INK, lw=0.6)
    panel.set_xlim(left=0)
    panel.set_title(teacher, fontsize=10, color=INK)
    panel.set_xlabel("training FLOPs, % of the separate students'")
    panel.set_ylabel(label)
    panel.grid(True, color=GRID, lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(title="schedule", fontsize=7, title_fontsize=7.5)


def _shades(count: int) -> list[tuple[float, float, float]]:
    # From the costliest schedule, dark, to the cheapest, light.
    return [colormaps["viridis"](0.85 * n / max(count - 1, 1))[:3] for n in range(count)]
