"""Draws the figures of docs/concepts.md: `python docs/concept_figures.py`.

Everything shown is computed by the functions that the program itself uses: the fixed-point solver,
the parser of schedules, the threshold family, the front with its knee. Influences are those of one
run of the demo, whose table is in the README, and accuracies those of one run of `sweep depth`,
whose table is in docs/results.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from figure_style import DOTS_PER_INCH, save_figure
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from iiet import IterationSchedule, ModelConfig, schedule_family
from iiet.solvers import fixed_point
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.reporting.charts import (
    BLUE,
    GRAY,
    GRID,
    INK,
    RED,
    SKY,
    Spec,
    front_chart,
    influence_chart,
    save_chart,
)
from orchestrator.reporting.pareto import Front, find_front
from orchestrator.reporting.results import result_table

FOLDER = Path(__file__).resolve().parent / "images" / "concepts"

SHOWN_SCHEDULES = ("2", "3..0", "1,1,1,1,0,0", "0")

INFLUENCE = ((0.074, 0.051, 0.049), (0.060, 0.0087, 0.0013))
"""Of the demo's teacher: where its family changes, by layer and correction."""

ACCURACY = {
    "0,0": (0.605, 0.008), "0,3": (0.996, 0.001), "1,3": (1.0, 0.0), "2,3": (0.999, 0.0),
    "3,3": (0.999, 0.0),
}  # fmt: skip
"""Schedule of a student of the sweep `depth` to its accuracy and standard error."""
TEACHER_ACCURACY = (0.998, 0.001)
BASELINE_ACCURACY = {"r = 0": (0.702, 0.007), "vanilla": (0.710, 0.007)}
NUM_LAYERS = 2


def draw_correction() -> Figure:
    """Draw layers with and without corrections, and a fixed-point iteration in one dimension."""
    figure = Figure(figsize=(9.0, 3.9), layout="constrained", dpi=DOTS_PER_INCH)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
    _draw_layers(left)
    _draw_iteration(right)
    return figure


def _draw_layers(panel: Panel) -> None:
    _draw_runs(panel, height=1.55, names=("block",), title="vanilla layer: 1 run")
    names = ("prediction", "correction 1", "correction 2")
    _draw_runs(
        panel, height=0.4, names=names, title="IIET layer with r = 2: the same block, 3 runs"
    )
    panel.set(xlim=(-0.45, 4.25), ylim=(0.0, 2.35))
    panel.axis("off")


def _draw_runs(panel: Panel, *, height: float, names: Sequence[str], title: str) -> None:
    arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    panel.text(-0.4, height + 0.42, title, fontsize=10, fontweight="bold")
    panel.text(-0.3, height, "input", ha="center", va="center", fontsize=9)
    for number, name in enumerate(names):
        x = 0.2 + 1.25 * number
        start = -0.08 if number == 0 else x - 0.35
        panel.annotate("", (x, height), (start, height), arrowprops=arrow)
        box = FancyBboxPatch(
            (x, height - 0.2), 0.9, 0.4, boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=SKY if number else BLUE, edgecolor=INK, alpha=0.85,
        )  # fmt: skip
        panel.add_patch(box)
        color = "white" if number == 0 else INK
        panel.text(x + 0.45, height, name, ha="center", va="center", fontsize=9, color=color)
    end = 0.2 + 1.25 * (len(names) - 1) + 0.9
    panel.annotate("", (end + 0.3, height), (end, height), arrowprops=arrow)
    panel.text(end + 0.33, height, "output", va="center", fontsize=9)


def implicit_step(estimate: torch.Tensor) -> torch.Tensor:
    """Compute the right-hand side of an implicit Euler step of `y' = 0.9 - 0.4 y^2` from 0.1."""
    return 0.1 + 0.9 - 0.4 * estimate**2


def _draw_iteration(panel: Panel) -> None:
    def estimate_after(num_corrections: int) -> float:
        # The prediction is the explicit step from the state itself.
        return float(
            fixed_point(implicit_step, lambda: implicit_step(torch.tensor(0.1)), num_corrections)
        )

    solution = estimate_after(200)
    estimates = [estimate_after(number) for number in range(6)]
    panel.axhline(solution, color=GRAY, lw=1, ls="--")
    panel.text(5.4, solution + 0.03, "fixed point", ha="right", fontsize=9, color=GRAY)
    panel.plot(range(6), estimates, color=BLUE, lw=1.2, zorder=2)
    panel.plot([0], estimates[:1], "o", color=BLUE, ms=8, zorder=3, label="prediction")
    panel.plot(
        range(1, 6), estimates[1:], "o", color=SKY, mec=INK, ms=7, zorder=3, label="corrections"
    )
    panel.set_xticks(range(6))
    panel.set_xlim(-0.4, 5.5)
    panel.set_xlabel("corrections")
    panel.set_ylabel("estimate")
    panel.set_title("an implicit step in one dimension", fontsize=10, fontweight="bold", loc="left")
    panel.legend(fontsize=9, frameon=False, loc="lower right")
    _plain(panel)


