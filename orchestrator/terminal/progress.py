"""What the user sees while a stage runs: one progress bar on a terminal, plain lines elsewhere, one
line when done.

Stages talk to a `Progress` and know nothing of terminals. On a terminal Rich draws the bar; in a
pipe or a log file a plain line appears every few seconds, no more often, so that logs stay
readable, and also while a stage has nothing to report, so that nobody takes it for dead.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from orchestrator.terminal.layout import print_line
from orchestrator.workspace.credentials import mask_secrets

PLAIN_SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 1.0


class Progress:
    """Silent progress: what tests and library callers pass."""

    def start(self, title: str, total: float | None = None) -> None:
        """Begin a stage of `total` units; None when the end is not known."""

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        """Say how many units are done, with a few words such as the current loss, and how long the
        rest takes where the units do not tell."""

    def note(self, text: str) -> None:
        """Print a line of its own: a warning, or something worth knowing."""

    def finish(self, summary: str) -> None:
        """End the stage with its one line."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal in order, whatever happened."""


class PlainProgress(Progress):
    """Plain lines for pipes, log files and CI.

    A thread prints the last state again where a stage reports nothing for a while.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._title = ""
        self._total: float | None = None
        self._state = ""
        self._started = self._printed = 0.0
        self._lock = threading.Lock()
        self._ended: threading.Event | None = None

    def start(self, title: str, total: float | None = None) -> None:
        self.close()
        self._title, self._total = title, total
        self._state = self._of_total(0) if total else ""
        self._started = self._printed = time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._keep_telling, args=(self._ended,), daemon=True).start()

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        left = f", {_duration(seconds_left)} left" if seconds_left else ""
        self._state = f"{self._of_total(done)} {text}{left}".strip()
        self._tell()

    def note(self, text: str) -> None:
        self._print(f"  {mask_secrets(text)}")

    def finish(self, summary: str) -> None:
        self.close()
        seconds = time.monotonic() - self._started
        self._print(f"{self._title}: {summary} ({seconds:.0f} s)")

    def close(self) -> None:
        if self._ended:
            self._ended.set()
            self._ended = None

    def _keep_telling(self, ended: threading.Event) -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            try:
                self._tell()
            except (OSError, ValueError):  # Nobody reads any more; who writes next will say so.
                return

    def _tell(self) -> None:
        """Print the state, unless that was done a moment ago."""
        with self._lock:
            now = time.monotonic()
            if now - self._printed < PLAIN_SECONDS_BETWEEN_LINES:
                return
            self._printed = now
            seconds = f"{_duration(now - self._started)} so far"
            self._print(f"  {self._title}: " + ", ".join(filter(None, (self._state, seconds))))

    def _of_total(self, done: float) -> str:
        return f"{_count(done)}/{_count(self._total)}" if self._total else _count(done)

    def _print(self, text: str) -> None:
        print_line(self.console, text)


class BarProgress(Progress):
    """One bar at a time on a terminal; a finished stage leaves its line above."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: RichProgress | None = None
        self._title = ""
        self._total: float | None = None
        self._started = 0.0

    def start(self, title: str, total: float | None = None) -> None:
        self.close()
        self._title, self._total, self._started = title, total, time.monotonic()
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[share]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
            transient=True,
        )
        # It moves to and fro until something is done: 0 % for long looks like a standstill.
        self._task = self._bar.add_task(title, total=None, share="", text="", left="")
        self._bar.start()

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        if not self._bar:
            return
        if done and self._total:
            share = f"{min(1.0, done / self._total):4.0%}"
            self._bar.update(self._task, total=self._total, share=share)
        self._bar.update(self._task, completed=done, text=text)
        left = self._bar.tasks[0].time_remaining if seconds_left is None else seconds_left
        self._bar.update(self._task, left="" if left is None else f"{_duration(left)} left")

    def note(self, text: str) -> None:
        print_line(self.console, f"  {mask_secrets(text)}")

    def finish(self, summary: str) -> None:
        seconds = time.monotonic() - self._started
        self.close()
        # One text, so that the terminal's width counts for all of it.
        line = Text.assemble(("✓", "green"), " ", (self._title, "bold"), f" {summary}")
        print_line(self.console, line.append(f" ({seconds:.0f} s)"))

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _count(number: float) -> str:
    if number >= 1000:
        return f"{number:,.0f}"
    return f"{number:.2f}".rstrip("0").rstrip(".")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def terminal_progress(console: Console | None = None) -> Progress:
    """Return a bar where standard output is a terminal, plain lines elsewhere."""
    console = console or Console(file=sys.stdout)
    return BarProgress(console) if console.is_terminal else PlainProgress(console)
