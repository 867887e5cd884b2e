"""Progress of one task at a time: a bar on a terminal, plain lines elsewhere, one line at the end.

In a pipe or a log file, a plain line appears every few seconds, even without new reports, so that a
slow task does not look dead. The remaining time is shown after units were counted for a while; the
time before the first unit (starting processes, a compiler) does not count.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from orchestrator.terminal.render import format_duration, format_number, print_line
from orchestrator.workspace.errors import mask_secrets

SECONDS_BETWEEN_LINES = 10.0
POLL_SECONDS = 1.0
SECONDS_TO_MEASURE = 10.0
"""Seconds of counting units before the remaining time is shown."""
BAR_WIDTH = 28
NARROW_BAR_WIDTH = 12
"""Width of the bar on a terminal of fewer than `WIDE_COLUMNS`, to leave room for words."""
WIDE_COLUMNS = 100
ELAPSED_WIDTH = len("0:00:00")


class Progress(AbstractContextManager["Progress"]):
    """Shows a task on a console; without one it is silent, for tests and library callers."""

    _console: Console | None = None
    _title = ""
    _state = ""
    """Count, words and time left of the last report, for plain lines."""
    _total: float | None = None
    _started = 0.0
    """When the task began, as `time.monotonic` counts; likewise `_printed`."""
    _printed = 0.0
    """When the last plain line was printed."""
    _units_before: float | None = None
    """Units of the first report; a task that resumes begins with some."""
    _counted_from: tuple[float, float] | None = None
    """When the first new units were reported, and how many there were then."""
    _bar: Bar | None = None
    _repeating: threading.Event | None = None
    """Ends the thread that repeats the last plain line of a silent task."""
    _printing = threading.Lock()
    """Two threads print plain lines: the one that reports, and the one that repeats."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    def start(self, title: str, total: float | None = None) -> None:
        """Begin a task of `total` units; None if the total is not known."""
        self.close()
        self._title = title
        self._total = total
        self._started = time.monotonic()
        self._units_before = None
        self._counted_from = None
        if self._console and self._console.is_terminal:
            text = partial(TextColumn, markup=False)
            self._bar = Bar(
                SpinnerColumn(),
                text("{task.description}"),
                BarColumn(bar_width=self._bar_width),
                text("{task.fields[share]}"),
                TimeElapsedColumn(),
                text("{task.fields[left]}"),
                text("{task.fields[text]}"),
                console=self._console,
                transient=True,
                # Else libraries' bars, which belong into the log, would stand above this one.
                redirect_stderr=sys.stderr.isatty(),
            )
            # Without a total the bar pulses until the first unit is done: 0 % would look dead.
            self._task = self._bar.add_task(title, total=None, share="", text="", left="")
            self._bar.start()
        elif self._console:
            # The first plain line comes after a pause: a quick task prints none.
            self._printed = self._started
            self._state = self._count(0) if total else ""
            self._repeating = threading.Event()
            threading.Thread(target=self._repeat_line, args=(self._repeating,), daemon=True).start()

    def advance(
        self, done: float, text: str | Sequence[str] = "", *, seconds_left: float | None = None
    ) -> None:
        """Report the units done since the start, and a few words, such as the current loss.

        Args:
            text: Words, or several parts of them: on a narrow terminal, the first parts are left
                out first.
            seconds_left: Remaining time, if it does not follow from the units; NaN while it is not
                known.
        """
        parts = [text] if isinstance(text, str) else [*text]
        time_left = self._time_left(done, seconds_left)
        if self._bar:
            share = ""
            if done and self._total:
                share = f"{min(1.0, done / self._total):4.0%}"
                self._bar.update(self._task, total=self._total, share=share)
            words = self._fitting_words(parts, share, time_left)
            self._bar.update(self._task, completed=done, text=words, left=time_left)
        elif self._repeating:
            count_and_text = f"{self._count(done)} {', '.join(parts)}".strip()
            self._state = ", ".join(filter(None, (count_and_text, time_left)))
            self._print_state()

    @property
    def _bar_width(self) -> int:
        is_wide = self._console is not None and self._console.width >= WIDE_COLUMNS
        return BAR_WIDTH if is_wide else NARROW_BAR_WIDTH

    def _fitting_words(self, parts: Sequence[str], share: str, time_left: str) -> str:
        """Return the words that fit behind the bar, which Rich would else make shorter, too."""
        assert self._console
        widths = (1, cell_len(self._title), self._bar_width, cell_len(share), ELAPSED_WIDTH)
        # A space stands behind each column.
        taken = sum(width + 1 for width in (*widths, cell_len(time_left)))
        room = max(0, self._console.width - taken)
        for first in range(len(parts)):
            words = ", ".join(parts[first:])
            if cell_len(words) <= room:
                return words
        last_part = Text(parts[-1])
        last_part.truncate(room, overflow="ellipsis")
        return last_part.plain

    def note(self, text: str) -> None:
        """Print a warning or other information on a line of its own."""
        if self._console:
            print_line(self._console, f"  {mask_secrets(text)}")

    def finish(self, summary: str) -> None:
        """End the task with one line."""
        self.close()
        if self._console:
            title = Text(f"{self._title}:")
            if self._console.is_terminal:
                title = Text.assemble(("✓", "green"), " ", (self._title, "bold"))
            duration = format_duration(round(time.monotonic() - self._started))
            print_line(self._console, title.append(f" {summary} ({duration})"))

    def close(self) -> None:
        """Stop drawing, also after an error."""
        if self._bar:
            self._bar.stop()
        if self._repeating:
            self._repeating.set()
        self._bar = None
        self._repeating = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def _time_left(self, done: float, seconds_left: float | None) -> str:
        """Return such as "40 s left"; empty while there is too little to measure by."""
        now = time.monotonic()
        if self._units_before is None:
            self._units_before = done
        if self._counted_from is None:
            if done > self._units_before:
                self._counted_from = (now, done)
            return ""
        first_time, first_units = self._counted_from
        if now - first_time < SECONDS_TO_MEASURE or done <= first_units:
            return ""
        if seconds_left is None and self._total:
            units_left = max(0.0, self._total - done)  # A total may be an estimate.
            seconds_left = (now - first_time) * units_left / (done - first_units)
        if seconds_left is None or math.isnan(seconds_left):
            return ""
        return f"{format_duration(round(seconds_left))} left"

    def _repeat_line(self, ended: threading.Event) -> None:
        while not ended.wait(POLL_SECONDS):
            try:
                self._print_state()
            except (OSError, ValueError):  # A closed pipe; the main thread's next line reports it.
                return

    def _print_state(self) -> None:
        with self._printing:
            now = time.monotonic()
            if self._console and now - self._printed >= SECONDS_BETWEEN_LINES:
                self._printed = now
                elapsed = f"{format_duration(round(now - self._started))} so far"
                state = ", ".join(filter(None, (self._state, elapsed)))
                print_line(self._console, f"  {self._title}: {state}")

    def _count(self, done: float) -> str:
        total = f"/{format_number(self._total)}" if self._total else ""
        return format_number(int(done)) + total  # A trial that is half done is not counted yet.


def terminal_progress(console: Console | None = None) -> Progress:
    """Return progress on a console, by default on standard output."""
    return Progress(console or Console(file=sys.stdout))
