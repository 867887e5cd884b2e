"""Draws the figures of docs/concepts.md: `python docs/concept_figures.py`.

Everything shown is computed by the functions that the program itself uses: the fixed-point solver,
the parser of schedules, the threshold family, the front with its knee. Influences and accuracies
are those of one run of the demo, whose table is in
research/results.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import altair
import torch
from altair import Axis, Chart, InlineData, Scale
from diagrams import box, diagram, drawing, text

from iiet import IterationSchedule, schedule_family
from iiet.methods.implicit_euler import fixed_point
from orchestrator.records.evaluation import Suite
from orchestrator.records.trial import Trial
from orchestrator.reporting.charts import (
    Spec,
    chart_spec,
    front_chart,
    influence_chart,
    save_chart,
)
from orchestrator.reporting.colors import BLUE, GRAY, RED, SKY
from orchestrator.reporting.front import find_front
from orchestrator.reporting.results import model_results

FOLDER = Path(__file__).resolve().parent / "images" / "concepts"

SHOWN_SCHEDULES = ("2", "3..0", "1,1,1,1,0,0", "0")

REPORT = Path(__file__).resolve().parent.parent / "research" / "fronts" / "demo.json"
TRIALS = [
    Trial.model_validate({**row["details"], "suite": Suite()})
    for row in json.loads(REPORT.read_text("utf-8"))["results"]
]
"""The models of the demo."""
LAST_USE = {
    trial.model.corrections: trial.threshold_up_to or 0.0
    for trial in TRIALS
    if trial.role == "trial"
}
"""Schedule -> the highest threshold that gives it."""
INFLUENCE = [
    [
        max(threshold for kept, threshold in LAST_USE.items() if kept[layer] > correction)
        for correction in range(count)
    ]
    for layer, count in enumerate(max(LAST_USE, key=lambda schedule: sum(schedule)))
]
"""Of the demo's teacher: where its family changes, by layer and correction."""


def draw_correction() -> Spec:
    """Draw layers with and without corrections, and a fixed-point iteration in one dimension."""
    boxes = []
    texts = []
    arrows = []
    corrections = ("prediction", "correction 1", "correction 2")
    for height, names, title in (
        (1.55, ("block",), "vanilla layer: 1 run"),
        (0.4, corrections, "IIET layer with r = 2: the same block, 3 runs"),
    ):
        texts.append(text(0.05, height + 0.42, title, align="left", is_bold=True))
        texts.append(text(0.05, height, "input", align="left"))
        for number, name in enumerate(names):
            left = 0.65 + 1.25 * number
            arrows.append(((left - (0.35 if number else 0.2), height), (left - 0.03, height)))
            boxes.append(box(left, height - 0.2, 0.9, 0.4, SKY if number else BLUE))
            color = {} if number else {"color": "white"}
            texts.append(text(left + 0.45, height, name, **color))
        arrows.append(((left + 0.9, height), (left + 1.17, height)))
        texts.append(text(left + 1.25, height, "output", align="left"))
    layers = diagram((4.9, 2.2), (112, 112), boxes=boxes, arrows=arrows, texts=texts)
    whole = (layers & _iteration()).resolve_scale(color="independent")
    return drawing(whole)


def implicit_step(estimate: torch.Tensor) -> torch.Tensor:
    """Compute the right-hand side of an implicit Euler step of `y' = 0.9 - 0.4 y^2` from 0.1."""
    return 0.1 + 0.9 - 0.4 * estimate**2


def _iteration() -> altair.LayerChart:
    def estimate_after(num_corrections: int) -> float:
        # The prediction is the explicit step from the state itself.
        prediction = implicit_step(torch.tensor(0.1))
        return float(fixed_point(implicit_step, prediction, num_corrections))

    solution = {"y": estimate_after(200), "x": 1, "label": "fixed point"}
    rows = [
        {"x": n, "y": estimate_after(n), "kind": "corrections" if n else "prediction"}
        for n in range(6)
    ]
    x = altair.X("x:Q", title="corrections", axis=Axis(tickMinStep=1))
    y = altair.Y("y:Q", title="estimate", scale=Scale(zero=False))
    legend = altair.Legend(title=None, orient="top-right")
    colors = Scale(domain=["prediction", "corrections"], range=[BLUE, SKY])
    steps = Chart(InlineData(values=rows))
    end = Chart(InlineData(values=[solution]))
    return altair.layer(
        end.mark_rule(color=GRAY, strokeDash=[6, 4]).encode(y),
        end.mark_text(color=GRAY, dy=-8).encode(x, y, text="label:N"),
        steps.mark_line(color=BLUE, strokeWidth=1.2).encode(x, y),
        steps.mark_point(filled=True, size=90, opacity=1).encode(
            x, y, altair.Color("kind:N", scale=colors, legend=legend)
        ),
    ).properties(title="an implicit step in one dimension", width=480, height=190)


