"""Progress and lines on terminals and in pipes: folded between words, with signs of life."""

from __future__ import annotations

import io
import math
import sys
import threading
import time
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from orchestrator.cli.session import open_session
from orchestrator.evaluation.tasks import suppress_output
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import (
    format_bytes,
    format_count,
    format_duration,
    format_duration_range,
    format_number,
    format_parameters,
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


def test_a_line_is_folded_between_words_on_a_terminal_alone():
    for width in (60, 80, 200):
        console = terminal(width)
        with Progress(console) as bar:
            bar.start("evaluate")
            bar.finish(SUMMARY)
            bar.note(SUMMARY)
        lines = [line for line in printed(console).splitlines() if line.strip()]
        words = " ".join(lines[-6:]).split()
        assert all(len(line.rstrip()) <= width for line in lines)
        assert sum("44.5 ± 1.2%," in line for line in lines) == 2
        for word in SUMMARY.split():
            assert words.count(word) >= 2, (word, lines)
    for indent in ("", "  "):
        console = terminal(60)
        print_line(console, f"{indent}{SUMMARY}\n{SUMMARY}")
        lines = printed(console).splitlines()
        assert len(lines) == 4
        assert all(line.startswith(indent) and line[len(indent)] != " " for line in lines[:2])
        assert all(len(line) <= 60 and line[0] != " " for line in lines[2:])
        assert " ".join(" ".join(lines).split()) == f"{SUMMARY} {SUMMARY}"
    path = "/a/folder/" + "x" * 90
    console = terminal(80)
    print_line(console, f"the file {path} is damaged")
    assert path in printed(console).splitlines()[1], "it can be copied"
    pipe = Console(file=io.StringIO(), width=80)
    print_line(pipe, SUMMARY)
    assert printed(pipe).splitlines() == [SUMMARY]


class Lines(io.StringIO):
    """Sets an event after a number of lines."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.enough = threading.Event()

    def write(self, text: str) -> int:
        self.number -= text.count("\n")
        if self.number <= 0:
            self.enough.set()
        return super().write(text)


def test_a_pipe_gets_lines_also_while_a_task_is_silent(monkeypatch):
    monkeypatch.setattr("orchestrator.terminal.progress.SECONDS_BETWEEN_LINES", 0.0)
    for done, total, shown in (
        (0.0108, 5, "0/5"),
        (2.5, 5, "2/5"),
        (17410, 32768, "17,410/32,768"),
    ):
        lines = io.StringIO()
        with Progress(Console(file=lines, width=80)) as progress:
            progress.start("sweep", total)
            progress.advance(done)
        assert lines.getvalue().startswith(f"  sweep: {shown}, ")
    monkeypatch.setattr("orchestrator.terminal.progress.POLL_SECONDS", 0.01)
    out = Lines(3)
    with Progress(Console(file=out, width=80)) as progress:
        progress.start("evaluate", 12000)
        assert out.enough.wait(60)
    assert out.getvalue().startswith("  evaluate: 0/12,000, 0 s so far\n")


def test_the_time_left_follows_from_units_that_were_counted_for_a_while(monkeypatch):
    monkeypatch.setattr("orchestrator.terminal.progress.SECONDS_BETWEEN_LINES", -1.0)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    lines = io.StringIO()

    def advance(seconds: float, done: float, **options: Any) -> str:
        clock[0] += seconds
        progress.advance(done, **options)
        return lines.getvalue().splitlines()[-1].strip()

    with Progress(Console(file=lines, width=200)) as progress:
        progress.start("sweep", 100)
        assert advance(0, 30) == "sweep: 30/100, 0 s so far", "30 were finished before"
        assert advance(40, 30) == "sweep: 30/100, 40 s so far", "processes start"
        assert advance(1, 31) == "sweep: 31/100, 41 s so far"
        assert advance(4, 40) == "sweep: 40/100, 45 s so far"
        assert advance(6, 51) == "sweep: 51/100, 24 s left, 51 s so far", "20 took 10 s"
        assert advance(0, 51, seconds_left=90.0) == "sweep: 51/100, 1.5 min left, 51 s so far"
        assert advance(0, 51, seconds_left=math.nan) == "sweep: 51/100, 51 s so far"
        assert advance(9, 107).endswith(", 0 s left, 1 min so far"), "the total was too low"
        progress.start("influence")
        assert advance(20, 0) == "influence: 0, 20 s so far", "of another task nothing is known"


def test_progress_is_printed_while_library_output_is_suppressed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("orchestrator.terminal.progress.SECONDS_BETWEEN_LINES", -1.0)
    with open_session(tmp_path, "evaluate", verbose=True) as session:
        session.progress.start("evaluate", 10)
        with suppress_output():
            session.progress.advance(5)
    assert "evaluate: 5/10" in capsys.readouterr().out


def test_a_narrow_terminal_keeps_bar_and_times_and_loses_the_first_words(monkeypatch):
    parts = ["loss teacher 5.51; r = 0 5.52", "12,640 tokens/s", "r = 0 until step 6,000"]
    monkeypatch.setattr("orchestrator.terminal.progress.SECONDS_TO_MEASURE", 0.0)
    for width, num_lost in ((160, 0), (100, 2), (80, 2), (50, 3)):
        console = terminal(width)
        with Progress(console) as bar:
            bar.start("pretrain", 10_000)
            for done in (1, 2, 5000):
                bar.advance(done, parts, seconds_left=7500)
        line = printed(console).rstrip().splitlines()[-1]
        assert "━" * 6 in line, "the bar"
        for kept in ("pretrain", " 50%", "0:00:00", "2.1 h left", *parts[num_lost:]):
            assert kept in line, (width, line)
        assert not any(lost in line for lost in parts[:num_lost])


def test_the_bar_shows_no_share_before_the_first_unit():
    """A bar is drawn once more when it is closed."""
    console = terminal(100)
    with Progress(console) as bar:
        bar.start("pretrain", 100)
        bar.advance(0, "starting Ray")
    assert "starting Ray" in printed(console)
    assert "%" not in printed(console)
    with Progress(console) as bar:
        bar.start("pretrain", 100)
        bar.advance(25)
    assert "25%" in printed(console)


def test_what_libraries_write_into_the_log_stays_out_of_the_terminal(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    console = terminal(80)
    with Progress(console) as bar:
        bar.start("import")
        print("Loading weights: 50%", file=sys.stderr)
        bar.finish("done")
    assert "Loading weights" in log.getvalue()
    assert "Loading weights" not in printed(console)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_count(1, "trial"), "1 trial"),
        (format_count(1234, "trial"), "1,234 trials"),
        (format_count(2, "pass", "passes"), "2 passes"),
        (format_bytes(512), "512 B"),
        (format_bytes(999.6), "0.976 KiB"),
        (format_bytes(1.5 * 2**30), "1.5 GiB"),
        (format_bytes(2**41), "2 TiB"),
        (format_parameters(1_484_032), "1.48 M"),
        (format_parameters(23_264), "23.3 K"),
        (format_parameters(1.34e9), "1.34 B"),
        (format_number(17410), "17,410"),
        (format_number(2.5), "2.5"),
        (format_number(3.0), "3"),
        (format_duration(0.0123), "0.012 s"),
        (format_duration(150), "2.5 min"),
        (format_duration(5400), "1.5 h"),
        (format_duration(72 * 3600), "3 days"),
        (format_duration_range(2 * 3600, 3 * 3600), "2 to 3 h"),
        (format_duration_range(1800, 7200), "30 min to 2 h"),
        (format_duration_range(7200, 7200), "2 h"),
        (format_with_error(0.444, 0.012, is_percent=True), "44.4 ± 1.2"),
        (format_with_error(2.34567, None, is_percent=False), "2.346"),
        (join_names(["a", "b"]), "a, b"),
        (join_names(["2,1", "0"]), "2,1; 0"),
    ],
)
def test_texts_of_numbers(text, expected):
    assert text == expected
