"""The picture of the depth study: accuracy against NFE, one panel for each number of layers.

The gray line is vanilla, from the panel's number of layers on: what the same cost buys with more
weights. All other models of a panel have the same number of layers. Bars reach from the worst to
the best seed. Models of the same cost stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair
from altair import Chart, InlineData, Scale
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

from orchestrator.reporting.charts import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PINK,
    RED,
    SKY,
    STAR,
    chart_spec,
    save_chart,
)
from orchestrator.terminal.render import format_count

SHIFT = 1.035
"""Factor between the places of two models of the same cost."""
DEEPER = "vanilla, more layers"


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
    panels = [_panel(arms, choices, layers) for layers in numbers]
    whole = altair.hconcat(*panels).resolve_scale(y="shared")
    return save_chart(chart_spec(whole), stem)


def _panel(arms: Mapping[str, ArmResult], choices: Choices, layers: int) -> altair.LayerChart:
    deepest = layers * (1 + max(choices.corrections))
    depths = [vanilla_name(depth) for depth in range(layers, deepest + 1)]
    series = [(DEEPER, GRAY, "circle", 0, depths), *_lines(layers, choices)]
    rows: list[dict[str, Any]] = [
        {
            "label": label,
            "cost": arm.evaluations * SHIFT**places,
            "accuracy": 100 * arm.accuracy,
            "least": 100 * min(arm.accuracies.values()),
            "most": 100 * max(arm.accuracies.values()),
        }
        for label, _, _, places, names in series
        for arm in (arms[name] for name in names if name in arms)
    ]
    labels, colors, shapes = ([*column] for column in zip(*(s[:3] for s in series), strict=True))
    # Ticks at the costs that occur.
    costs = {arms[n].evaluations for n in (*depths, *_names(layers, choices)) if n in arms}
    legend = altair.Legend(title=None, orient="bottom", columns=2, labelLimit=240)
    models = Chart(InlineData(values=rows)).encode(
        x=altair.X(
            "cost:Q",
            title="NFE per token",
            scale=Scale(type="log", base=2, nice=False, padding=12),
            axis=altair.Axis(values=sorted(costs), format="d"),
        ),
        color=altair.Color("label:N", scale=Scale(domain=labels, range=colors), legend=legend),
    )
    accuracy = altair.Y("accuracy:Q", title="accuracy % (mean over the seeds)")
    accuracy.scale = Scale(zero=False)
    shape = altair.Shape("label:N", scale=Scale(domain=labels, range=shapes), legend=legend)
    return altair.layer(
        models.mark_rule().encode(y=altair.Y("least:Q", scale=Scale(zero=False)), y2="most:Q"),
        models.mark_line(strokeWidth=1.4).encode(y=accuracy),
        models.mark_point(filled=True, size=60, opacity=1).encode(y=accuracy, shape=shape),
    ).properties(title=format_count(layers, "layer"), width=330, height=330)


def _names(layers: int, choices: Choices) -> list[str]:
    return [name for *_, names in _lines(layers, choices) for name in names]


def _lines(layers: int, choices: Choices) -> list[tuple[str, str, str, int, list[str]]]:
    """Return label, color, shape, places to the right and the arms' names of each line.

    Most lines are single points.
    """
    plain = [iiet_name(r, layers) for r in (0, *choices.corrections)]
    loops = [looped_name(r, layers) for r in choices.corrections]
    most = plain[-1]
    shown = ", ".join(map(str, (0, *choices.corrections)))
    return [
        (f"IIET, r = {shown}", BLUE, "square", 0, plain),
        ("the whole stack repeated", RED, "diamond", 1, loops),
        ("IIET in two stages", SKY, "triangle-down", -2, [most + TWO_STAGES]),
        ("prediction reinjected", GREEN, "triangle-up", -1, [most + REINJECTED]),
        ("learned damping", PINK, "cross", 2, [most + DAMPED]),
        ("schedules drawn", INK, "triangle-right", 3, [most + DRAWN]),
        (PCFORMER, ORANGE, STAR, 0, [pcformer_name(layers)]),
    ]
