"""Follow running jobs through their journals, for the progress bar and for MLflow.

Training writes only journals, so neither the terminal nor the tracking server can slow or stop it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from orchestrator.data.sources import describe_data
from orchestrator.records.training import TrainingJob, job_parameters
from orchestrator.settings import SETTINGS_NAME, Settings, to_yaml
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_duration
from orchestrator.tracking import JournalCopies, TrackedRun, Tracking, reason_tags, status_after
from orchestrator.training.job import PROFILE_NAME, job_key
from orchestrator.training.run_lock import is_run_locked
from orchestrator.training.schedules import flops_per_token_by_step
from orchestrator.training.tracked_models import job_model
from orchestrator.workspace.errors import first_line
from orchestrator.workspace.journal import SPEED_METRIC, now_ms, read_journal, recorded_times


class JournalReader:
    """Reads a folder's journal from where the last call stopped; it may not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.step = 0
        """The last recorded step."""
        self._folder, self._offset = folder, 0

    def read(self) -> list[dict[str, Any]]:
        """Return the records since the last call."""
        records, self._offset = read_journal(self._folder, self._offset)
        for record in records:
            if record["kind"] == "metrics":
                self.step = record.get("step", self.step)
        return records


class RunMonitor:
    """Follows running jobs, named by label; as a context manager it ends the tracked runs."""

    def __init__(
        self, jobs: Mapping[str, TrainingJob], tracking: Tracking, progress: Progress
    ) -> None:
        self._jobs, self._tracking, self._progress = dict(jobs), tracking, progress
        self._journals = {label: JournalReader(job.folder) for label, job in jobs.items()}
        self._costs = {label: _remaining_costs(job) for label, job in jobs.items()}
        self._numbers: dict[str, dict[str, float]] = {label: {} for label in jobs}
        self._runs: dict[str, TrackedRun] = {}
        self._copies = JournalCopies()
        self._started_ms = now_ms()

    def open_runs(self, kind: str, settings: Mapping[str, Settings]) -> dict[str, TrackedRun]:
        """Find or create the tracked run of each job, with a kind and all settings by label."""
        for label, job in self._jobs.items():
            run = open_training_run(self._tracking, job, kind, training_run_name(label, job))
            run.log_text(to_yaml(settings[label]), SETTINGS_NAME)
            self._copies.follow(label, run, job.folder)
            self._runs[label] = run
        return self._runs

    def poll(self) -> None:
        """Show new records, and copy them into MLflow in the background; call it often."""
        self._read()
        num_done = sum(journal.step for journal in self._journals.values())
        self._progress.advance(num_done, self._text(), seconds_left=self._seconds_left())
        self._copies.poll()

    def _read(self) -> None:
        for label, journal in self._journals.items():
            for record in journal.read():
                if record["kind"] == "metrics":
                    self._numbers[label] |= record["values"]
                elif record["time"] >= self._started_ms:
                    self._note(label, record)
                if record["time"] < self._started_ms or record.get("name") == "resumed":
                    self._numbers[label].pop(SPEED_METRIC, None)  # Of an earlier process.

    def _running(self) -> dict[str, dict[str, float]]:
        # The latest metrics of the jobs between their first and last step.
        return {
            label: numbers
            for label, numbers in self._numbers.items()
            if "train/loss" in numbers
            and self._journals[label].step < self._jobs[label].recipe.num_steps
        }

    def _text(self) -> str:
        running = self._running()
        if not running:
            has_started = any(journal.step for journal in self._journals.values())
            return "" if has_started else "waiting for the first step"
        losses = "; ".join(f"{label} {n['train/loss']:.2f}" for label, n in running.items())
        speed = sum(n.get(SPEED_METRIC, 0.0) for n in running.values())
        return f"loss {losses}" + (f", {speed:,.0f} tokens/s" if speed else "")

    def _seconds_left(self) -> float | None:
        # The longest job decides. Steps are weighted by FLOPs: corrections make them slower.
        times = []
        for label, numbers in self._running().items():
            costs, step = self._costs[label], self._journals[label].step
            speed = numbers.get(SPEED_METRIC)
            if speed and step:
                now = costs[step - 1] - costs[step]
                num_tokens = self._jobs[label].recipe.num_tokens_per_step
                times.append(costs[step] / now * num_tokens / speed)
        return max(times, default=None)

    def _note(self, label: str, event: Mapping[str, Any]) -> None:
        if event["name"] == "profiled":
            self._progress.note(f"{event['text']}: {self._jobs[label].folder / PROFILE_NAME}")
        elif event["name"] == "compiled":
            self._progress.note(f"{label}: compiled in {format_duration(event['seconds'])}")
        elif event["name"] in ("damaged", "not copied", "not profiled", "not compiled"):
            self._progress.note(event["text"])
        elif event["name"] == "skipped":
            self._progress.note(
                f"{label}: step {event['step']} was skipped: loss {event['loss']:g}, "
                f"gradient norm {event['gradient_norm']:g}"
            )

    def __enter__(self) -> RunMonitor:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Copy the rest into MLflow and end the runs, except those that another process trains."""
        self._read()
        ended = [
            (run, self._jobs[label])
            for label, run in self._runs.items()
            if error is None or not is_run_locked(self._jobs[label].folder)
        ]
        for number, (run, job) in enumerate(ended, start=1):
            reason = first_line(error) if error else ""
            is_last = number == len(ended)
            end_training_run(run, job, status_after(error), reason, wait=is_last)


def open_training_run(tracking: Tracking, job: TrainingJob, kind: str, name: str) -> TrackedRun:
    """Find or create the tracked run of a job; a new one starts when the job's journal does."""
    times = recorded_times(job.folder)
    run = tracking.run(
        job_key(job),
        name=name,
        kind=kind,
        params=job_parameters(job),
        tags={"iiet.method": job.model.method},
        started_ms=times[0] if times else None,
    )
    run.log_dataset(*describe_data(job.tokens_folder))
    return run


def end_training_run(
    run: TrackedRun, job: TrainingJob, status: str, reason: str = "", *, wait: bool
) -> None:
    """Copy the rest of a journal, log the trained model, and end the run when the journal ends.

    Args:
        reason: Shown if the run has failed.
        wait: As in `TrackedRun.finish`.
    """
    run.set_tags(reason_tags(status, reason if status == "FAILED" else ""))
    times = recorded_times(job.folder)
    model = job_model(job) if status == "FINISHED" else None
    if model:
        run.log_journal(job.folder)
        run.log_model(model)
    run.finish(status, journal=job.folder, ended_ms=times[1] if times else None, wait=wait)


def training_run_name(label: str, job: TrainingJob) -> str:
    """Return the name of a training's tracked run."""
    # The folder of a student is named by its key.
    teacher = job.teacher_folder or job.initial_folder
    return f"{label} of {Path(teacher).parent.name}" if teacher else job.folder.name


def _remaining_costs(job: TrainingJob) -> list[float]:
    # FLOPs per token summed over the remaining steps, by number of steps done.
    steps = reversed(range(job.recipe.num_steps))
    return [*accumulate(map(flops_per_token_by_step(job), steps), initial=0.0)][::-1]
