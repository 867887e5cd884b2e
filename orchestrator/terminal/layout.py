"""Output that fits the terminal's width: lines folded between words, tables that show less."""

from __future__ import annotations

import re
import textwrap

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.text import Text


class ResponsiveLayout:
    """Layouts of the same content, widest first; prints the first that fits the terminal.

    A narrow terminal shows less or arranges it differently, but never breaks a name or a number.
    """

    def __init__(self, *layouts: RenderableType) -> None:
        self.layouts = layouts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the layout for this width; the last one if none fits."""
        unlimited = options.update(width=10_000)
        for layout in self.layouts[:-1]:
            if Measurement.get(console, unlimited, layout).maximum <= options.max_width:
                yield layout
                return
        yield self.layouts[-1]


def print_line(console: Console, line: str | Text) -> None:
    """Print a line, folded between words on a terminal, unfolded elsewhere.

    A word that is too long for the terminal, such as a path, stays whole, so that it can be copied.
    """
    line = line if isinstance(line, Text) else Text(line)
    for part in _folded(line, console.width) if console.is_terminal else [line]:
        console.print(part, highlight=False, soft_wrap=True)


def _folded(line: Text, width: int) -> list[Text]:
    # Rich's own wrapping would break long words.
    parts = []
    end = 0
    # A number and its error stay together, as in `44.5 ± 1.2%`.
    text = re.sub(" (?=± )|(?<=±) ", "\u00a0", line.plain)
    for paragraph in text.split("\n"):
        indent = " " * (len(paragraph) - len(paragraph.lstrip(" ")))
        wrapped = textwrap.wrap(
            paragraph,
            width,
            subsequent_indent=indent,
            expand_tabs=False,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for number, part in enumerate(wrapped or [""]):
            added = indent if number else ""
            start = text.index(part.removeprefix(added), end)
            end = start + len(part) - len(added)
            parts.append(Text(added) + line[start:end])
    return parts
