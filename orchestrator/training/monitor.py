"""Follows running jobs by what they write, for the progress bar and for MLflow.

Training writes journals and nothing else. The process that started it reads them a few times a
second; so the terminal and the tracking server see everything, and neither can slow training or
stop it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.data.token_store import open_tokens
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import TrackedRun, Tracking, status_after
from orchestrator.training.job import TrainingJob, job_key
from orchestrator.training.run_lock import is_run_locked
from orchestrator.training.schedules import flops_per_token_by_step
from orchestrator.workspace.journal import read_journal

SECONDS_BETWEEN_COPIES = 5.0


class JournalReader:
    """The end of one folder's journal: each call reads only what is new."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; its journal may still be missing."""
        self.step = 0
        """The last step that was recorded."""
        self._folder, self._offset = folder, 0

    def read(self) -> list[dict[str, Any]]:
        """Return the records since the last call."""
        records, self._offset = read_journal(self._folder, self._offset)
        for record in records:
            self.step = record.get("step", self.step) if record["kind"] == "metrics" else self.step
        return records


class RunMonitor:
    """Reads what running jobs write, for the progress bar and for MLflow.

    As a context manager it ends the tracked runs with the status that fits how the block ended.
    """

    def __init__(
        self, jobs: Mapping[str, TrainingJob], tracking: Tracking, progress: Progress
    ) -> None:
        """Name the jobs to follow, by label."""
        self._jobs, self._tracking, self._progress = dict(jobs), tracking, progress
        self._tails = {label: JournalReader(job.folder) for label, job in jobs.items()}
        self._costs = {label: _costs_to_come(job) for label, job in jobs.items()}
        self._numbers: dict[str, dict[str, float]] = {label: {} for label in jobs}
        self._runs: dict[str, TrackedRun] = {}
        self._copied_at = time.monotonic()
        self._begun_ms = int(time.time() * 1000)

    def open_runs(
        self, kind: str, params: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, TrackedRun]:
        """Find or make the tracked run of each job; `kind` and its parameters describe it."""
        for label, job in self._jobs.items():
            self._runs[label] = self._tracking.run(
                job_key(job),
                name=job.folder.name,
                kind=kind,
                params=params[label],
                tags={"iiet.method": str(job.model["method"])},
            )
            tokens = open_tokens(job.tokens_folder)
            self._runs[label].log_dataset("tokens", tokens.fingerprint, tokens.profile)
        return self._runs

    def poll(self) -> None:
        """Read what is new; called a few times a second."""
        for label, tail in self._tails.items():
            for record in tail.read():
                if record["kind"] == "metrics":
                    self._numbers[label] |= record["values"]
                elif record["time"] >= self._begun_ms:
                    self._note(label, record)
        num_done = sum(tail.step for tail in self._tails.values())
        self._progress.advance(num_done, self._text(), seconds_left=self._seconds_left())
        if time.monotonic() - self._copied_at > SECONDS_BETWEEN_COPIES:
            self._copy()

    def _running(self) -> dict[str, dict[str, float]]:
        """Return the last numbers of the jobs that have some and are not at their end."""
        return {
            label: numbers
            for label, numbers in self._numbers.items()
            if "train/loss" in numbers
            and self._tails[label].step < self._jobs[label].recipe.num_steps
        }

    def _text(self) -> str:
        running = self._running()
        if not running:
            has_begun = any(tail.step for tail in self._tails.values())
            return "" if has_begun else "waiting for the first step"
        losses = "; ".join(f"{label} {n['train/loss']:.2f}" for label, n in running.items())
        speed = sum(n.get("train/tokens_per_second", 0.0) for n in running.values())
        return f"loss {losses}, {speed:,.0f} tokens/s"

    def _seconds_left(self) -> float | None:
        # Of the longest job; a step with corrections takes longer than one without.
        found = []
        for label, numbers in self._running().items():
            costs, step = self._costs[label], self._tails[label].step
            speed = numbers.get("train/tokens_per_second")
            if speed and step:
                now = costs[step - 1] - costs[step]
                num_tokens = self._jobs[label].recipe.num_tokens_per_step
                found.append(costs[step] / now * num_tokens / speed)
        return max(found, default=None)

    def _note(self, label: str, event: Mapping[str, Any]) -> None:
        if event["name"] in ("damaged", "not copied"):
            self._progress.note(event["text"])
        elif event["name"] == "skipped":
            self._progress.note(
                f"{label}: step {event['step']} was skipped: loss {event['loss']:g}, "
                f"gradient norm {event['gradient_norm']:g}"
            )

    def __enter__(self) -> RunMonitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Copy the rest into MLflow and end the runs; not those that another process is at."""
        self._copy()
        for label, run in self._runs.items():
            if error is None or not is_run_locked(self._jobs[label].folder):
                run.finish(status_after(error))

    def _copy(self) -> None:
        for label, run in self._runs.items():
            run.log_journal(self._jobs[label].folder)
        self._copied_at = time.monotonic()


def _costs_to_come(job: TrainingJob) -> list[float]:
    """Return, for each number of steps done, what the others cost by their FLOPs."""
    flops_at = flops_per_token_by_step(job)
    steps = range(job.recipe.num_steps)
    return [0.0, *accumulate(flops_at(step) for step in reversed(steps))][::-1]
