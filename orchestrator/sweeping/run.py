"""Run the unfinished trials of a sweep's plan with Ray Tune, then measure all times per token.

The sweep's folder holds its plan and settings. Finished trials are read once, at the start, and are
not run again; so the same command resumes after any interruption. Tune takes trials from a queue:
one that measures the weights of another waits for it, and the suggestions of a search follow the
plan's trials. A trial that another process runs stays in the queue until that process has ended or
died, so two sweeps at the same time share the work and make no trial twice. Whoever waits holds no
lock and no CPUs that others wait for, so two processes cannot wait for each other.

A trial's process stores its result; `SweepQueue.on_end` gets it, and the sweep's MLflow run shows
it with the front so far. Milliseconds are measured last, the models in turns, because trials that
run at the same time would disturb the clock.
"""

from __future__ import annotations

import os
import queue
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from iiet.cost import inference_cost
from orchestrator.cluster.ray import ray_cluster, wait_for_gpus
from orchestrator.cluster.task import trial_device
from orchestrator.planning.estimate import seconds_to_save
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import EarlyStop, SweepPlan, Trial
from orchestrator.settings import SETTINGS_NAME, Settings, to_yaml
from orchestrator.sweeping.decode import with_costs, with_drafts
from orchestrator.sweeping.live import LiveSweep
from orchestrator.sweeping.plan import asha_rule, competing_trials, early_stops, full_trial
from orchestrator.sweeping.trial import run_trial
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import note_saved_state, stop_requested
from orchestrator.tracking import Tracking, status_after
from orchestrator.training.job import check_job, finished_outcome
from orchestrator.training.teacher_cache import store_answers
from orchestrator.training.watching import (
    JournalReader,
    describe_saved_state,
    is_run_locked,
    waiting_text,
)
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.files import delete_folder, write_text
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import PLAN_FILE, STOPPED_NAME, Workspace, find_checkpoints

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch

STOPPED_TAG = "iiet.stopped_early"
TRAINING_SHARE = 0.9
"""Share of a trial's progress that is its training; the rest is its measurement."""
MAX_NAMED = 3
"""Most running trials that the progress bar names."""


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """How a sweep ended."""

    plan: SweepPlan
    """All trials, with those that a search found."""
    folder: Path
    """The sweep's folder."""
    results: tuple[Trial, ...]
    """Finished trials in the plan's order, the teacher and the baselines among them."""
    failures: dict[str, str]
    """Label -> reason of trials that failed for good."""
    stopped: dict[str, str]
    """Label -> reason of trials that were stopped early."""
    reused: frozenset[str]
    """Keys of the trials that this call found finished: from before, or by another sweep."""


