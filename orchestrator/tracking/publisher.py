"""A background thread that publishes runs, so that no caller waits for a server.

What is new is published at once; runs that are RUNNING are published again every few seconds, for
their curves. Of a run that changes meanwhile only the last state is published, so nothing piles up.
The thread lives only while there is something to do. It is a daemon: a server that hangs delays
neither Ctrl-C nor the end of the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from orchestrator.records.tracked_run import TrackedRun

SECONDS_BETWEEN_COPIES = 4.0

Place = tuple[str, str, str | None]


class Publisher:
    """Calls a function with runs, in order, in a background thread."""

    def __init__(self, publish: Callable[[Sequence[TrackedRun]], Iterable[bool]]) -> None:
        """Use `publish`, which yields after each run whether it need not be tried again."""
        self._publish = publish
        self._waiting: dict[Place, TrackedRun] = {}
        self._running: dict[Place, TrackedRun] = {}
        self._has_new = self._is_busy = False
        self._num_published = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, *runs: TrackedRun) -> None:
        """Publish runs soon, the run of a sweep before those of its trials; returns at once."""
        with self._changed:
            for run in runs:
                self._running.pop(run.place, None)
                self._waiting[run.place] = run
                if run.status == "RUNNING":
                    self._running[run.place] = run
            self._has_new = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, seconds: float, *, in_all: bool = False) -> bool:
        """Return whether everything that was put was tried.

        Args:
            seconds: Longest wait for something to be published.
            in_all: Whether this is the longest wait for all of it.

        Raises:
            BaseException: What `publish` raised.
        """
        is_over, num_before = False, -1
        while not is_over and num_before < self._num_published:
            num_before = self._num_published
            with self._changed:
                is_over = self._changed.wait_for(
                    lambda: not (self._has_new or self._is_busy), seconds
                )
            if in_all:
                break
        with self._changed:
            error, self._error = self._error, None
        if error:
            raise error
        return is_over

    def _work(self) -> None:
        copy_at = time.monotonic() + SECONDS_BETWEEN_COPIES
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_new, max(0, copy_at - time.monotonic()))
                batch, self._waiting = self._waiting, {}
                if time.monotonic() >= copy_at:
                    batch = {**self._running, **batch}
                    copy_at = time.monotonic() + SECONDS_BETWEEN_COPIES
                self._has_new, self._is_busy = False, True
            left: dict[Place, TrackedRun] = {}
            try:
                runs = list(batch.values())
                for run, is_done in zip(runs, self._publish(runs), strict=True):
                    self._num_published += is_done
                    if not is_done:
                        left[run.place] = run
            except BaseException as error:
                self._error = error
            with self._changed:
                self._waiting = {**left, **self._waiting}
                self._is_busy = self._has_new
                self._changed.notify_all()
                if not (self._waiting or self._running):
                    self._thread = None
                    return