def draw_schedules() -> Figure:
    """Draw six layers under several schedules, a square for each run."""
    figure = Figure(figsize=(9.0, 2.9), layout="constrained", dpi=DOTS_PER_INCH)
    panels = figure.subplots(1, len(SHOWN_SCHEDULES), sharey=True)
    for panel, text in zip(panels, SHOWN_SCHEDULES, strict=True):
        schedule = IterationSchedule.parse(text, num_layers=6)
        for layer, count in enumerate(schedule):
            for run in range(1 + count):
                color = BLUE if run == 0 else SKY
                panel.add_patch(_square(run, layer, color))
        panel.set(xlim=(-0.1, 4.0), ylim=(5.95, -0.15), aspect="equal")
        panel.set_title(f"{text}\nNFE {schedule.num_evaluations}", fontsize=10)
        panel.set_xticks([])
        panel.set_yticks([layer + 0.4 for layer in range(6)], [str(n) for n in range(1, 7)])
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    panels[0].set_ylabel("layer")
    marks = [_square(0, 0, BLUE), _square(0, 0, SKY)]
    figure.legend(
        marks,
        ["prediction", "correction"],
        loc="outside lower center",
        ncols=2,
        fontsize=9,
        frameon=False,
    )
    return figure


def _square(run: int, layer: int, color: str) -> FancyBboxPatch:
    return FancyBboxPatch(
        (run, layer), 0.8, 0.8, boxstyle="round,pad=0,rounding_size=0.1", fc=color, ec=INK, lw=0.6
    )


def draw_demo_influence() -> Spec:
    """Draw the demo's influence, and what the schedule 1,1 keeps of the corrections."""
    return influence_chart(INFLUENCE, metric="cosine", kept=(1, 1), kept_name="schedule 1,1")


def draw_family() -> Figure:
    """Draw the schedule, and its cost, that each threshold gives on the demo's influence."""
    figure = Figure(figsize=(7.0, 3.6), layout="constrained", dpi=DOTS_PER_INCH)
    panel = figure.add_subplot()
    lowest, highest = 0.0004, 0.25
    for member in schedule_family(INFLUENCE):
        ends = max(member.threshold_above, lowest), min(member.threshold_up_to, highest)
        cost = member.schedule.num_evaluations
        panel.plot(ends, (cost, cost), color=BLUE, lw=3, solid_capstyle="butt")
        panel.text(ends[1], cost + 0.15, str(member.schedule), ha="right", fontsize=9)
    panel.set_xscale("log")
    panel.set(xlim=(lowest, highest), ylim=(1.5, 8.8))
    panel.set_xlabel("threshold on influence")
    panel.set_ylabel("NFE per token")
    _plain(panel)
    return figure


def depth_front() -> Front:
    """Return the front of the sweep's students, teacher and baselines."""
    trials = [_trial(text, text, "trial", *found) for text, found in ACCURACY.items()]
    trials.append(_trial("teacher", "3,3", "teacher", *TEACHER_ACCURACY))
    for name, found in BASELINE_ACCURACY.items():
        trials.append(_trial(name, "0,0" if name == "r = 0" else None, "baseline", *found))
    return find_front(result_table(trials))


def _trial(name: str, schedule: str | None, role: str, accuracy: float, error: float) -> Trial:
    parsed = IterationSchedule.parse(schedule, num_layers=NUM_LAYERS) if schedule else None
    model = ModelConfig(
        vocab_size=300, dim=64, num_layers=NUM_LAYERS, num_heads=4, num_kv_heads=4, ffn_dim=176,
        context_length=64, method="iiet" if parsed else "vanilla", schedule=parsed,
    )  # fmt: skip
    return Trial.model_validate(
        {
            "key": name,
            "label": name,
            "role": role,
            "model": model,
            "folder": "",
            "suite": TrialSuite(tokens_folder=""),
            "numbers": {
                "cost/evaluations": parsed.num_evaluations if parsed else NUM_LAYERS,
                "quality/accuracy": accuracy,
                "quality/accuracy_stderr": error,
            },
        }
    )


def draw_knee() -> Spec:
    """Draw that front as reports do, with the line that the knee is measured from."""
    front = depth_front()
    chart = front_chart(front)
    ends = [{"x": p.cost, "y": p.quality} for p in (front.cheapest, front.best) if p]
    chord: Spec = {
        "data": {"values": ends},
        "mark": {"type": "line", "color": RED, "strokeDash": [6, 4]},
        "encoding": {name: {**chart["layer"][2]["encoding"][name]} for name in ("x", "y")},
    }
    third = {name: (2 * ends[0][name] + ends[1][name]) / 3 for name in ("x", "y")}
    name = {"type": "text", "color": RED, "align": "left", "dx": 8, "dy": 14}
    encoding = {**chord["encoding"], "text": {"value": "from cheapest to best"}}
    chart["layer"] += [chord, {"data": {"values": [third]}, "mark": name, "encoding": encoding}]
    return chart


def _plain(panel: Panel) -> None:
    panel.grid(color=GRID)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


FIGURES: dict[str, Callable[[], Figure | Spec]] = {
    "correction": draw_correction,
    "schedules": draw_schedules,
    "influence": draw_demo_influence,
    "family": draw_family,
    "front": draw_knee,
}
"""Name of the file to the function that draws it."""


def write_figures(folder: Path) -> list[Path]:
    """Write all figures as PNG and return their paths."""
    paths = []
    for name, draw in FIGURES.items():
        figure = draw()
        stem = folder / name
        if isinstance(figure, Figure):
            paths += save_figure(figure, stem, ("png",))
        else:
            paths += save_chart(figure, stem, ("png",))
    return paths


if __name__ == "__main__":
    write_figures(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
