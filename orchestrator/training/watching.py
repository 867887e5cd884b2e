"""Follow running trainings: progress on the terminal, and runs in MLflow.

A training writes only its journal, which `RunMonitor` reads. So neither the terminal nor the
tracking server can slow or stop it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from statistics import harmonic_mean
from typing import TYPE_CHECKING, Any

from orchestrator.models.folder import decoder_config
from orchestrator.records.tracked_run import RunStatus, TrackedRun, status_after
from orchestrator.records.training import TrainingJob
from orchestrator.records.training_state import Training
from orchestrator.settings import Settings, to_yaml
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_duration
from orchestrator.training.run_locks import is_run_locked
from orchestrator.training.schedules import flops_per_token_by_step, steps_before_corrections
from orchestrator.training.tracked_runs import training_run
from orchestrator.workspace.errors import first_line
from orchestrator.workspace.journal import SPEED_METRIC, JournalReader, now_ms
from orchestrator.workspace.layout import PROFILE_NAME

if TYPE_CHECKING:
    from orchestrator.tracking.tracker import Tracking

MAX_SPEEDS = 10
"""Last records whose mean throughput counts: a single one may lie in a pause."""
MIN_SPEEDS = 2
"""Records of each running job before the remaining time is shown."""


class RunMonitor:
    """Follows running jobs, named by label; as a context manager it ends the tracked runs."""

    def __init__(
        self, jobs: Mapping[str, TrainingJob], tracking: Tracking, progress: Progress
    ) -> None:
        self._jobs = dict(jobs)
        self._tracking = tracking
        self._progress = progress
        self._journals = {label: JournalReader(job.folder) for label, job in jobs.items()}
        self._costs = {label: remaining_flops(job) for label, job in jobs.items()}
        self._losses: dict[str, float | None] = dict.fromkeys(jobs)
        self._speeds = {label: deque[float](maxlen=MAX_SPEEDS) for label in jobs}
        self._begun: set[str] = set()
        """Jobs with a record since this monitor started."""
        self._stepped: set[str] = set()
        """Of these, jobs with a step since they started or resumed."""
        self._warm: set[str] = set()
        """Of these, jobs whose first throughput was recorded, which includes one-time work and does
        not count."""
        self._errors: dict[str, Exception] = {}
        """Why jobs failed."""
        self._kind = ""
        self._settings: dict[str, str] = {}
        self._started_ms = now_ms()

    def open_runs(self, kind: str, settings: Mapping[str, Settings]) -> None:
        """Show the jobs in MLflow from now on, with a kind and all settings by label."""
        self._kind = kind
        self._settings = {
            label: to_yaml(settings_of_job) for label, settings_of_job in settings.items()
        }
        self._tracking.publish(*(self._run(label, "RUNNING") for label in self._jobs))

    def _run(self, label: str, status: RunStatus, reason: str = "") -> TrackedRun:
        job = self._jobs[label]
        settings = self._settings[label]
        return training_run(job, self._kind, label, settings, status=status, reason=reason)

    def note_failure(self, job: TrainingJob, error: Exception) -> None:
        """Say at once why a job failed, if others continue; the end of the command repeats it."""
        folders = {own_job.run_folder: label for label, own_job in self._jobs.items()}
        label = folders[job.run_folder]
        self._errors[label] = error
        if len(self._jobs) > 1:
            self._progress.note(f"{label} failed: {first_line(error)}")

    def poll(self) -> None:
        """Show new records; call it often."""
        self._read()
        num_done = 0
        losses: list[str] = []
        stages: list[str] = []
        total_speed = 0.0
        has_steps_left = False
        for label, job in self._jobs.items():
            step = self._journals[label].step
            loss = self._losses[label]
            num_done += step
            if step < job.recipe.num_steps:
                has_steps_left = True
                if label not in self._stepped or loss is None:
                    continue
                losses.append(f"{label} {loss:.2f}")
                stages.append(self._stage_text(label, step))
                if self._speeds[label]:
                    total_speed += harmonic_mean(self._speeds[label])
        # The counted steps may be those of an earlier process.
        parts = ["starting, no step yet"] if has_steps_left else [""]
        if losses:
            speed = f"{total_speed:,.0f} tokens/s" if total_speed else ""
            # On a narrow terminal the losses are left out first.
            all_parts = (f"loss {'; '.join(losses)}", speed, *dict.fromkeys(stages))
            parts = [part for part in all_parts if part]
        self._progress.advance(num_done, parts, seconds_left=self._seconds_left())

    def _stage_text(self, label: str, step: int) -> str:
        """Return until which step a model makes no corrections yet; empty after that."""
        job = self._jobs[label]
        num_steps = steps_before_corrections(job.recipe)
        if step >= num_steps or not job.model.corrections.max_corrections:
            return ""
        return f"r = 0 until step {num_steps:,}"

    def _seconds_left(self) -> float:
        """Return the remaining seconds of all jobs; NaN while the speed of a running one is
        unknown.

        Steps are weighted by FLOPs, because corrections make them slower.
        """
        flops_left = 0.0
        flops_per_second = 0.0
        longest = 0.0
        for label, job in self._jobs.items():
            step = self._journals[label].step
            costs = self._costs[label]
            speeds = self._speeds[label]
            flops_left += costs[step]
            if label not in self._begun or step >= job.recipe.num_steps:
                continue
            if not step or len(speeds) < MIN_SPEEDS:
                return math.nan
            flops_per_token = (costs[step - 1] - costs[step]) / job.recipe.num_tokens_per_step
            flops_per_second_of_job = harmonic_mean(speeds) * flops_per_token
            flops_per_second += flops_per_second_of_job
            longest = max(longest, costs[step] / flops_per_second_of_job)
        # Waiting jobs start when others end; no job ends sooner than it would by itself.
        return max(longest, flops_left / flops_per_second) if flops_per_second else math.nan

    def _read(self) -> None:
        for label, journal in self._journals.items():
            for record in journal.read():
                values = record.get("values", {})
                self._losses[label] = values.get("train/loss", self._losses[label])
                if record["time"] < self._started_ms:
                    continue
                self._begun.add(label)
                if record["kind"] == "metrics":
                    self._stepped.add(label)
                if speed := values.get(SPEED_METRIC):
                    if label in self._warm:
                        self._speeds[label].append(speed)
                    self._warm.add(label)
                if record["kind"] == "event":
                    self._note(label, record)
                if record.get("name") in ("started", "resumed"):
                    # Earlier records are those of an earlier process.
                    self._stepped.discard(label)
                    self._warm.discard(label)
                    self._speeds[label].clear()

    def _note(self, label: str, event: Mapping[str, Any]) -> None:
        name = event["name"]
        if name == "profiled":
            self._progress.note(f"{event['text']}: {self._jobs[label].folder / PROFILE_NAME}")
        elif name == "compiled":
            self._progress.note(f"{label}: compiled in {format_duration(event['seconds'])}")
        elif name in ("damaged", "not uploaded", "not profiled", "not compiled", "smaller passes"):
            self._progress.note(event["text"])
        elif name == "skipped":
            self._progress.note(
                f"{label}: step {event['step']} was skipped: loss {event['loss']:g}, "
                f"gradient norm {event['gradient_norm']:g}"
            )

    def __enter__(self) -> RunMonitor:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the runs, except those of jobs that another process trains."""
        self._read()
        ended = [
            label
            for label, job in self._jobs.items()
            if self._settings and (error is None or not is_run_locked(job.folder))
        ]
        self._tracking.publish(*(self._ended_run(label, error) for label in ended))
        self._tracking.wait(briefly=error is not None)

    def _ended_run(self, label: str, error: BaseException | None) -> TrackedRun:
        """Return a run with its end: finished, its own error, or the error that ended all."""
        own_error = self._errors.get(label, error)
        if own_error is None or Training(self._jobs[label].folder).outcome:
            return self._run(label, "FINISHED")
        return self._run(label, status_after(own_error), first_line(own_error))


def remaining_flops(job: TrainingJob) -> list[float]:
    """Return the remaining FLOPs, with a teacher's, for each number of finished steps."""
    teacher = decoder_config(Path(job.frozen_teacher)) if job.frozen_teacher else None
    flops_at = flops_per_token_by_step(job, teacher)
    num_tokens = job.recipe.num_tokens_per_step
    last_step_first = reversed(range(job.recipe.num_steps))
    flops_of_steps = (num_tokens * flops_at(step) for step in last_step_first)
    return [*accumulate(flops_of_steps, initial=0.0)][::-1]
