"""An influence table as a terminal shows it: influence, residuals and contraction factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from iiet.influence import InfluenceTable
from orchestrator.terminal.layout import ResponsiveLayout


def influence_terminal_table(influence: InfluenceTable) -> Group:
    """Return an influence table, one row a layer, with standard errors, and under it the residuals
    and the contraction factors; of many corrections in parts below each other where they do not fit
    beside each other.
    """
    most = influence.schedule.max_corrections
    numbers = [f"correction {number}" for number in range(1, most + 1)]
    values = [
        [_with_error(value, error) for value, error in zip(*rows, strict=True)]
        for rows in zip(influence.value_rows, influence.error_rows, strict=True)
    ]
    title = f"Influence ({influence.metric}, {influence.num_tokens:,} tokens)"
    parts = [_by_layer(title, numbers, values)]
    if influence.residual_rows:  # Tables of earlier versions have none.
        residuals = [
            [*(f"{value:.2g}" for value in row), *[""] * (most - len(row)), _factor(contraction)]
            for row, contraction in zip(
                influence.residual_rows, influence.contractions, strict=True
            )
        ]
        title = "Residual |g(e) - e| / |g(e)|, and its contraction factor"
        parts.append(_by_layer(title, [*numbers, "contraction"], residuals))
    return Group(*parts)


def _by_layer(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> ResponsiveLayout:
    """Return a table with a row for each layer, in as few parts as the width allows."""

    def part(first: int, count: int) -> Table:
        table = Table(title=None if first else title, title_justify="left", box=box.SIMPLE_HEAD)
        for head in ("layer", *heads[first : first + count]):
            table.add_column(head, justify="right", no_wrap=True)
        for layer, cells in enumerate(rows, start=1):
            table.add_row(str(layer), *cells[first : first + count])
        return table

    layouts = (
        Group(*(part(first, count) for first in range(0, len(heads), count)))
        for count in range(len(heads), 0, -1)
    )
    return ResponsiveLayout(*layouts)


def _factor(contraction: float) -> str:
    return "" if math.isnan(contraction) else f"{contraction:.2g}"


def _with_error(value: float, error: float) -> str:
    """Write an error with two significant digits, and the value as far as these reach."""
    if math.isnan(error):  # A single batch has none.
        return f"{value:.2g}"
    digits = 2
    if value and error:
        digits += max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(error)))
    return f"{value:.{digits}g}\u00a0±\u00a0{error:.2g}"


def influence_markdown(table: InfluenceTable) -> str:
    """Return an influence table in Markdown, one row a layer, with its contraction factors."""
    width = max((len(row) for row in table.rows()), default=0)
    heads = ["layer", *(f"correction {i}" for i in range(1, width + 1)), "contraction"]
    lines = [f"| {' | '.join(heads)} |", "| ---: " * len(heads) + "|"]
    for layer, row in enumerate(table.rows(), start=1):
        cells = [f"{value:.3g}" for value in row] + [""] * (width - len(row))
        # Tables of earlier versions have no factors, and layers of one correction neither.
        factor = table.contractions[layer - 1] if table.contractions else math.nan
        cells.append("" if math.isnan(factor) else f"{factor:.3g}")
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)
