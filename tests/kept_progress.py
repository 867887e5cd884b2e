"""A progress display that keeps what it is told."""

from __future__ import annotations

from orchestrator.terminal.progress import Progress


class KeptProgress(Progress):
    """Keeps notes, summaries and numbers; raises like Ctrl-C after some reports, if asked to."""

    def __init__(self, reports: int = 10**9) -> None:
        self.reports_left = reports
        self.notes: list[str] = []
        self.summaries: list[str] = []
        self.done: list[float] = []

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        self.done.append(done)
        self.reports_left -= 1
        if self.reports_left < 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self, summary: str) -> None:
        self.summaries.append(summary)
