"""Copy the journals of running trainings into their MLflow runs, every few seconds.

The process that waits for the trainings calls `poll`; it reads the journals from the workspace, so
workers on other nodes need no MLflow. While the store does not respond, nothing is queued: the next
copy after that begins where the last one ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.tracking.tracked_run import TrackedRun

SECONDS_BETWEEN_COPIES = 4.0


class JournalCopies:
    """The running trainings, by key, and when their journals were copied last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._followed: dict[str, tuple[TrackedRun, Path]] = {}
        self._clock, self._copied_at = clock, clock()

    def follow(self, key: str, run: TrackedRun, folder: Path) -> None:
        """Copy the journal of a folder into a run from now on."""
        self._followed[key] = run, folder

    def end(self, key: str) -> None:
        """Copy a journal no more. Whoever ends the run also logs the rest of its journal."""
        self._followed.pop(key, None)

    def poll(self) -> None:
        """Copy what is new, if the last copy is old enough; call it often."""
        if self._clock() - self._copied_at < SECONDS_BETWEEN_COPIES:
            return
        for run, folder in self._followed.values():
            if run.is_store_down:
                run.mirror_journal(folder)
            else:
                run.log_journal(folder)
        self._copied_at = self._clock()