def run_plan(
    plan: SweepPlan,
    settings: Settings,
    workspace: Workspace,
    *,
    placed: Settings | None = None,
    tracking: Tracking,
    progress: Progress | None = None,
    search: ScheduleSearch | None = None,
) -> SweepOutcome:
    """Run the unfinished trials of a plan, measure the time per token, and store the results.

    Args:
        plan: The trials.
        settings: Section `sweep` says how many run at once and how often one may fail.
        workspace: Where trials and the sweep are stored.
        placed: The settings with the GPUs of the trials, if they are not the same.
        tracking: Logs the sweep's run.
        progress: Progress display.
        search: Suggests further trials when these have ended.

    Raises:
        UserError: If a training cannot run, such as if its workers cannot share a batch; or there
            are too few CPUs or GPUs for one trial.
        Interrupted: After Ctrl-C; finished trials stay finished.
        RunFailed: If no trial at all could be finished, or one failed while it was stopping.
    """
    progress, placed = progress or Progress(), placed or settings
    sweep, cluster, folder = placed.sweep, placed.cluster, workspace.sweeps / plan.name
    found = {trial.key: result for trial in plan.trials if (result := trial.result())}
    stops = {key: s for key, s in early_stops(plan, sweep).items() if key not in found}
    waiting = [trial for trial in plan.trials if trial.key not in found and trial.key not in stops]
    jobs = [trial.job for trial in waiting if trial.job]
    for job in [*jobs, *(search.jobs_left()[:1] if search else [])]:
        check_job(job, num_workers=sweep.num_workers_per_trial)

    _note_other_plan(plan, folder, progress)
    write_text(folder / SETTINGS_NAME, to_yaml(settings))
    journal = Journal(folder)
    journal.event("started")
    journal.close()
    num_all = len(plan.trials) + (search.num_left if search else 0)
    live = LiveSweep(plan, settings, tracking, folder, num_trials=num_all)
    try:
        plan.write(folder / PLAN_FILE)
        live.on_results([*found.values()])
        for trial in plan.trials:
            if trial.key in stops:
                live.on_end(trial, "KILLED", stops[trial.key].text)
        cached: list[TrainingJob] = []
        if settings.distillation.teacher_cache:
            waiting, cached, points = _with_stored_answers(
                waiting, search, full_trial(plan), placed, workspace, progress
            )
            live.change(points=points)
        stopped = {trial.label: stops[trial.key] for trial in plan.trials if trial.key in stops}
        trials = SweepQueue(waiting, found, stopped, live, progress, search=search, num_all=num_all)
        progress.start("sweep", num_all)
        try:
            if not trials.is_over:
                say = partial(progress.advance, trials.num_ended)
                with ray_cluster(cluster, folder=folder, say=say):
                    # It imports Ray, which reads its environment then.
                    from orchestrator.cluster import tune

                    if cluster.wait_for_gpus:
                        wait_for_gpus(sweep.gpus_per_trial or 0, progress.note)
                    tune.run_trials(
                        partial(run_trial, wait=False),
                        trials,
                        # One folder a process: the same sweep may run twice at the same time.
                        folder / f"ray-{socket.gethostname()}-{os.getpid()}",
                        sweep,
                        cluster,
                        num_trials=trials.num_ready,
                        scheduler=tune.AshaByModel(asha_rule(sweep), competing_trials(plan, sweep)),
                    )
            if search:
                search.enter(trials.results)  # With what another process has made.
            trials.publish()
            progress.finish(trials.summary())
        except Interrupted:
            if not trials.failed_while_stopping:
                raise
            failed = trials.failed_while_stopping.items()
            error = RunFailed("; ".join(f"trial {name} failed: {why}" for name, why in failed))
            note_saved_state(error, trials.saved())
            raise error from None
        finally:
            trials.publish()
            live.close()
            if search:
                known = {trial.key for trial in plan.trials}
                new = [trial for trial in search.known_trials() if trial.key not in known]
                plan = plan.model_copy(update={"trials": (*plan.trials, *new)})
                plan.write(folder / PLAN_FILE)
        live.on_results([], at_end=True)
        if not trials.failures:  # A failed student will need them again.
            for stored in {job.teacher_cache for job in cached if job.teacher_cache}:
                with suppress(OSError):
                    delete_folder(Path(stored))
        if trials.stopped:
            saved = sum(stop.share_saved for stop in trials.stopped.values())
            text = "; ".join(f"{label} {stop.text}" for label, stop in trials.stopped.items())
            points = [("sweep/trainings_saved", saved, len(plan.trials))]
            live.change(points=points, tags={STOPPED_TAG: text})
        results = [trials.results[t.key] for t in plan.trials if t.key in trials.results]
        if not results:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in trials.failures.items())
            raise RunFailed(f"no trial of the sweep {plan.name} could be finished: {reasons}")
        results = with_costs(results, plan, folder, settings, progress)
        results = with_drafts(results, Path(plan.tokens_folder), folder, progress)
    except BaseException as error:
        live.finish(status_after(error))
        raise
    live.finish("FINISHED")
    return SweepOutcome(
        plan=plan,
        folder=folder,
        results=tuple(results),
        failures=trials.failures,
        stopped={label: stop.text for label, stop in trials.stopped.items()},
        reused=frozenset(trials.found),
    )


def _with_stored_answers(
    waiting: Sequence[Trial],
    search: ScheduleSearch | None,
    teacher: Trial,
    settings: Settings,
    workspace: Workspace,
    progress: Progress,
) -> tuple[list[Trial], list[TrainingJob], list[tuple[str, float, int]]]:
    """Store the teacher's answers once for all students; return the trials that read them, the jobs
    that do, and what MLflow shows of the work."""
    # A trial that is only measured needs no teacher.
    jobs = {t.key: t.job for t in waiting if t.job and finished_outcome(t.job) is None}
    shared, num_tokens = store_answers(
        [*jobs.values(), *(search.jobs_left() if search else [])],
        workspace.teachers,
        on_device=trial_device(settings, workspace.root),
        progress=progress,
    )
    points: list[tuple[str, float, int]] = []
    if num_tokens:
        # A teacher that runs in each trial is in the trials' own FLOPs.
        flops = num_tokens * inference_cost(teacher.model).forward_flops_per_token
        points = [("sweep/teacher_tokens", float(num_tokens), len(waiting))]
        points.append(("sweep/teacher_flops", flops, len(waiting)))
    if search and len(shared) > len(jobs):
        search.teacher_cache = shared[-1].teacher_cache
    jobs = dict(zip(jobs, shared, strict=False))
    changed = [t.model_copy(update={"job": jobs[t.key]}) if t.key in jobs else t for t in waiting]
    return changed, shared, points


