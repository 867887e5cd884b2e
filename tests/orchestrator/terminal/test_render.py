"""Lines are folded between words at the width of the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from orchestrator.terminal.layout import ResponsiveLayout, print_line

SUMMARY = "accuracy 44.5 ± 1.2%, 2.345 bits per byte, 12,345 items of all the tasks together"


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return Text.from_ansi(console.file.getvalue()).plain


def test_a_path_is_never_broken_and_a_pipe_gets_one_line() -> None:
    path = "/a/folder/" + "x" * 90
    console = terminal(80)
    print_line(console, f"the file {path} is damaged")
    assert path in printed(console).splitlines()[1]
    pipe = Console(file=io.StringIO(), width=80)
    print_line(pipe, SUMMARY)
    assert printed(pipe).splitlines() == [SUMMARY]


@pytest.mark.parametrize("indent", ["", "  "])
def test_a_folded_line_keeps_its_indentation(indent: str) -> None:
    console = terminal(60)
    print_line(console, f"{indent}{SUMMARY}\n{SUMMARY}")
    lines = printed(console).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(indent) and line[len(indent)] != " " for line in lines[:2])
    assert all(len(line) <= 60 and line[0] != " " for line in lines[2:])
    assert " ".join(" ".join(lines).split()) == f"{SUMMARY} {SUMMARY}"


@pytest.mark.parametrize(("width", "shown"), [(40, "wide layout"), (10, "narrow"), (3, "narrow")])
def test_the_first_layout_that_fits_is_printed(width: int, shown: str) -> None:
    console = terminal(width)
    console.print(ResponsiveLayout(Text("wide layout"), Text("narrow")), soft_wrap=True)
    assert printed(console).strip() == shown
