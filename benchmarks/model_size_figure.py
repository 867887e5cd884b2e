"""Draws the benchmark `model_size`: `python -m benchmarks.model_size_figure NUMBERS.json STEM`.

NUMBERS.json comes from `python -m benchmarks model_size --json NUMBERS.json`. Writes STEM.png: one
column for each cost, milliseconds above, the ratio to the vanilla model below.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from benchmarks.model_size import COSTS, MODELS, VANILLA
from orchestrator.reporting.figure_style import (
    BLUE,
    DOTS_PER_INCH,
    GRAY,
    GRID,
    RED,
    save_figure,
)

_STYLES = dict(zip(MODELS, ((GRAY, "s"), (BLUE, "o"), (RED, "^")), strict=True))
"""Label to color and marker."""


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Return the figure of a benchmark's rows."""
    figure = Figure(figsize=(9.0, 5.0), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(2, len(COSTS), sharex=True, squeeze=False)
    for column, cost in enumerate(COSTS):
        above, below = axes[0][column], axes[1][column]
        above.set_title(cost)
        above.set_yscale("log")
        above.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        above.yaxis.set_minor_formatter(NullFormatter())
        below.set_xlabel("parameters (millions)")
        for label in list(MODELS)[1:]:
            found = [row for row in rows if row["what"].startswith(f"{cost}, {label} /")]
            sizes = [_spread(row, "size")["median"] for row in found]
            # The vanilla model stands in the rows of both.
            for name in (label,) if above.lines else (VANILLA, label):
                _draw_line(above, name, sizes, [_spread(row, name) for row in found])
            _draw_line(below, label, sizes, [row["ratio"] for row in found])
            below.axhline(1 + (MODELS[label] or 0), color=_STYLES[label][0], linestyle=":")
        for axis in (above, below):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(FixedLocator(sizes))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
            axis.grid(color=GRID)
            axis.spines[["top", "right"]].set_visible(False)
        below.set_ylim(bottom=0)
    axes[0][0].set_ylabel("milliseconds")
    axes[1][0].set_ylabel("ratio to vanilla")
    axes[0][0].legend(frameon=False)
    return figure


def _spread(row: dict[str, Any], label: str) -> dict[str, float]:
    found: dict[str, float] = next(q["spread"] for q in row["quantities"] if q["label"] == label)
    return found


def _draw_line(axis: Any, label: str, sizes: list[float], spreads: list[dict[str, float]]) -> None:
    color, marker = _STYLES[label]
    medians = [spread["median"] for spread in spreads]
    errors = [
        [spread["median"] - spread["low"] for spread in spreads],
        [spread["high"] - spread["median"] for spread in spreads],
    ]
    axis.errorbar(sizes, medians, yerr=errors, color=color, marker=marker, capsize=3, label=label)


def main(numbers: Path, stem: Path) -> None:
    """Draw the numbers of a JSON file."""
    stored = json.loads(numbers.read_text(encoding="utf-8"))
    [path] = save_figure(draw(stored["benchmarks"]["model_size"]["rows"]), stem, kinds=("png",))
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
