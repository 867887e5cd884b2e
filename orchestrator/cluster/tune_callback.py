"""Tune callback: collect the reports of ended trials, and end the experiment after a stop."""

from __future__ import annotations

import json
import math
import pickle
import queue
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune

from orchestrator.cluster.ray import Signal
from orchestrator.cluster.train import failure_reason

tune: Any = ray.tune  # it calls callbacks with keyword arguments; ours take what they need

ANSWER = "answer"


@dataclass(frozen=True)
class TrialReport:
    """How one trial ended."""

    key: str
    """Key of the trial."""
    result: dict[str, Any] | None = None
    """What it returned; None if it failed."""
    error: str | None = None
    """Why it failed, after all its retries."""
    after_stop: bool = False
    """Whether it ended after a stop was asked for."""


class TuneCallback(tune.Callback, tune.Stopper):  # type: ignore[misc]
    """Collects the reports of ended trials, and ends the experiment after a stop.

    Tune would start waiting trials while the running ones save their state, so after a stop this
    object lets Tune end once those have returned. Tune pickles it; it pickles as an empty callback.
    """

    def __init__(self, seconds_to_save: Callable[[Collection[str]], float]) -> None:
        """Prepare an experiment; `seconds_to_save` gets the keys of the trials that run."""
        self._seconds_to_save = seconds_to_save
        self.stop = Signal()
        """Asks all trials to save and return."""
        self._is_stopping = False
        self._reports: queue.SimpleQueue[TrialReport] = queue.SimpleQueue()
        self._running: set[str] = set()
        self._to_wait_for: set[str] | None = None
        self._give_up_at = math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()

    def request_stop(self) -> float:
        """Ask running trials to save and return; return the longest time that it takes them.

        It is in seconds, and 0 if none runs.
        """
        running = frozenset(self._running)
        seconds = self._seconds_to_save(running) if running else 0.0
        self._give_up_at = time.monotonic() + seconds
        self._is_stopping = True
        self.stop.send()
        return seconds

    @property
    def running(self) -> frozenset[str]:
        """Keys of the running trials."""
        return frozenset(self._running)

    def new_reports(self) -> Iterator[TrialReport]:
        """Yield the reports of trials that ended since the last call."""
        while not self._reports.empty():
            yield self._reports.get()

    def __call__(self, *_: Any, **__: Any) -> bool:
        """Never stop a trial from outside: it stops by itself, with its state saved."""
        return False

    def stop_all(self) -> bool:
        """Tell Tune to end once the trials that ran at the stop have returned, or took too long."""
        if self._to_wait_for is None:
            if not self._is_stopping:
                return False
            self._to_wait_for = set(self._running)
        return not self._to_wait_for or time.monotonic() > self._give_up_at

    def on_trial_start(self, *_: Any, trial: Any, **__: Any) -> None:
        """Note that a trial runs."""
        self._running.add(trial.config["trial"]["key"])

    def on_trial_complete(self, *_: Any, trial: Any, **__: Any) -> None:
        """Report a trial's answer; one that stopped without an answer is not reported."""
        key = self._ended(trial)
        answer = json.loads((trial.last_result or {}).get(ANSWER, "{}"))
        if answer:
            self._report(key, result=answer.get("result"), error=answer.get("text"))

    def on_trial_recover(self, *_: Any, trial: Any, **__: Any) -> None:
        """Report a trial that died after a stop, as trying it again would do nothing.

        One that dies before a stop is tried again, and reported when it ends.
        """
        if self._is_stopping:
            self.on_trial_error(trial=trial)

    def on_trial_error(self, *_: Any, trial: Any, **__: Any) -> None:
        """Report why a trial failed for the last time."""
        key = self._ended(trial)
        self._report(key, error=failure_reason(_last_error(trial)))

    def _report(
        self, key: str, result: dict[str, Any] | None = None, error: str | None = None
    ) -> None:
        self._reports.put(TrialReport(key, result, error, self._is_stopping))

    def _ended(self, trial: Any) -> str:
        key: str = trial.config["trial"]["key"]
        self._running.discard(key)
        if self._to_wait_for is not None:
            self._to_wait_for.discard(key)
        return key


def _last_error(trial: Any) -> BaseException:
    """Return why a trial failed. Tune writes a file first, and copies it to its storage later."""
    path = trial.pickled_error_file
    if path and Path(path).is_file():
        error: BaseException = pickle.loads(Path(path).read_bytes())
        return error
    return trial.get_pickled_error() or RuntimeError(trial.get_error())
