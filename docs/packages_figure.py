"""Draws the packages of docs/architecture.md, and what flows between them:
`python docs/packages_figure.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from diagrams import box, diagram, drawing, text

from orchestrator.reporting.charts import Spec, save_chart
from orchestrator.reporting.colors import BLUE, SKY

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

USED_BY_ALL = ("workspace", "terminal", "settings", "records", "models")

WIDTH = 0.5
HEIGHT = 0.36
"""Of a box, where columns and rows are 1 apart."""


LEFT = 0.35
TOP = 5.3
"""Of the first column's middle from the left, and the height of the drawing."""


def draw_packages() -> Spec:
    """Draw each package as a box, each flow as an arrow with its name."""
    boxes = []
    texts = []
    arrows = []
    for giver, receiver, what in FLOWS:
        start = _edge_point(giver, receiver)
        end = _edge_point(receiver, giver)
        arrows.append((start, end))
        texts.append(text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, what, halo=True))
    for name, (column, row) in PLACES.items():
        middle = column + LEFT
        boxes.append(box(middle - WIDTH / 2, row - HEIGHT / 2, WIDTH, HEIGHT, BLUE))
        outside = "\n(mathematics)" if name == "iiet" else ""
        texts.append(text(middle, row, name + outside, color="white"))
    boxes.append(box(LEFT - WIDTH / 2, 0.2 - HEIGHT / 2, 3.0 + WIDTH, HEIGHT, SKY))
    texts.append(text(LEFT + 1.5, 0.2, "used by all: " + ", ".join(USED_BY_ALL)))
    size = (3.0 + 2 * LEFT, TOP)
    return drawing(diagram(size, (190, 105), boxes=boxes, arrows=arrows, texts=texts))


def _edge_point(package: str, toward: str) -> tuple[float, float]:
    """Return where the line from the middle of one box to that of another leaves the first."""
    x, y = PLACES[package]
    to_x, to_y = PLACES[toward]
    across = to_x - x
    up = to_y - y
    share = min(
        WIDTH / 2 / abs(across) if across else 1.0,
        HEIGHT / 2 / abs(up) if up else 1.0,
    )
    return x + LEFT + share * across, y + share * up


def write_figure(stem: Path) -> list[Path]:
    """Write the figure as `stem.png` and return its path."""
    return save_chart(draw_packages(), stem, ("png",))


if __name__ == "__main__":
    write_figure(Path(sys.argv[1]) if len(sys.argv) > 1 else PATH)
