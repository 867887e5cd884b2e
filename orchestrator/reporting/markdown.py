"""Markdown tables and lists, for reports and model cards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = (0,)
) -> str:
    """Return a table; columns are aligned right except those numbered in `left`."""
    rules = [" --- " if number in left else " ---: " for number in range(len(heads))]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rules)}|"]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows
    ]
    return "\n".join(lines)


def bullets(lines: Iterable[str]) -> str:
    """Return a list with one item a line."""
    return "\n".join(f"- {line}" for line in lines)
