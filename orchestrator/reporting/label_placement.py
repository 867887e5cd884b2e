"""Places labels beside points so that they cover no point, no line and no other label.

Each label takes the first free position around its point, from near to far. Without a free one, an
important label may cover an error bar; another label is left out, because the tables name every
trial. This suffices for some dozens of points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes as Panel
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

# Offsets from the point in typographic points, each also to the left of the point.
_OFFSETS = [(7, 4), (7, -4), (8, 0), (0, 9), (0, -9), (7, 14), (7, -14), (7, 25), (7, -25)]
_POINT_RADIUS, _LINE_RADIUS = 5.0, 1.5


@dataclass(frozen=True)
class _Label:
    x: float
    y: float
    text: str
    color: str
    important: bool


_Line = tuple[tuple[float, float], tuple[float, float]]


class LabelPlacer:
    """Collects the obstacles and labels of one panel, then places the labels."""

    def __init__(self, panel: Panel) -> None:
        self._panel = panel
        self._labels: list[_Label] = []
        self._points: list[tuple[float, float]] = []
        self._lines: list[_Line] = []
        self._error_bars: list[_Line] = []

    def avoid_point(self, x: float, y: float, error: float = 0.0) -> None:
        """Keep labels off a point and, if possible, off its error bar."""
        self._points.append((x, y))
        self._error_bars.append(((x, y - error), (x, y + error)))

    def avoid_steps(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """Keep labels off a step line that is flat after each point."""
        for i in range(len(xs) - 1):
            self._lines.append(((xs[i], ys[i]), (xs[i + 1], ys[i])))
            self._lines.append(((xs[i + 1], ys[i]), (xs[i + 1], ys[i + 1])))

    def add(
        self, x: float, y: float, text: str, *, color: str = "black", important: bool = False
    ) -> None:
        """Add a label for a point; labels added first are placed first, important ones are bold."""
        self._labels.append(_Label(x, y, text, color, important))

    def place(self) -> int:
        """Place the labels and return their number; the panel's limits and size must be final."""
        inside = self._panel.get_window_extent()
        taken, error_bars = self._obstacles(), self._line_boxes(self._error_bars)
        num_placed = 0
        for label in self._labels:
            box = self._place_one(label, inside, [*taken, *error_bars])
            if box is None and label.important:
                box = self._place_one(label, inside, taken)
            if box is not None:
                taken.append(box)
                num_placed += 1
        return num_placed

    def _place_one(self, label: _Label, inside: Bbox, taken: Sequence[Bbox]) -> Bbox | None:
        text = self._panel.annotate(
            label.text,
            (label.x, label.y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=7.5,
            fontweight="bold" if label.important else "normal",
            color=label.color,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            zorder=7,
        )
        # Measuring a text is slow, so it is measured once and its box is moved.
        at_point = text.get_window_extent()
        for dx, dy in ((sign * x, y) for x, y in _OFFSETS for sign in (1, -1)):
            right = dx * self._pixels_per_point - _share_before(dx) * at_point.width
            up = dy * self._pixels_per_point - _share_before(dy) * at_point.height
            box = at_point.translated(right, up)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1
            within = within and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                text.set_position((right / self._pixels_per_point, up / self._pixels_per_point))
                return box
        text.remove()
        return None

    def _obstacles(self) -> list[Bbox]:
        boxes = []
        for point in self._points:
            x, y = self._panel.transData.transform(point)
            radius = _POINT_RADIUS * self._pixels_per_point
            boxes.append(Bbox([[x - radius, y - radius], [x + radius, y + radius]]))
        legend = self._panel.get_legend()
        if legend is not None:
            boxes.append(legend.get_window_extent())
        return boxes + self._line_boxes(self._lines)

    def _line_boxes(self, lines: Sequence[_Line]) -> list[Bbox]:
        # All lines are horizontal or vertical, so a box around the ends covers them exactly.
        radius = _LINE_RADIUS * self._pixels_per_point
        boxes = []
        for ends in lines:
            (x0, y0), (x1, y1) = self._panel.transData.transform(ends)
            low = (min(x0, x1) - radius, min(y0, y1) - radius)
            boxes.append(Bbox([low, (max(x0, x1) + radius, max(y0, y1) + radius)]))
        return boxes

    @property
    def _pixels_per_point(self) -> float:
        figure = self._panel.get_figure(root=True)
        assert figure is not None, "the panel must be part of a figure"
        return figure.dpi / 72


def _share_before(offset: float) -> float:
    """Return the share of a label that lies left of, or below, its anchor."""
    return 0.5 if not offset else 0.0 if offset > 0 else 1.0
