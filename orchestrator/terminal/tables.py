"""Plain tables without lines: names stay whole, long texts fold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table; a title that ends with `>` aligns its column to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    for title in columns:
        right = title.endswith(">")
        table.add_column(
            title.removesuffix(">"), justify="right" if right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    return table
