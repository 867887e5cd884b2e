"""The picture of the depth study: accuracy against NFE, one panel for each number of layers.

The gray line is vanilla, from the panel's number of layers on: what the same cost buys with more
weights. All other models of a panel have the same number of layers. Bars reach from the worst to
the best seed. Models of the same cost stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from depth_arms import (
    DAMPED,
    DRAWN,
    PCFORMER,
    REINJECTED,
    TWO_STAGES,
    Choices,
    iiet_name,
    looped_name,
    pcformer_name,
    vanilla_name,
)
from depth_results import ArmResult
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from orchestrator.reporting.figure_style import (
    BLUE,
    DOTS_PER_INCH,
    GRAY,
    GREEN,
    GRID,
    INK,
    ORANGE,
    PINK,
    RED,
    SKY,
    save_figure,
)
from orchestrator.terminal.render import format_count

SHIFT = 1.035
"""Factor between the places of two models of the same cost."""


def write_figure(arms: Mapping[str, ArmResult], choices: Choices, stem: Path) -> list[Path]:
    """Write the picture as PNG and SVG.

    Args:
        arms: Finished arms by name.
        stem: Path without the ending.
    """
    numbers = [
        layers
        for layers in (*choices.layers, *choices.more_layers)
        if any(name in arms for name in _names(layers, choices))
    ] or [choices.layers[0]]
    size = (4.2 * len(numbers) + 0.4, 4.6)
    figure = Figure(figsize=size, layout="constrained", dpi=DOTS_PER_INCH)
    panels = figure.subplots(1, len(numbers), squeeze=False, sharey=True)[0]
    for panel, layers in zip(panels, numbers, strict=True):
        _draw_panel(panel, arms, choices, layers)
    panels[0].set_ylabel("accuracy % (mean over the seeds)")
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=2 + len(numbers), fontsize=7.5
    )
    return save_figure(figure, stem)


def _draw_panel(panel: Panel, arms: Mapping[str, ArmResult], choices: Choices, layers: int) -> None:
    deepest = layers * (1 + max(choices.corrections))
    depths = [vanilla_name(depth) for depth in range(layers, deepest + 1)]
    _draw(panel, arms, depths, "vanilla, more layers", GRAY, "o-")
    for label, color, style, places, names in _lines(layers, choices):
        _draw(panel, arms, names, label, color, style, shift=SHIFT**places)
    panel.set_title(format_count(layers, "layer"), fontsize=10, color=INK)
    panel.set_xlabel("NFE per token")
    panel.set_xscale("log", base=2)
    # Ticks at the costs that occur.
    costs = {arms[n].evaluations for n in (*depths, *_names(layers, choices)) if n in arms}
    panel.xaxis.set_major_locator(FixedLocator(sorted(costs)))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(True, color=GRID, lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _names(layers: int, choices: Choices) -> list[str]:
    return [name for *_, names in _lines(layers, choices) for name in names]


def _lines(layers: int, choices: Choices) -> list[tuple[str, str, str, int, list[str]]]:
    """Return label, color, style, places to the right and the arms' names of each line.

    Most lines are single points.
    """
    plain = [iiet_name(r, layers) for r in (0, *choices.corrections)]
    loops = [looped_name(r, layers) for r in choices.corrections]
    most = plain[-1]
    shown = ", ".join(map(str, (0, *choices.corrections)))
    return [
        (f"IIET, r = {shown}", BLUE, "s-", 0, plain),
        ("the whole stack repeated", RED, "D-", 1, loops),
        ("IIET in two stages", SKY, "v", -2, [most + TWO_STAGES]),
        ("prediction reinjected", GREEN, "^", -1, [most + REINJECTED]),
        ("learned damping", PINK, "P", 2, [most + DAMPED]),
        ("schedules drawn", INK, "X", 3, [most + DRAWN]),
        (PCFORMER, ORANGE, "*", 0, [pcformer_name(layers)]),
    ]


def _draw(
    panel: Panel,
    arms: Mapping[str, ArmResult],
    names: list[str],
    label: str,
    color: str,
    style: str,
    *,
    shift: float = 1.0,
) -> None:
    found = [arms[name] for name in names if name in arms]
    if not found:
        return
    xs = [arm.evaluations * shift for arm in found]
    ys = [100 * arm.accuracy for arm in found]
    least = [100 * (arm.accuracy - min(arm.accuracies.values())) for arm in found]
    most = [100 * (max(arm.accuracies.values()) - arm.accuracy) for arm in found]
    panel.errorbar(
        xs, ys, (least, most), fmt=style, color=color, label=label, lw=1.4, ms=6, capsize=2,
        elinewidth=0.8,
    )  # fmt: skip