def draw_schedules() -> Spec:
    """Draw six layers under several schedules, a square for each run."""
    panels = []
    for shown in SHOWN_SCHEDULES:
        schedule = IterationSchedule.parse(shown, num_layers=6)
        squares = [
            box(0.5 + run, 5.1 - layer, 0.8, 0.8, SKY if run else BLUE)
            for layer, count in enumerate(schedule)
            for run in range(1 + count)
        ]
        numbers = [text(0.2, 5.5 - layer, f"{layer + 1}") for layer in range(6)]
        panel = diagram((4.6, 6), (30, 30), boxes=squares, texts=numbers, corner=3)
        panels.append(panel.properties(title=[shown, f"NFE {schedule.num_evaluations}"]))
    names = [text(1.3, 0.3, "prediction", align="left"), text(4.3, 0.3, "correction", align="left")]
    marks = [box(0.8, 0.1, 0.4, 0.4, BLUE), box(3.8, 0.1, 0.4, 0.4, SKY)]
    legend = diagram((12, 0.6), (45, 45), boxes=marks, texts=names, corner=3)
    return drawing(altair.vconcat(altair.hconcat(*panels), legend))


def draw_demo_influence() -> Spec:
    """Draw the demo's influence, and what the schedule 1,1 keeps of the corrections."""
    return influence_chart(
        INFLUENCE, metric="cosine", marked_schedule=(1, 1), marked_name="schedule 1,1"
    )


def draw_family() -> Spec:
    """Draw the schedule, and its cost, that each threshold gives on the demo's influence."""
    lowest = 0.0004
    highest = 0.25
    rows = [
        {
            "above": max(member.threshold_above, lowest),
            "up_to": min(member.threshold_up_to, highest),
            "cost": member.schedule.num_evaluations,
            "schedule": str(member.schedule),
        }
        for member in schedule_family(INFLUENCE)
    ]
    x = altair.X("above:Q", title="threshold on influence")
    y = altair.Y("cost:Q", title="NFE per token", scale=Scale(domain=[1.5, 8.8]))
    scale = Scale(type="log", domain=[lowest, highest], nice=False)
    chart = Chart(InlineData(values=rows))
    lines = chart.mark_rule(color=BLUE, strokeWidth=4).encode(x.scale(scale), y, x2="up_to:Q")
    names = chart.mark_text(align="right", dy=-10, fontSize=12)
    named = names.encode(altair.X("up_to:Q", scale=scale), y, text="schedule:N")
    return chart_spec(altair.layer(lines, named).properties(width=560, height=260).to_dict())


def draw_knee() -> Spec:
    """Draw the demo's front as reports do, with the line that the knee is measured from."""
    front = find_front(model_results(TRIALS))
    chart = front_chart(front)
    picks = [front.picks["cheapest"], front.picks["best"]]
    ends = [{"x": pick.cost, "y": pick.quality} for pick in picks]
    chord: Spec = {
        "data": {"values": ends},
        "mark": {"type": "line", "color": RED, "strokeDash": [6, 4]},
        "encoding": {name: {**chart["layer"][1]["encoding"][name]} for name in ("x", "y")},
    }
    third = {name: (2 * ends[0][name] + ends[1][name]) / 3 for name in ("x", "y")}
    name = {"type": "text", "color": RED, "align": "left", "dx": 8, "dy": 14}
    encoding = {**chord["encoding"], "text": {"value": "from cheapest to best"}}
    chart["layer"] += [chord, {"data": {"values": [third]}, "mark": name, "encoding": encoding}]
    return chart


FIGURES: dict[str, Callable[[], Spec]] = {
    "correction": draw_correction,
    "schedules": draw_schedules,
    "influence": draw_demo_influence,
    "family": draw_family,
    "front": draw_knee,
}
"""Name of the file to the function that draws it."""


def write_figures(folder: Path) -> list[Path]:
    """Write all figures as PNG and return their paths."""
    return [
        path
        for name, draw in FIGURES.items()
        for path in save_chart(draw(), folder / name, ("png",))
    ]


if __name__ == "__main__":
    write_figures(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
