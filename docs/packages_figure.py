"""Draws the packages of docs/architecture.md, and what flows between them:
`python docs/packages_figure.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from figure_style import DOTS_PER_INCH, save_figure
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from orchestrator.reporting.charts import BLUE, GRAY, INK, SKY

PATH = Path(__file__).resolve().parent / "images" / "packages"

PLACES = {
    "cli": (1, 5),
    "planning": (0, 4), "pipelines": (1, 4),
    "sweeping": (2, 3), "reporting": (3, 3),
    "data": (0, 2), "cluster": (1, 2), "evaluation": (2, 2),
    "iiet": (0, 1), "training": (1, 1), "tracking": (3, 1),
}  # fmt: skip
"""Package to its column from the left and its row from the bottom."""

FLOWS = (
    ("cli", "pipelines", "Settings"),
    ("planning", "pipelines", "hours, memory,\ndisk"),
    ("pipelines", "data", "DataSettings"),
    ("pipelines", "sweeping", "checkpoint,\ninfluence"),
    ("pipelines", "cluster", "TrainingJob"),
    ("sweeping", "cluster", "Trial"),
    ("sweeping", "reporting", "Trial"),
    ("cluster", "training", "TrainingJob"),
    ("data", "training", "batches"),
    ("iiet", "training", "Decoder,\nlosses"),
    ("training", "evaluation", "checkpoint"),
    ("evaluation", "sweeping", "EvaluationResult"),
    ("training", "tracking", "journal"),
    ("reporting", "tracking", "front, metrics, files"),
)
"""Giver, receiver, and what flows."""

USED_BY_ALL = ("workspace", "terminal", "settings", "records")

WIDTH, HEIGHT = 0.5, 0.36
"""Of a box, where columns and rows are 1 apart."""


def draw_packages() -> Figure:
    """Draw each package as a box, each flow as an arrow with its name."""
    figure = Figure(figsize=(9.0, 7.0), layout="constrained", dpi=DOTS_PER_INCH)
    panel = figure.add_subplot()
    for giver, receiver, what in FLOWS:
        _draw_flow(panel, giver, receiver, what)
    for name, (column, row) in PLACES.items():
        outside = "\n(mathematics)" if name == "iiet" else ""
        _draw_box(panel, name + outside, column, row, WIDTH, BLUE, "white")
    names = "   ".join(USED_BY_ALL)
    _draw_box(panel, f"used by all:  {names}", 1.5, 0.2, 3.0 + WIDTH, SKY, INK)
    panel.set(xlim=(-0.35, 3.35), ylim=(-0.05, 5.25))
    panel.axis("off")
    return figure


def _draw_box(
    panel: Panel, text: str, column: float, row: float, width: float, color: str, ink: str
) -> None:
    panel.add_patch(
        FancyBboxPatch(
            (column - width / 2, row - HEIGHT / 2),
            width,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.05",
            facecolor=color,
            edgecolor=INK,
            zorder=3,
        )
    )
    panel.text(column, row, text, ha="center", va="center", fontsize=10, color=ink, zorder=4)


def _draw_flow(panel: Panel, giver: str, receiver: str, what: str) -> None:
    start, end = _edge_point(giver, receiver), _edge_point(receiver, giver)
    panel.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": GRAY, "lw": 1.3,
                                    "shrinkA": 0, "shrinkB": 0}, zorder=1,
    )  # fmt: skip
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    panel.text(
        *middle, what, ha="center", va="center", fontsize=8.5, color=INK, zorder=2,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
    )  # fmt: skip


def _edge_point(package: str, toward: str) -> tuple[float, float]:
    """Return where the line from the middle of one box to that of another leaves the first."""
    (x, y), (to_x, to_y) = PLACES[package], PLACES[toward]
    across, up = to_x - x, to_y - y
    share = min(
        WIDTH / 2 / abs(across) if across else 1.0,
        HEIGHT / 2 / abs(up) if up else 1.0,
    )
    return x + share * across, y + share * up


def write_figure(stem: Path) -> list[Path]:
    """Write the figure as `stem.png` and return its path."""
    return save_figure(draw_packages(), stem, ("png",))


if __name__ == "__main__":
    write_figure(Path(sys.argv[1]) if len(sys.argv) > 1 else PATH)
