"""Progress on terminals and in pipes: finished lines, shares, and signs of life."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from orchestrator.cli.session import open_session
from orchestrator.evaluation.adapter import suppress_output
from orchestrator.terminal.progress import Progress

WIDTHS = (60, 80, 200)
SUMMARY = "accuracy 44.5 ± 1.2%, 2.345 bits per byte, 12,345 items of all the tasks together"


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return Text.from_ansi(console.file.getvalue()).plain


@pytest.mark.parametrize("width", WIDTHS)
def test_a_finished_line_is_folded_between_words(width: int) -> None:
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


class Lines(io.StringIO):
    """Sets an event after a number of lines."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.enough = number, threading.Event()

    def write(self, text: str) -> int:
        self.number -= text.count("\n")
        if self.number <= 0:
            self.enough.set()
        return super().write(text)


def test_a_silent_task_prints_its_state_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.terminal.progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("orchestrator.terminal.progress.POLL_SECONDS", 0.01)
    out = Lines(3)
    with Progress(Console(file=out, width=80)) as progress:
        progress.start("evaluate", 12000)
        assert out.enough.wait(60)
    assert out.getvalue().startswith("  evaluate: 0/12,000, 0 s so far\n")


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [(0.0108, 5, "0/5"), (2.5, 5, "2/5"), (17410, 32768, "17,410/32,768")],
)
def test_the_share_is_readable(
    monkeypatch: pytest.MonkeyPatch, done: float, total: float, shown: str
) -> None:
    monkeypatch.setattr("orchestrator.terminal.progress.SECONDS_BETWEEN_LINES", 0.0)
    out = io.StringIO()
    with Progress(Console(file=out, width=80)) as progress:
        progress.start("sweep", total)
        progress.advance(done)
    assert out.getvalue().startswith(f"  sweep: {shown}, ")


def test_progress_is_printed_while_library_output_is_suppressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("orchestrator.terminal.progress.SECONDS_BETWEEN_LINES", -1.0)
    with open_session(tmp_path, "evaluate", verbose=True) as session:
        session.progress.start("evaluate", 10)
        with suppress_output():
            session.progress.advance(5)
    assert "evaluate: 5/10" in capsys.readouterr().out


def test_the_bar_shows_no_share_before_the_first_unit() -> None:
    console = terminal(100)
    with Progress(console) as bar:
        bar.start("pretrain", 100)
        bar.advance(0, "starting Ray")
        assert bar._bar is not None
        bar._bar.refresh()
        assert "starting Ray" in printed(console)
        assert "%" not in printed(console)
        bar.advance(25)
        bar._bar.refresh()
        assert "25%" in printed(console)
