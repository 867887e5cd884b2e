"""Lines are folded between words at the width of the terminal, and numbers are for people."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from orchestrator.terminal.render import (
    ResponsiveLayout,
    format_bytes,
    format_count,
    format_duration,
    format_duration_range,
    format_number,
    format_parameters,
    format_schedule,
    format_with_error,
    join_names,
    print_line,
)

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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_count(1, "trial"), "1 trial"),
        (format_count(1234, "trial"), "1,234 trials"),
        (format_count(2, "pass", "passes"), "2 passes"),
        (format_bytes(512), "512 B"),
        (format_bytes(999.6), "0.976 KiB"),
        (format_bytes(3 * 2**20), "3 MiB"),
        (format_bytes(1.5 * 2**30), "1.5 GiB"),
        (format_bytes(2**41), "2 TiB"),
        (format_parameters(1_484_032), "1.48 M"),
        (format_parameters(23_264), "23.3 K"),
        (format_parameters(1.34e9), "1.34 B"),
        (format_number(17410), "17,410"),
        (format_number(2.5), "2.5"),
        (format_number(3.0), "3"),
        (format_duration(0.0123), "0.012 s"),
        (format_duration(12.3), "12 s"),
        (format_duration(150), "2.5 min"),
        (format_duration(5400), "1.5 h"),
        (format_duration(72 * 3600), "3 days"),
        (format_duration(200 * 24 * 3600), "200 days"),
        (format_duration_range(2 * 3600, 3 * 3600), "2 to 3 h"),
        (format_duration_range(1800, 7200), "30 min to 2 h"),
        (format_duration_range(7200, 7200), "2 h"),
        (format_schedule((2, 1, 0)), "2,1,0"),
        (format_schedule((3,) * 4 + (1,) * 20), "3*4,1*20"),
        (format_schedule(None), ""),
        (format_with_error(0.444, 0.012, is_percent=True), "44.4 ± 1.2"),
        (format_with_error(2.34567, None, is_percent=False), "2.346"),
        (join_names(["a", "b"]), "a, b"),
        (join_names(["2,1", "0"]), "2,1; 0"),
    ],
)
def test_text_of_a_number(text: str, expected: str) -> None:
    assert text == expected
