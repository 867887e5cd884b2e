"""Journals of running trainings are copied every few seconds, and not while the store is down."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from orchestrator.tracking import JournalCopies, TrackedRun
from orchestrator.tracking.journal_copies import SECONDS_BETWEEN_COPIES


class Run:
    """Remembers what was copied."""

    def __init__(self) -> None:
        self.copied: list[Path] = []
        self.mirrored: list[Path] = []
        self.is_store_down = False

    def log_journal(self, folder: Path) -> None:
        self.copied.append(folder)

    def mirror_journal(self, folder: Path) -> None:
        self.mirrored.append(folder)


def test_journals_are_copied_until_their_end_while_the_store_responds() -> None:
    assert SECONDS_BETWEEN_COPIES < 5.0, "what is shown is at most 5 s old"
    now = 100.0
    copies, first, second = JournalCopies(lambda: now), Run(), Run()
    copies.follow("a", cast("TrackedRun", first), Path("a"))
    copies.poll()
    assert first.copied == []
    now += SECONDS_BETWEEN_COPIES
    copies.follow("b", cast("TrackedRun", second), Path("b"))
    copies.poll()
    copies.poll()
    assert (first.copied, second.copied) == ([Path("a")], [Path("b")])
    now += SECONDS_BETWEEN_COPIES
    copies.end("a")
    copies.end("unknown")
    second.is_store_down = True
    copies.poll()
    assert second.mirrored == [Path("b")], "other loggers need no store"
    now += SECONDS_BETWEEN_COPIES
    second.is_store_down = False
    copies.poll()
    assert (first.copied, second.copied) == ([Path("a")], [Path("b"), Path("b")])
