"""Influence table for the terminal and in Markdown, with residuals and contraction factors.

The column `whole layer` is the layer's block influence, by which whole layers are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from iiet.influence import InfluenceTable
from orchestrator.reporting.markdown import markdown_table
from orchestrator.terminal.render import ResponsiveLayout


def influence_terminal_table(influence: InfluenceTable) -> Group:
    """Return the influence with standard errors, then the residuals; a row for each layer."""
    width = influence.schedule.max_corrections
    heads = [f"correction {number}" for number in range(1, width + 1)]
    values = [
        [
            *(_with_error(value, error) for value, error in zip(*rows, strict=True)),
            *[""] * (width - len(rows[0])),
            *of_layer,
        ]
        for *rows, of_layer in zip(
            influence.value_rows, influence.error_rows, _whole_layers(influence), strict=True
        )
    ]
    title = f"Influence ({influence.metric}, {influence.num_tokens:,} tokens)"
    tables = [_layers_table(title, [*heads, *_whole_layer_head(influence)], values)]
    if influence.residual_rows:  # Tables of earlier versions have none.
        residuals = _with_contractions(influence, influence.residual_rows, width, ".2g")
        title = "Residual |g(e) - e| / |g(e)|, and its contraction factor"
        tables.append(_layers_table(title, [*heads, "contraction"], residuals))
    return Group(*tables)


def influence_markdown(influence: InfluenceTable) -> str:
    """Return the influence and contraction factors in Markdown, one row for each layer."""
    width = max((len(row) for row in influence.rows()), default=0)
    heads = ["layer", *(f"correction {i}" for i in range(1, width + 1)), "contraction"]
    rows = zip(
        _with_contractions(influence, influence.rows(), width, ".3g"),
        _whole_layers(influence),
        strict=True,
    )
    return markdown_table(
        [*heads, *_whole_layer_head(influence)],
        ([str(layer), *cells, *more] for layer, (cells, more) in enumerate(rows, start=1)),
        left=(),
    )


def _whole_layer_head(influence: InfluenceTable) -> list[str]:
    return ["whole layer"] if influence.layer_values else []


def _whole_layers(influence: InfluenceTable) -> list[list[str]]:
    """Return the cell of each layer; tables of earlier versions have none."""
    if not influence.layer_values:
        return [[] for _ in influence.value_rows]
    return [[f"{value:.2g}"] for value in influence.layer_values]


def _with_contractions(
    influence: InfluenceTable, rows: Sequence[Sequence[float]], width: int, form: str
) -> list[list[str]]:
    """Return rows of texts, filled up to `width`, each followed by its contraction factor."""
    # Tables of earlier versions have no factors, and layers with one correction neither.
    factors = influence.contractions or [math.nan] * len(rows)
    return [
        [
            *(f"{value:{form}}" for value in row),
            *[""] * (width - len(row)),
            "" if math.isnan(factor) else f"{factor:{form}}",
        ]
        for row, factor in zip(rows, factors, strict=True)
    ]


def _layers_table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> ResponsiveLayout:
    # A narrow terminal shows the table in parts, as few as its width allows.
    def part(first: int, count: int) -> Table:
        table = Table(title=None if first else title, title_justify="left", box=box.SIMPLE_HEAD)
        for head in ("layer", *heads[first : first + count]):
            table.add_column(head, justify="right", no_wrap=True)
        for layer, cells in enumerate(rows, start=1):
            table.add_row(str(layer), *cells[first : first + count])
        return table

    def parts(count: int) -> Group:
        return Group(*(part(first, count) for first in range(0, len(heads), count)))

    return ResponsiveLayout(*(parts(count) for count in range(len(heads), 0, -1)))


def _with_error(value: float, error: float) -> str:
    """Return two significant digits of the error, and the value to the same decimal."""
    if math.isnan(error):  # A single batch has none.
        return f"{value:.2g}"
    digits = 2
    if value and error:
        digits += max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(error)))
    return f"{value:.{digits}g}\u00a0±\u00a0{error:.2g}"
