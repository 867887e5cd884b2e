"""What all pictures and tables share: colors, names of numbers, how a picture is saved.

Colors are Okabe and Ito's, which the color-blind can tell apart; every distinction is also one of
shape. Matplotlib is used through its objects, without pyplot: no global state, no display, nothing
left open.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PINK, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
SERIES = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
GRAY, GRID = "#757575", "#dddddd"
DOTS_PER_INCH = 200


def save_figure(figure: Figure, stem: Path, kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write a picture as `stem.png` and `stem.svg`; the same picture gives the same bytes.

    Returns:
        The files written.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    # Without a fixed salt and date, an SVG differs each time it is written.
    with rc_context({"svg.hashsalt": "iiet"}):
        for kind in kinds:
            path = stem.with_name(f"{stem.name}.{kind}")
            figure.savefig(path, metadata={"Date": None} if kind == "svg" else {"Software": None})
            paths.append(path)
    return paths
