"""Sections of a report, and their three renderers: terminal, HTML and JSON.

A report is a list of sections; each renderer shows any list. All tables of this program are a
`Table`, which arranges itself for the terminal's width. The page needs no server and no network:
charts and the scripts that draw them are inside.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table as RichTable

from orchestrator.reporting.colors import DARK_COLORS
from orchestrator.terminal.render import BYTE_UNITS
from orchestrator.workspace.files import new_file
from orchestrator.workspace.provenance import installed_version

ROW_STYLES = {"baseline": "cyan", "member": "bold", "dominated": "dim"}
LAST_PHONE_PRIORITY = 2
"""A phone leaves out the columns that are less important than this."""
PAGE_WIDTH = 152
"""Letters of a table that a page of 1280 pixels has room for."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    priority: int = 0
    """The highest number is dropped first if space is short; 0 is never dropped."""
    is_text: bool = False
    """Whether it is aligned left, as text is; numbers are aligned right."""

    @property
    def is_minor(self) -> bool:
        """Whether a phone leaves it out."""
        return self.priority > LAST_PHONE_PRIORITY


@dataclass(frozen=True)
class TableRow:
    """A row of a table; the key of a model links it to the chart."""

    cells: Sequence[str]
    kind: str = ""
    """How a model is shown: `baseline`, `member`, `full` or `dominated`."""
    key: str = ""
    """Key of the model; empty if the row is about something else."""
    is_first: bool = False
    """Whether it begins a group of rows, with a line above."""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    columns: Sequence[Column]
    rows: Sequence[TableRow]
    title: str = ""

    def to_markdown(self) -> str:
        """Return the table in Markdown; members of the front are bold."""
        rows = [
            (f"**{row.cells[0]}**", *row.cells[1:]) if row.kind == "member" else row.cells
            for row in self.rows
        ]
        titles = [column.title for column in self.columns]
        text_columns = [number for number, column in enumerate(self.columns) if column.is_text]
        return markdown_table(titles, rows, left_columns=text_columns)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the columns that the terminal has room for, as one table or as several.

        No cell is cut. If the columns that are never dropped are too wide together, the columns of
        numbers are spread over several tables, one below the other, and each table begins with the
        columns of names.
        """
        shown = self.fitting(options.max_width)
        # The first column says what a row is about, also where it is a number.
        name_columns = [n for n in shown if self.columns[n].is_text or n == 0]
        parts: list[list[int]] = [[]]
        for number in shown:
            if number in name_columns:
                continue
            with_number = [*name_columns, *parts[-1], number]
            if parts[-1] and self._width(with_number) > options.max_width:
                parts.append([])
            parts[-1].append(number)
        for part in parts:
            title = self.title if part is parts[0] else ""
            yield self._part(sorted([*name_columns, *part]), title)

    def fitting(self, width: int) -> list[int]:
        """Return the numbers of the columns that a table of this width has room for.

        The least important columns are dropped first, and those of priority 0 never.

        Args:
            width: Characters of a line.
        """
        shown = [*range(len(self.columns))]
        while self._width(shown) > width:
            least = max(shown, key=lambda number: self.columns[number].priority)
            if not self.columns[least].priority:
                break
            shown.remove(least)
        return shown

    @cached_property
    def _widths(self) -> list[int]:
        texts = [[column.title] for column in self.columns]
        for row in self.rows:
            for lines, cell in zip(texts, row.cells, strict=True):
                lines += cell.split("\n")
        return [max(map(cell_len, lines)) for lines in texts]

    def _width(self, columns: Iterable[int]) -> int:
        # A table has a space before all columns, and two after each of them.
        return sum(self._widths[number] + 2 for number in columns) + 1

    def _part(self, shown: Sequence[int], title: str) -> RichTable:
        table = RichTable(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.title_justify = "left"
        for number in shown:
            column = self.columns[number]
            # If even that is too wide, only the names are cut.
            width = self._widths[number] if number else None
            justify: Any = "left" if column.is_text else "right"
            table.add_column(column.title, justify=justify, no_wrap=True, min_width=width)
        for row in self.rows:
            if row.is_first:
                table.add_section()
            table.add_row(*(row.cells[n] for n in shown), style=ROW_STYLES.get(row.kind, ""))
        return table


def two_column_table(title: str | None, rows: Iterable[tuple[str, str]]) -> RichTable:
    """Return names and texts, which may be long, for a terminal."""
    table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(max_width=30)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


@dataclass(frozen=True, kw_only=True)
class View:
    """What a page shows of a section if its menus choose a cost and a quality."""

    cost: str
    """Title of the cost."""
    quality: str
    """Title of the quality."""
    chart: Mapping[str, Any]
    """In the JSON of Vega-Lite."""
    sentences: Sequence[str]
    """The page's first sentence, then the section's notes."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a report."""

    title: str = ""
    is_folded: bool = False
    """Whether a page shows it only when its title is clicked."""
    sentences: Sequence[str] = ()
    """Text before the chart; a terminal has no room for it."""
    chart: Mapping[str, Any] | None = None
    """In the JSON of Vega-Lite."""
    views: Sequence[View] = ()
    """On a page, what the menus above the chart choose from, the chart of the section among it."""
    first_view: int = 0
    """Number of the view that a page shows first."""
    picture: str = ""
    """The file of the chart, without its ending; empty if only the page shows it."""
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    """What can be concluded, as a list."""
    explanations: Sequence[str] = ()
    """How to read chart and tables, in sentences that a page folds and a terminal leaves out."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Names and values, such as settings and provenance."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What JSON has of the section."""

    @property
    def menus(self) -> dict[str, list[str]]:
        """Name of a menu -> titles that it offers."""
        return {
            "Cost": list(dict.fromkeys(view.cost for view in self.views)),
            "Quality": list(dict.fromkeys(view.quality for view in self.views)),
        }


def markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, left_columns: Collection[int] = (0,)
) -> str:
    """Return a table; columns are aligned right except those numbered in `left_columns`."""
    rules = [" --- " if number in left_columns else " ---: " for number in range(len(heads))]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rules)}|"]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows
    ]
    return "\n".join(lines)


def bullets(lines: Iterable[str]) -> str:
    """Return a list with one item a line."""
    return "\n".join(f"- {line}" for line in lines)


def render_terminal(sections: Iterable[Section]) -> Iterator[RenderableType]:
    """Yield what a terminal shows: the tables and the notes of each section."""
    for section in sections:
        yield from section.tables
        yield from (f"  {note}" for note in section.notes)
        yield ""


def render_json(sections: Iterable[Section]) -> dict[str, Any]:
    """Return the data of all sections, as values of strict JSON."""
    return {name: value for section in sections for name, value in section.data.items()}


def render_page(title: str, sections: Sequence[Section]) -> str:
    """Return all sections as one HTML page; all text from outside is escaped."""
    charts = [_views_on_page(section) for section in sections if section.chart]
    # `<` is escaped so that no text in the data can end the script element.
    data = json.dumps(charts, allow_nan=False).replace("<", "\\u003c")
    scripts = chart_scripts() if charts else ""
    return str(
        _template().render(
            title=title,
            sections=sections,
            charts=data,
            scripts=scripts,
            dark_colors=DARK_COLORS,
        )
    )


def _views_on_page(section: Section) -> dict[str, Any]:
    """Return the views of a section with a chart, and which of them is shown first."""
    assert section.chart is not None
    if not section.views:
        return {"first": 0, "views": [{"chart": _on_page(section.chart)}]}
    views = [{**asdict(view), "chart": _on_page(view.chart)} for view in section.views]
    return {"first": section.first_view, "views": views}


def _on_page(chart: Mapping[str, Any]) -> dict[str, Any]:
    spec = {name: value for name, value in chart.items() if name != "title"}
    spec["background"] = "transparent"
    if spec.get("params") or "layer" not in spec:  # A heat map has the width of its cells.
        spec |= {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return spec


@cache
def _template() -> Any:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["sort_value"] = sort_value
    environment.globals["page_width"] = PAGE_WIDTH
    page = resources.files("orchestrator.reporting") / "page.html"
    return environment.from_string(page.read_text(encoding="utf-8"))


@cache
def chart_scripts() -> str:
    """Return the programs that draw charts, of which bundling takes two CPU seconds."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iiet-orch"
    path = folder / f"vega-{installed_version('vl-convert-python')}.js"
    with suppress(OSError):
        return path.read_bytes().decode()
    import vl_convert

    bundle = str(vl_convert.javascript_bundle(None))  # type: ignore[arg-type]
    bundle = bundle.replace("</script", "<\\/script")
    with suppress(OSError), new_file(path) as temporary:  # A home may be read-only.
        temporary.write_bytes(bundle.encode())
    return bundle


def sort_value(text: str) -> str:
    """Return what a cell is sorted by: its first number, in bytes or billions; else its text."""
    words = text.removeprefix(">").rstrip("%").split()
    units = {unit: 1024.0**power for power, unit in enumerate(BYTE_UNITS)}
    units |= {"M": 1e-3, "K": 1e-6}  # Of parameters, whose B are billions.
    try:
        return str(float(words[0]) * (units.get(words[1], 1) if len(words) > 1 else 1))
    except (ValueError, IndexError):
        return text
