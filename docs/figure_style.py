"""How the drawings of the documentation are saved; charts of numbers are in reporting/charts.py.

Figures use Matplotlib's objects without pyplot, so there is no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from orchestrator.workspace.files import new_file

DOTS_PER_INCH = 200


def fix_layout(figure: Figure) -> None:
    """Compute a figure's layout once; Matplotlib would do so again for each file."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine(None)


def save_figure(figure: Figure, stem: Path, kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write a figure as `stem.png` and `stem.svg`; the same figure gives the same bytes."""
    paths = []
    fix_layout(figure)
    # An SVG has a random salt and the date by default.
    with rc_context({"svg.hashsalt": "iiet"}):
        for kind in kinds:
            path = stem.with_name(f"{stem.name}.{kind}")
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            with new_file(path) as temporary:
                figure.savefig(temporary, format=kind, metadata=metadata)
            paths.append(path)
    return paths
