"""Small tables of results, as text for a terminal and as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

__all__ = ["SmallTable"]


class SmallTable(NamedTuple):
    """A title, the heads of the columns, and a text for each cell."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """Return lines of one width, with cells on the right of their columns."""
        lines = [self.heads, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        ]
        return "\n".join([self.title, *texts])

    def to_html(self) -> str:
        """Return a table of HTML."""

        def line_of(tag: str, cells: Sequence[str]) -> str:
            return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)

        lines = [line_of("th", self.heads), *(line_of("td", row) for row in self.rows)]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><caption>{escape(self.title)}</caption>{body}</table>"
