"""Heat map of influences: numbers, cut, ragged rows."""

from __future__ import annotations

import math

import pytest

from orchestrator.reporting.influence_figure import draw_influence


def test_heat_map_has_every_number_and_the_cut(
    sample_influence: tuple[tuple[float, ...], ...],
) -> None:
    figure = draw_influence(
        sample_influence, metric="cosine", kept=(0, 1, 1, 1, 1, 1), kept_name="knee"
    )
    panel = figure.axes[0]
    numbers = [float(text.get_text()) for text in panel.texts]
    assert numbers == pytest.approx([v for row in sample_influence for v in row], rel=0.05)
    cut = panel.lines[0]
    assert list(cut.get_xdata()) == [-0.5, -0.5, *[0.5] * 10]


def test_heat_map_takes_ragged_rows_zeros_and_gaps() -> None:
    panel = draw_influence([[0.1], [0.2, 0.0], [math.nan, math.nan]], metric="loss").axes[0]
    assert sorted(text.get_text() for text in panel.texts) == ["0", "0.1", "0.2"]
    with pytest.raises(ValueError, match="at least one correction"):
        draw_influence([[], [math.nan]], metric="loss")
