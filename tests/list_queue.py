"""Trials in a list, for Ray Tune."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.cluster.tune import TrialFunction, run_trials
from orchestrator.records.trial import Trial
from orchestrator.settings import ClusterSettings, SweepSettings


class ListQueue:
    """A queue of trials in a list; remembers how they ended."""

    def __init__(self, trials: list[Trial], *, watch: Callable[[], None] = lambda: None) -> None:
        self.waiting, self.taken = list(trials), dict[str, Trial]()
        self.ended: dict[str, tuple[Trial | None, str]] = {}
        self.most_at_once, self.threads, self.watch_too = 0, set[int](), watch

    @property
    def is_over(self) -> bool:
        return not self.waiting and not self.taken

    @property
    def num_taken(self) -> int:
        return len(self.taken)

    def take(self) -> Trial | None:
        if not self.waiting:
            return None
        trial = self.waiting.pop(0)
        self.taken[trial.key] = trial
        self.most_at_once = max(self.most_at_once, len(self.taken))
        return trial

    def on_start(self, key: str) -> None:
        assert key in self.taken

    def on_end(self, key: str, result: Trial | None, error: str) -> None:
        del self.taken[key]
        self.ended[key] = result, error

    def watch(self) -> None:
        self.threads.add(threading.get_ident())
        self.watch_too()

    def saved(self) -> str:
        return f"{len(self.waiting)} are left"

    def seconds_to_save(self) -> float:
        return 60.0  # Any busy machine is fast enough.


def run_queue(
    queue: ListQueue,
    function: TrialFunction,
    folder: Path,
    sweep: SweepSettings | None = None,
    **more: Any,
) -> dict[str, tuple[Trial | None, str]]:
    """Run the trials of a queue under Ray Tune, and return how they ended, by key."""
    cluster = more.pop("cluster", ClusterSettings())
    num_trials = len(queue.waiting)
    sweep = sweep or SweepSettings()
    run_trials(function, queue, folder / "ray", sweep, cluster, num_trials=num_trials, **more)
    assert queue.is_over
    assert not (folder / "ray").exists(), "nothing of Tune's own stays"
    return queue.ended
