"""Follow running jobs through their journals for the progress bar, and show them in MLflow.

Training writes only journals, so neither the terminal nor the tracking server can slow or stop it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from orchestrator.data.mixture import describe_data
from orchestrator.records.tracked_run import Status, TrackedRun
from orchestrator.records.training import TrainingJob, job_parameters
from orchestrator.settings import SETTINGS_NAME, Settings, to_yaml
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_duration
from orchestrator.tracking import Tracking, reason_tags, status_after
from orchestrator.training.job import PROFILE_NAME, finished_outcome, job_key
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
        self._kind = ""
        self._settings: dict[str, str] = {}
        self._started_ms = now_ms()

    def open_runs(self, kind: str, settings: Mapping[str, Settings]) -> None:
        """Show the jobs in MLflow from now on, with a kind and all settings by label."""
        self._kind = kind
        self._settings = {label: to_yaml(each) for label, each in settings.items()}
        self._tracking.publish(*(self._run(label, "RUNNING") for label in self._jobs))

    def _run(self, label: str, status: Status, reason: str = "") -> TrackedRun:
        job, settings = self._jobs[label], self._settings[label]
        return training_run(job, self._kind, label, settings, status=status, reason=reason)

    def poll(self) -> None:
        """Show new records; call it often."""
        self._read()
        num_done = sum(journal.step for journal in self._journals.values())
        self._progress.advance(num_done, self._text(), seconds_left=self._seconds_left())

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
        """End the runs, except those that another process trains."""
        self._read()
        status, reason = status_after(error), first_line(error) if error else ""
        ended = [
            label
            for label, job in self._jobs.items()
            if self._settings and (error is None or not is_run_locked(job.folder))
        ]
        self._tracking.publish(*(self._run(label, status, reason) for label in ended))
        self._tracking.wait(briefly=error is not None)


def training_run(
    job: TrainingJob, kind: str, label: str, settings: str, *, status: Status, reason: str = ""
) -> TrackedRun:
    """Return what MLflow shows of a training: it starts and ends when its journal does.

    Args:
        label: Name of the job among others that are trained with it.
        settings: The `settings.yaml` of its run.
        status: Of a FINISHED one, the model is shown, too.
        reason: Shown if the run has failed.
    """
    outcome = finished_outcome(job) if status == "FINISHED" else None
    tags = {"iiet.method": job.model.method}
    if outcome and kind == "pretrain":
        tags["iiet.checkpoint"] = str(outcome.checkpoint)
        if job.continued_from:
            tags["iiet.continued_from"] = job.continued_from
    started_ms, ended_ms = recorded_times(job.folder) or (now_ms(), None)
    # The folder of a student is named by its key.
    teacher = job.teacher_folder or job.initial_folder
    return TrackedRun(
        key=job_key(job),
        kind=kind,
        name=f"{label} of {Path(teacher).parent.name}" if teacher else job.folder.name,
        folder=str(job.folder),
        journal=str(job.folder),
        params=job_parameters(job),
        tags={**tags, **reason_tags(status, reason if status == "FAILED" else "")},
        dataset=describe_data(job.tokens_folder),
        texts={SETTINGS_NAME: settings},
        model=job_model(job) if outcome else None,
        status=status,
        started_ms=started_ms,
        ended_ms=ended_ms,
    )


def _remaining_costs(job: TrainingJob) -> list[float]:
    # FLOPs per token summed over the remaining steps, by number of steps done.
    steps = reversed(range(job.recipe.num_steps))
    return [*accumulate(map(flops_per_token_by_step(job), steps), initial=0.0)][::-1]
