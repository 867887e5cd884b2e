"""What the user sees while a stage runs: one progress bar on a terminal, plain lines elsewhere, one
line when done.

Stages talk to a `Progress` and know nothing of terminals. On a terminal Rich draws the bar; in a
pipe or a log file a plain line appears at most every few seconds, so that logs stay readable.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress

from orchestrator.credentials import without_secrets

PLAIN_SECONDS_BETWEEN_LINES = 10.0


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


NullProgress = Progress


class PlainProgress(Progress):
    """Plain lines for pipes, log files and CI."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._title = ""
        self._total: float | None = None
        self._started = self._printed = 0.0

    def start(self, title: str, total: float | None = None) -> None:
        self._title, self._total = title, total
        self._started = self._printed = time.monotonic()

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        now = time.monotonic()
        if now - self._printed < PLAIN_SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        of_total = f"{done:.4g}/{self._total:.6g}" if self._total else f"{done:.4g}"
        left = f", {_duration(seconds_left)} left" if seconds_left else ""
        self._print(f"  {self._title}: {of_total} {text}{left}".rstrip())

    def note(self, text: str) -> None:
        self._print(f"  {without_secrets(text)}")

    def finish(self, summary: str) -> None:
        seconds = time.monotonic() - self._started
        self._print(f"{self._title}: {summary} ({seconds:.0f} s)")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class BarProgress(Progress):
    """One bar at a time on a terminal; a finished stage leaves its line above."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: RichProgress | None = None
        self._title = ""
        self._started = 0.0

    def start(self, title: str, total: float | None = None) -> None:
        self.close()
        self._title, self._started = title, time.monotonic()
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%" if total else ""),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, text="", left="")
        self._bar.start()

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, text=text)
            left = self._bar.tasks[0].time_remaining if seconds_left is None else seconds_left
            self._bar.update(self._task, left="" if left is None else f"{_duration(left)} left")

    def note(self, text: str) -> None:
        self.console.print(f"  {without_secrets(text)}", markup=False, highlight=False)

    def finish(self, summary: str) -> None:
        seconds = time.monotonic() - self._started
        self.close()
        self.console.print(f"[green]✓[/] [bold]{self._title}[/]", end=" ", highlight=False)
        self.console.print(f"{summary} ({seconds:.0f} s)", markup=False, highlight=False)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


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
