"""What other processes see of a training: its lock, what it has saved, its progress, and MLflow.

Training writes only journals, so neither the terminal nor the tracking server can slow or stop it.
One driver or trial at a time trains in a run folder, and holds its lock. The others wait, then use
the result, or take over if the process died: the system releases a dead process's lock. The workers
take another lock (`trainer.py`), because they outlive a killed driver by seconds. The folder must
be on a file system that supports locks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import harmonic_mean
from typing import TYPE_CHECKING, Any

from iiet.config import ModelConfig
from orchestrator.data.mixture import describe_data
from orchestrator.models.folder import JOB_KEY, decoder_config, load_provenance, weights_key
from orchestrator.models.labels import model_name
from orchestrator.records.tracked_run import (
    PRETRAIN_OF_SWEEP,
    Status,
    TrackedModel,
    TrackedRun,
    reason_tags,
    status_after,
)
from orchestrator.records.training import (
    TrainingJob,
    TrainingOutcome,
    job_parameters,
    method_parameters,
    model_family,
)
from orchestrator.records.training_state import Training
from orchestrator.records.trial import Trial
from orchestrator.settings import SETTINGS_NAME, Settings, to_yaml
from orchestrator.terminal.metrics import PERPLEXITY, QUALITY, VALIDATION_LOSS
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_duration, join_names
from orchestrator.terminal.stop import interruption_text, stop_requested, wait_interruptibly
from orchestrator.training.continuing import first_step
from orchestrator.training.job import finished_outcome, job_key
from orchestrator.training.schedules import flops_per_token_by_step, steps_before_corrections
from orchestrator.workspace.errors import Interrupted, UserError, first_line
from orchestrator.workspace.journal import (
    ACCURACY_METRIC,
    SPEED_METRIC,
    VALIDATION_METRIC,
    JournalReader,
    now_ms,
    recorded_times,
)
from orchestrator.workspace.layout import PROFILE_NAME, RUN_LOCK_NAME
from orchestrator.workspace.locks import is_locked, lock_file

if TYPE_CHECKING:
    from orchestrator.tracking.tracker import Tracking

Dataset = tuple[str, str]
"""Name and digest."""


# Who trains, and what is saved


def lock_run_folder(folder: Path, *, wait: bool = False) -> AbstractContextManager[bool]:
    """Hold a run folder's lock in a `with` block; it yields whether the lock was acquired.

    With `wait`, wait for another process that holds it, until a stop is requested.
    """
    seconds = None if wait else 0.0
    return lock_file(folder / RUN_LOCK_NAME, seconds=seconds, should_stop=stop_requested)


def is_run_locked(folder: Path) -> bool:
    """Return whether a process holds a run folder's lock."""
    return is_locked(folder / RUN_LOCK_NAME)


