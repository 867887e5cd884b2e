"""Progress of one task at a time: a bar on a terminal, plain lines elsewhere, one line at the end.

Elsewhere is a pipe or a log file: a plain line appears every few seconds, also while nothing is
reported, so that a slow task does not look dead.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from orchestrator.terminal.formatting import format_duration, format_number
from orchestrator.terminal.layout import print_line
from orchestrator.workspace.errors import mask_secrets

SECONDS_BETWEEN_LINES = 10.0
POLL_SECONDS = 1.0


class Progress(AbstractContextManager["Progress"]):
    """Silent progress, for tests and library callers."""

    def start(self, title: str, total: float | None = None) -> None:
        """Begin a task of `total` units; None if the total is not known."""

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        """Report the units done since the start, and a few words, such as the current loss.

        Args:
            seconds_left: Remaining time, if it does not follow from the units.
        """

    def note(self, text: str) -> None:
        """Print a warning or other information on a line of its own."""

    def finish(self, summary: str) -> None:
        """End the task with one line."""

    def close(self) -> None:
        """Stop drawing, also after an error."""

    def __exit__(self, *_: object) -> None:
        self.close()


class _ConsoleProgress(Progress):
    def __init__(self, console: Console) -> None:
        self.console = console
        self._title = ""
        self._total: float | None = None
        self._started = 0.0

    def start(self, title: str, total: float | None = None) -> None:
        self.close()
        self._title, self._total, self._started = title, total, time.monotonic()

    def note(self, text: str) -> None:
        print_line(self.console, f"  {mask_secrets(text)}")

    def finish(self, summary: str) -> None:
        self.close()
        duration = format_duration(round(time.monotonic() - self._started))
        print_line(self.console, self._headline().append(f" {summary} ({duration})"))

    def _headline(self) -> Text:
        return Text(f"{self._title}:")


class PlainProgress(_ConsoleProgress):
    """Plain lines for pipes, log files and CI; a thread repeats the last state of a silent task."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._state = ""
        self._printed = 0.0
        self._lock = threading.Lock()
        self._ended: threading.Event | None = None

    def start(self, title: str, total: float | None = None) -> None:
        super().start(title, total)
        self._printed = self._started
        self._state = self._share(0) if total else ""
        self._ended = threading.Event()
        threading.Thread(target=self._repeat_state, args=(self._ended,), daemon=True).start()

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        left = f", {format_duration(round(seconds_left))} left" if seconds_left else ""
        self._state = f"{self._share(done)} {text}{left}".strip()
        self._print_state()

    def close(self) -> None:
        if self._ended:
            self._ended.set()
            self._ended = None

    def _repeat_state(self, ended: threading.Event) -> None:
        while not ended.wait(POLL_SECONDS):
            try:
                self._print_state()
            except (OSError, ValueError):  # A closed pipe; the main thread's next line reports it.
                return

    def _print_state(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._printed < SECONDS_BETWEEN_LINES:
                return
            self._printed = now
            seconds = f"{format_duration(round(now - self._started))} so far"
            state = ", ".join(filter(None, (self._state, seconds)))
            print_line(self.console, f"  {self._title}: {state}")

    def _share(self, done: float) -> str:
        total = f"/{format_number(self._total)}" if self._total else ""
        return format_number(done) + total


class BarProgress(_ConsoleProgress):
    """One bar at a time on a terminal; a finished task leaves its line above."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar: RichProgress | None = None

    def start(self, title: str, total: float | None = None) -> None:
        super().start(title, total)
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
        # Without a total the bar pulses until the first unit is done: 0 % would look dead.
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
        self._bar.update(
            self._task, left="" if left is None else f"{format_duration(round(left))} left"
        )

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _headline(self) -> Text:
        return Text.assemble(("✓", "green"), " ", (self._title, "bold"))


def terminal_progress(console: Console | None = None) -> Progress:
    """Return a bar if standard output is a terminal, else plain lines."""
    console = console or Console(file=sys.stdout)
    return BarProgress(console) if console.is_terminal else PlainProgress(console)