def _note_other_plan(plan: SweepPlan, folder: Path, progress: Progress) -> None:
    """Note that a sweep of this name had other trials before, or that its plan is damaged."""
    try:
        earlier = SweepPlan.read(folder / PLAN_FILE, remedy="it is written anew")
    except UserError as error:
        progress.note(str(error))
        return
    if earlier and earlier.key != plan.key:
        progress.note(
            f"the sweep {plan.name} had another plan before; its front is replaced by this one's, "
            "its trials stay"
        )


class SweepQueue:
    """The trials of a sweep that are not finished: Tune takes them in its own thread, and hears how
    they ended; the main thread shows it."""

    def __init__(
        self,
        waiting: Sequence[Trial],
        found: Mapping[str, Trial],
        stopped: Mapping[str, EarlyStop],
        live: LiveSweep,
        progress: Progress,
        *,
        search: ScheduleSearch | None = None,
        num_all: int,
    ) -> None:
        """Queue the trials that wait.

        Args:
            found: Key -> result of the trials that were finished before.
            stopped: Label -> reason of those that were stopped early before.
            num_all: Trials of the sweep, with all of these and what the search will suggest.
        """
        self.results, self.failures, self.search = dict(found), dict[str, str](), search
        self.progress, self.num_all = progress, num_all
        self.found, self.stopped = set(found), dict(stopped)
        """Keys of the results that were not made here; label -> reason of what was stopped."""
        self.failed_while_stopping: dict[str, str] = {}
        self._live, self._num_before = live, len(found)
        self._known = {*found, *(trial.key for trial in waiting)}
        # The teacher comes first, because it spans the box of hypervolumes. Then the costly ones,
        # so that none runs alone at the end.
        self._waiting = sorted(waiting, key=lambda t: (t.role != "teacher", -_expected_work(t)))
        self._taken: dict[str, Trial] = {}
        self._running: set[str] = set()
        self._elsewhere: set[str] = set()
        self._interrupted: list[Trial] = []
        self._journals: dict[str, JournalReader] = {}
        self._ended: queue.SimpleQueue[tuple[Trial, Trial | None, str]] = queue.SimpleQueue()
        self._has_told = False

    # Called in Tune's thread.

    @property
    def num_ready(self) -> int:
        """Number of trials that can start now, those of a search among them."""
        ready = sum(not self._lacks_weights(trial) for trial in self._waiting)
        return ready + (self.search.num_left if self.search else 0)

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended."""
        return not (self._waiting or self._taken or (self.search and self.search.num_left))

    @property
    def num_taken(self) -> int:
        """Number of trials that were taken and have not ended."""
        return len(self._taken)

    def take(self) -> Trial | None:
        """Return a trial that can start; None if there is none at the moment."""
        for trial in list(self._waiting):
            if self._lacks_weights(trial):
                continue
            if is_run_locked(Path(trial.folder)):
                self._elsewhere.add(trial.key)
                continue
            self._waiting.remove(trial)
            if trial.job is None and trial.is_elastic and not Path(str(trial.checkpoint)).is_dir():
                self._end(trial, error="its weights are not trained")
            elif trial.key in self._elsewhere and (result := trial.result()):
                self.found.add(trial.key)
                self._end(trial, result)
            else:
                self._taken[trial.key] = trial
                return trial
        if self._waiting or not self.search:
            return None
        if not self.search.is_open:
            if self._taken:
                return None  # The search learns from all of these.
            self.search.open(self.results)
        if suggested := self.search.suggest():
            self._known.add(suggested.key)
            self._taken[suggested.key] = suggested
            return suggested
        # Another process may have suggested others, and may run them.
        more = [trial for trial in self.search.known_trials() if trial.key not in self._known]
        self._known |= {trial.key for trial in more}
        self._waiting += more
        return self.take() if more else None

    def on_start(self, key: str) -> None:
        """Note that a trial has started."""
        self._running.add(key)

    def on_end(self, key: str, result: Trial | None, error: str) -> None:
        """Note how a trial ended; one that another process runs waits again."""
        trial = self._taken.pop(key)
        self._running.discard(key)
        if not result and stop_requested():
            self._interrupted.append(trial)
        if result or error or stop_requested():
            self._end(trial, result, error)
        elif stop := EarlyStop.read(Path(trial.folder) / STOPPED_NAME):
            self.stopped[trial.label] = stop
            self._end(trial)
        else:
            self._elsewhere.add(key)
            self._waiting.append(trial)

    def _end(self, trial: Trial, result: Trial | None = None, error: str = "") -> None:
        if result:
            self.results[trial.key] = result
        elif error:
            self.failures[trial.label] = error
            if stop_requested():
                self.failed_while_stopping[trial.label] = error
        if self.search:
            self.search.tell(trial, result)
        self._ended.put((trial, result, error))

    def _lacks_weights(self, trial: Trial) -> bool:
        """Return whether a trial measures weights that an unfinished trial trains."""
        if trial.job or not trial.checkpoint:
            return False
        others = [*self._waiting, *self._taken.values()]
        return str(Path(trial.checkpoint).parent) in {o.folder for o in others if o.job}

    # Called in the main thread.

    @property
    def num_ended(self) -> int:
        """Number of trials that have ended in any way."""
        return len(self.results) + len(self.failures) + len(self.stopped)

    def publish(self) -> None:
        """Show how trials have ended since the last call."""
        while not self._ended.empty():
            trial, result, error = self._ended.get()
            if result:
                self._journals.pop(trial.key, None)
                self._live.on_results([result])
                continue
            stop = self.stopped.get(trial.label)
            if reason := f"failed: {error}" if error else stop.text if stop else "":
                self.progress.note(f"trial {trial.label} {reason}")
            self._live.on_end(trial, "FAILED" if error else "KILLED", error or reason)

    def watch(self) -> None:
        """Show what runs and what has ended."""
        self.publish()
        running = [trial for trial in list(self._taken.values()) if trial.key in self._running]
        others = [trial for trial in list(self._waiting) if trial.key in self._elsewhere]
        if others and not self._taken:
            if not self._has_told:
                self.progress.note(waiting_text([trial.label for trial in others]))
                self._has_told = True
            running = others
        shares = {}
        for trial in running:
            if trial.job:
                journal = self._journals.setdefault(trial.key, JournalReader(Path(trial.folder)))
                journal.read()
                shares[trial.label] = TRAINING_SHARE * journal.step / trial.job.recipe.num_steps
        begun = [label for label, share in shares.items() if share]
        self.progress.advance(self.num_ended + sum(shares.values()), "; ".join(begun[:MAX_NAMED]))
        self._live.watch(running)

    def saved(self) -> str:
        """Say how many trials are finished, and what the others have saved."""
        begun = {}
        for trial in [*self._taken.values(), *self._interrupted]:
            # A long training may have a checkpoint before its first recorded step.
            journal = self._journals.get(trial.key)
            if trial.job and ((journal and journal.step) or find_checkpoints(Path(trial.folder))):
                begun[f"trial {trial.label}"] = trial.job
        text = f"{len(self.results)} of {self.num_all} trials are finished"
        return f"{text}; {describe_saved_state(begun, named=True)}" if begun else text

    def seconds_to_save(self) -> float:
        """Return the longest time until all running trials are saved."""
        running = [trial for trial in self._taken.values() if trial.key in self._running]
        jobs = [trial.job for trial in running if trial.job]
        return seconds_to_save(jobs, self.progress.note) if running else 0.0

    def summary(self) -> str:
        """Say in one line how the sweep ended."""
        counts = {
            "of them found finished": self._num_before,
            "made by another process meanwhile": len(self.found) - self._num_before,
            "stopped early": len(self.stopped),
            "failed": len(self.failures),
        }
        parts = [f", {count} {what}" for what, count in counts.items() if count]
        return f"{self.num_all} trials{''.join(parts)}"


def _expected_work(trial: Trial) -> float:
    evaluations = inference_cost(trial.model).evaluations_per_token
    return evaluations * (3.0 if trial.job else 1.0)
