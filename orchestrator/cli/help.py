"""The `--help` of commands and groups: two columns, the option and its description.

Typer's own table gives types and number ranges columns of their own, and cuts the options' names
on narrow terminals. Here names are never cut, and descriptions wrap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command_name

Function = TypeVar("Function", bound=Callable[..., Any])

SHORT_TYPES = {
    "int": "N", "int range": "N", "integer": "N", "integer range": "N", "float": "X",
    "float range": "X", "str": "TEXT", "text": "TEXT", "path": "PATH",
}  # fmt: skip
"""Type as Typer names it, to the placeholder of an option's value."""
LIST_MARK = ",..."
"""Ends the placeholder of an option that takes several of its choices, with commas between."""
EXTRAS = re.compile(r" *\[((?:default|required|env)[^\]]*|[^\]]*<=?x[^\]]*|x[<>][^\]]*)\]$")
"""The default and the range that Typer appends to a help text; an error names the range."""


class Command(TyperCommand):
    """A command whose help never cuts an option's name."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Print the help."""
        _print_help(self, ctx)


class Group(TyperGroup):
    """Commands with one help: the options, then the commands of each panel."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Print the help."""
        console = _print_help(self, ctx)
        panels: dict[str, list[tuple[Text, Text]]] = {}
        for name, command in self.commands.items():
            title = getattr(command, "rich_help_panel", None) or "Commands"
            row = Text(name, style="bold cyan"), Text(command.get_short_help_str(limit=200))
            panels.setdefault(title if isinstance(title, str) else "Commands", []).append(row)
        width = max(map(len, self.commands))
        for title, rows in panels.items():
            _print_panel(console, title, rows, width=width)


def _print_help(command: Any, ctx: Any) -> Console:
    console = Console(highlight=False)
    parameters = [p for p in command.get_params(ctx) if not getattr(p, "hidden", False)]
    console.print(Padding(Text(command.get_usage(ctx)), (1, 1, 0, 1)))
    console.print(Padding(Text(_unfolded(command.help or "")), (1, 1)))
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        rows = [_row(p, ctx) for p in parameters if p.param_type_name == kind]
        if rows:
            _print_panel(console, title, rows)
    return console


def _print_panel(
    console: Console, title: str, rows: Sequence[tuple[Text, Text]], *, width: int = 0
) -> None:
    table = _table(rows, width=width)
    console.print(Panel(table, title=title, title_align="left", border_style="dim"))


class Application(typer.Typer):
    """A Typer whose groups and commands have this help."""

    def __init__(self, **options: Any) -> None:
        """Make an application; see `typer.Typer`."""
        super().__init__(**{"cls": Group, **options})

    def command(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]:
        """Register a command; see `typer.Typer.command`."""
        return super().command(name, **{"cls": Command, **options})

    def reduced_to(self, words: Sequence[str]) -> Application:
        """Return an application with only the command that the first word names.

        Typer inspects the functions of all commands at each call, a fifth of the time of a short
        command. Returns the whole application if the first word names no command.
        """

        def is_named(name: str | None, function: Callable[..., Any] | None = None) -> bool:
            return (name or get_command_name(getattr(function, "__name__", ""))) in words[:1]

        reduced = copy(self)
        reduced.registered_commands = [
            info for info in self.registered_commands if is_named(info.name, info.callback)
        ]
        reduced.registered_groups = [info for info in self.registered_groups if is_named(info.name)]
        return reduced if reduced.registered_commands or reduced.registered_groups else self


def _table(rows: Sequence[tuple[Text, Text]], *, width: int = 0) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=max(width, *(len(names) for names, _ in rows)))
    table.add_column(overflow="fold", ratio=1)
    for row in rows:
        table.add_row(*row)
    return table


def _row(parameter: Any, ctx: Any) -> tuple[Text, Text]:
    record = parameter.get_help_record(ctx) or ("", "")
    names = Text(_names(parameter), style="bold cyan")
    choices: list[str] = []
    if parameter.param_type_name == "option" and (value := _value(record[0])):
        choices = value.removesuffix(LIST_MARK).split("|") if "|" in value else []
        kind = "CHOICES" if value.endswith(LIST_MARK) else "CHOICE"
        names.append(f" {kind if choices else value}", style="yellow")
    found = EXTRAS.search(record[1])
    text = Text(record[1][: found.start()] if found else record[1])
    if choices:
        text = Text.assemble((", ".join(choices), "yellow"), ". ", text)
    for part in found[1].split("; ") if found else ():
        if part.startswith(("default: ", "required")):
            text.append(f"{' ' if text else ''}[{part}]", style="dim")
    return names, text


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"{parameter.metavar or parameter.name}{'...' if parameter.nargs == -1 else ''}"
    every = (*parameter.opts, *parameter.secondary_opts)
    short = [name for name in every if not name.startswith("--")]
    long = [name for name in every if name.startswith("--")]
    names = ", ".join(filter(None, ["/".join(short), "/".join(long)]))
    return names if short else f"    {names}"


def _value(record: str) -> str:
    # Such as N from `-n, --number <int range>`.
    value = re.sub(r"^(?:--?[\w-]+(?:, | / |$)?)+", "", record).strip().removeprefix("<")
    value = re.sub(r"^list\[(.*)\]$", r"\1", value.removesuffix(">"))
    return SHORT_TYPES.get(value.lower(), value)


def _unfolded(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
