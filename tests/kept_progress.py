"""A progress display that keeps what it is told."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.terminal.progress import Progress


class KeptProgress(Progress):
    """Keeps notes, summaries and reports; raises like Ctrl-C after some reports, if asked to."""

    def __init__(self, reports: int = 10**9) -> None:
        self.reports_left = reports
        self.notes: list[str] = []
        self.summaries: list[str] = []
        self.shown: list[tuple[float, str, float | None]] = []
        """What was reported: how much is done, the text, and the seconds that are left."""

    @property
    def done(self) -> list[float]:
        """How much was reported as done."""
        return [done for done, _, _ in self.shown]

    @property
    def texts(self) -> list[str]:
        """The texts that were reported."""
        return [text for _, text, _ in self.shown]

    def advance(
        self, done: float, text: str | Sequence[str] = "", *, seconds_left: float | None = None
    ) -> None:
        words = text if isinstance(text, str) else ", ".join(text)
        self.shown.append((done, words, seconds_left))
        self.reports_left -= 1
        if self.reports_left < 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self, summary: str) -> None:
        self.summaries.append(summary)