def jobs_to_train(
    jobs: Sequence[TrainingJob],
    outcomes: dict[str, TrainingOutcome],
    *,
    watch: Callable[[], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Generator[list[TrainingJob], None, None]:
    """Yield the unfinished jobs that this process must train, until all jobs are finished.

    Their folders are locked until the next iteration, or until the generator is closed (use
    `contextlib.closing`). While another process trains the remaining jobs, this waits.

    Args:
        jobs: What to train, each in its own folder; finished ones take no time.
        outcomes: Filled with the outcome of each finished job, by its run folder.
        watch: Called a few times a second while waiting, to show progress.
        note: Called once with a sentence if another process is waited for.

    Raises:
        Interrupted: If a yielded job is unfinished at the next iteration, or after Ctrl-C or
            SIGTERM while waiting.
    """

    def is_finished(job: TrainingJob) -> bool:
        if job.run_folder not in outcomes and (outcome := finished_outcome(job)):
            outcomes[job.run_folder] = outcome
        return job.run_folder in outcomes

    while remaining := [job for job in jobs if not is_finished(job)]:
        with ExitStack() as stack:
            locked = [job for job in remaining if stack.enter_context(lock_run_folder(job.folder))]
            # Ask again: the process that held the lock before may have finished the job.
            if unfinished := [job for job in locked if not is_finished(job)]:
                yield unfinished
                if not all(map(is_finished, unfinished)):
                    named = {job.folder.name: job for job in unfinished}
                    raise Interrupted(interruption_text(describe_saved_state(named)))
        if not locked:
            names = [job.folder.name for job in remaining]
            begin = partial(note, waiting_text(names)) if note else None
            folders = [job.folder for job in remaining]
            wait_interruptibly(
                partial(_is_one_unlocked, folders),
                begin=begin,
                watch=watch,
            )
            note = None


def _is_one_unlocked(folders: Sequence[Path]) -> bool:
    return not all(map(is_run_locked, folders))


def waiting_text(names: Sequence[str]) -> str:
    """Return the sentence that announces the wait for runs of another process."""
    return f"waiting for another process, which trains {join_names(names)}"


def describe_saved_state(jobs: Mapping[str, TrainingJob], *, named: bool = False) -> str:
    """Say what each run, by its name, has saved; a single run is named only if `named`.

    No checkpoint is verified: users wait for this text after Ctrl-C, and reading takes minutes.
    """
    texts = []
    for name, job in jobs.items():
        training = Training(job.folder)
        step = first_step(job, training.saved_step)
        if training.outcome:
            text = "the training is finished"
        elif step:
            text = f"saved at step {step}"
        else:
            text = "nothing was saved" if training.records else "not started yet"
        texts.append(f"{name}: {text}" if named or len(jobs) > 1 else text)
    return "; ".join(texts)


# Progress


MAX_SPEEDS = 10
"""Last records whose mean speed counts: a single one may lie in a pause."""
MIN_SPEEDS = 2
"""Records of each running job before the time left is said."""


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
        """Jobs with a record since the monitor started."""
        self._stepped: set[str] = set()
        """Begun jobs with a step since they started or resumed."""
        self._warm: set[str] = set()
        """Begun jobs whose first speed is known, which does not count: it includes what is done
        once."""
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

    def _run(self, label: str, status: Status, reason: str = "") -> TrackedRun:
        job = self._jobs[label]
        settings = self._settings[label]
        return training_run(job, self._kind, label, settings, status=status, reason=reason)

    def note_failure(self, job: TrainingJob, error: Exception) -> None:
        """Say at once why a job failed, if others train on; the command's end says it again."""
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
        # An earlier process may have made the counted steps, so they do not say that this one runs.
        parts = ["starting, no step yet"] if has_steps_left else [""]
        if losses:
            speed = f"{total_speed:,.0f} tokens/s" if total_speed else ""
            # A narrow terminal loses the losses first.
            all_parts = (f"loss {'; '.join(losses)}", speed, *dict.fromkeys(stages))
            parts = [part for part in all_parts if part]
        self._progress.advance(num_done, parts, seconds_left=self._seconds_left())

    def _stage_text(self, label: str, step: int) -> str:
        """Say that a model with corrections is still trained without; empty once it makes them."""
        job = self._jobs[label]
        num_steps = steps_before_corrections(job.recipe)
        if step >= num_steps or not job.model.corrections.max_corrections:
            return ""
        return f"r = 0 until step {num_steps:,}"

    def _seconds_left(self) -> float:
        """Return the time that all jobs still take; NaN while a running one has no known speed.

        Corrections make steps slower, so steps are weighted by FLOPs.
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
        # Jobs that wait start when others have ended; no job ends sooner than it would alone.
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
                    # The records before it are those of an earlier process.
                    self._stepped.discard(label)
                    self._warm.discard(label)
                    self._speeds[label].clear()

    def _note(self, label: str, event: Mapping[str, Any]) -> None:
        name = event["name"]
        if name == "profiled":
            self._progress.note(f"{event['text']}: {self._jobs[label].folder / PROFILE_NAME}")
        elif name == "compiled":
            self._progress.note(f"{label}: compiled in {format_duration(event['seconds'])}")
        elif name in ("damaged", "not copied", "not profiled", "not compiled", "smaller passes"):
            self._progress.note(event["text"])
        elif name == "skipped":
            self._progress.note(
                f"{label}: step {event['step']} was skipped: loss {event['loss']:g}, "
                f"gradient norm {event['gradient_norm']:g}"
            )

    def __enter__(self) -> RunMonitor:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the runs, except those that another process trains."""
        self._read()
        ended = [
            label
            for label, job in self._jobs.items()
            if self._settings and (error is None or not is_run_locked(job.folder))
        ]
        self._tracking.publish(*(self._ended_run(label, error) for label in ended))
        self._tracking.wait(briefly=error is not None)

    def _ended_run(self, label: str, error: BaseException | None) -> TrackedRun:
        """Return a run as it ended: finished, or by its own error, or by that of all."""
        own_error = self._errors.get(label, error)
        if own_error is None or Training(self._jobs[label].folder).outcome:
            return self._run(label, "FINISHED")
        return self._run(label, status_after(own_error), first_line(own_error))


def remaining_flops(job: TrainingJob) -> list[float]:
    """Return the FLOPs of the steps that remain, a teacher's included, by number of steps done."""
    teacher = decoder_config(Path(job.frozen_teacher)) if job.frozen_teacher else None
    flops_at = flops_per_token_by_step(job, teacher)
    num_tokens = job.recipe.num_tokens_per_step
    last_step_first = reversed(range(job.recipe.num_steps))
    flops_of_steps = (num_tokens * flops_at(step) for step in last_step_first)
    return [*accumulate(flops_of_steps, initial=0.0)][::-1]


# MLflow: one logged model for the same weights and schedule, so a teacher is one model, whichever
# runs trained and measured it. Each metric names the data that it was measured on.


def training_run(
    job: TrainingJob, kind: str, label: str, settings: str, *, status: Status, reason: str = ""
) -> TrackedRun:
    """Return what MLflow shows of a training: it starts and ends when its journal does.

    Args:
        label: Name of the job among others that are trained with it.
        settings: The `settings.yaml` of its run.
        status: With FINISHED, the model is shown, too.
        reason: Shown if the run has failed.
    """
    outcome = finished_outcome(job) if status == "FINISHED" else None
    tags = {"iiet.method": job.model.method}
    if outcome and kind != "distill":
        tags["iiet.checkpoint"] = str(outcome.checkpoint)
        if job.continued_from:
            tags["iiet.continued_from"] = job.continued_from
    started_ms, ended_ms = recorded_times(job.folder) or (now_ms(), None)
    teacher = None
    if job.objective != "pretrain":  # The folder of a student is named by its key.
        teacher = job.teacher_folder or job.initial_folder
    elif job.initial_folder and (source_key := _key_of_training(Path(job.initial_folder))):
        tags["iiet.source_key"] = source_key
    return TrackedRun(
        key=job_key(job),
        kind=kind,
        name=f"{label} of {model_name(Path(teacher))}" if teacher else job.folder.name,
        folder=str(job.folder),
        journal=str(job.folder),
        params=job_parameters(job),
        tags={**tags, **reason_tags(status, reason if status == "FAILED" else "")},
        dataset=describe_data(job.tokens_folder),
        texts={SETTINGS_NAME: settings},
        model=job_model(job) if outcome and kind != PRETRAIN_OF_SWEEP else None,
        status=status,
        started_ms=started_ms,
        ended_ms=ended_ms,
    )


def _key_of_training(checkpoint: Path) -> str | None:
    """Return the tag `iiet.key` of the run that trained a checkpoint; None if nobody knows."""
    with suppress(UserError):  # The checkpoint may be deleted since.
        return load_provenance(checkpoint).get(JOB_KEY)
    return None


def job_model(job: TrainingJob) -> TrackedModel | None:
    """Describe what a finished training made; None if it has not finished, or its folder is gone.

    It is linked with what was measured on the validation data at its last step.
    """
    outcome = finished_outcome(job)
    if outcome is None:
        return None
    datasets = dict.fromkeys((VALIDATION_METRIC, ACCURACY_METRIC), _dataset(job.tokens_folder))
    return tracked_model(outcome.checkpoint, job.model, datasets, seed=job.recipe.seed)


def trial_model(trial: Trial) -> TrackedModel | None:
    """Describe the model of a measured trial, with its costs and qualities; None if its folder is
    gone.

    Its name tells a student from a baseline, or the teacher, of the same schedule.
    """
    data = _dataset(trial.suite.tokens_folder)
    suite = trial.suite
    tasks = (", ".join(suite.tasks)[:100] or "held-out tasks", suite.key)
    datasets: dict[str, Dataset | None] = {}
    for name in trial.metrics():
        datasets[name] = None
        if name in (VALIDATION_LOSS, PERPLEXITY):
            datasets[name] = data
        elif name.startswith(QUALITY):
            datasets[name] = tasks
    seed = trial.job.recipe.seed if trial.job else trial.seed
    model = tracked_model(trial.checkpoint, trial.model, datasets, seed=seed)
    if model is None or trial.role == "trial" or trial.label.startswith(trial.method):
        return model
    names = (model.name, trial.label)
    return model.model_copy(update={"name": ", ".join(name for name in names if name)})


def tracked_model(
    checkpoint: str | None,
    config: ModelConfig,
    datasets: Mapping[str, Dataset | None],
    *,
    seed: int | None = None,
) -> TrackedModel | None:
    """Describe a checkpoint that was measured; None if there is none, or its folder is gone.

    Args:
        checkpoint: Its folder.
        config: The model, with the iteration schedule that was measured.
        datasets: What was measured -> the data that it was measured on.
        seed: Seed of its training, if known.
    """
    if checkpoint is None:
        return None
    try:
        weights = weights_key(Path(checkpoint))
    except UserError:
        return None
    params = {**method_parameters(config), "checkpoint": checkpoint}
    name = model_family(config)
    if "schedule" in params:
        name += f" {config.corrections}"
    if seed is not None:
        params["seed"] = str(seed)
    # A key has a number for each layer; texts for people may shorten equal ones.
    numbers = ",".join(map(str, config.corrections)) if "schedule" in params else ""
    key = f"{weights} {numbers}".strip()
    return TrackedModel(key=key, name=name, params=params, datasets=dict(datasets))


def _dataset(tokens_folder: str) -> Dataset | None:
    with suppress(UserError):  # The tokens of an old sweep may be gone.
        return describe_data(tokens_folder)[:2]
    return None
