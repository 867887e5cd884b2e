"""Run the unfinished trials of a sweep's plan with Ray Tune, then measure all times per token.

Finished trials are read once, at the start, so the same command resumes after any interruption.
Tune takes trials from a queue: one that measures the weights of another waits for it, and the
suggestions of a search follow the plan's trials. One process at a time runs a sweep: its caller
holds the lock of its folder. MLflow shows each trial, and the front so far (`LiveSweep`).
Milliseconds are measured last: trials would disturb the clock.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from iiet.cost import inference_cost
from orchestrator.cluster.ray import ray_cluster
from orchestrator.data.mixture import describe_data
from orchestrator.planning.estimate import note_saving
from orchestrator.records.status import FAILED_EVENT, STARTED_EVENT
from orchestrator.records.tracked_run import PRETRAIN_OF_SWEEP, Status, status_after
from orchestrator.records.trial import EarlyStop, SweepPlan, Trial
from orchestrator.reporting.front import find_front, parse_axes, reason_against_accuracy
from orchestrator.reporting.mlflow_report import SWEEP_TAG, front_so_far, sweep_run, trial_run
from orchestrator.reporting.results import result_table
from orchestrator.settings import SETTINGS_NAME, Settings, to_yaml
from orchestrator.sweeping.costs import with_costs
from orchestrator.sweeping.plan import (
    asha_rule,
    competing_trials,
    early_stops,
    exact_cost,
    full_trial,
    sweep_parameters,
)
from orchestrator.sweeping.trial import run_trial
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import note_saved_state, stop_requested
from orchestrator.tracking.tracker import Tracking
from orchestrator.training.job import check_job
from orchestrator.training.watching import (
    JournalReader,
    describe_saved_state,
)
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.files import read_json, write_text
from orchestrator.workspace.journal import Journal, now_ms
from orchestrator.workspace.layout import (
    JOB_NAME,
    PLAN_FILE,
    RAY_FOLDER,
    STOPPED_NAME,
    Workspace,
    find_checkpoints,
)

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch

STOPPED_TAG = "iiet.stopped_early"
TRAINING_SHARE = 0.9
"""Share of a trial's progress that is its training; the rest is its measurement."""
MAX_NAMED = 3
"""Most running trials that the progress bar names."""
SECONDS_BETWEEN_FRONTS = 30.0
"""A picture takes up to a second of the process that waits for the trials."""
LIVE_FOLDER = "live"
"""Folder in the sweep's with the picture of the front so far."""


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """How a sweep ended."""

    plan: SweepPlan
    """All trials, with those that a search found."""
    results: tuple[Trial, ...]
    """Finished trials in the plan's order, the teacher and the baselines among them."""
    failures: dict[str, str]
    """Label -> reason of trials that failed for good."""
    stopped: dict[str, str]
    """Label -> reason of trials that were stopped early."""
    reused: frozenset[str]
    """Keys of the trials that this call found finished."""


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
        placed: The settings with the GPUs of the trials, if they are not the same.
        search: Suggests further trials when these have ended.

    Raises:
        UserError: If a training cannot run, such as if its workers cannot share a batch; or there
            are too few CPUs or GPUs for one trial.
        Interrupted: After Ctrl-C; finished trials stay finished.
        RunFailed: If no trial at all could be finished, or one failed while it was stopping.
    """
    progress, placed = progress or Progress(), placed or settings
    sweep, folder = placed.sweep, workspace.sweeps / plan.name
    found = {trial.key: result for trial in plan.trials if (result := trial.result())}
    stops = early_stops(plan, sweep)
    waiting = [trial for trial in plan.trials if trial.key not in found and trial.key not in stops]
    jobs = [trial.job for trial in waiting if trial.job]
    for job in [*jobs, *(search.jobs_left()[:1] if search else [])]:
        check_job(job, num_workers=sweep.num_workers_per_trial)

    write_text(folder / SETTINGS_NAME, to_yaml(settings))
    journal = Journal(folder)
    journal.event(STARTED_EVENT)
    journal.close()
    num_all = len(plan.trials) + (search.num_left if search else 0)
    with LiveSweep(plan, settings, tracking, workspace, num_trials=num_all) as live:
        plan.write(folder / PLAN_FILE)
        live.on_results(*found.values())
        stopped = {trial.label: stops[trial.key] for trial in plan.trials if trial.key in stops}
        for trial in plan.trials:
            if trial.key in stops:
                live.on_end(trial, "KILLED", stops[trial.key].text)
        trials = SweepQueue(waiting, found, stopped, live, progress, search=search)
        try:
            _run_queue(trials, plan, placed, folder)
        finally:
            trials.publish()
            live.close()
            if search:
                known = {trial.key for trial in plan.trials}
                new = [trial for trial in search.suggested_trials() if trial.key not in known]
                plan = plan.model_copy(update={"trials": (*plan.trials, *new)})
                plan.write(folder / PLAN_FILE)
        if trials.failures:
            journal = Journal(folder)
            journal.event(FAILED_EVENT, trials=[*trials.failures])
            journal.close()
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
    return SweepOutcome(
        plan=plan,
        results=tuple(results),
        failures=trials.failures,
        stopped={label: stop.text for label, stop in trials.stopped.items()},
        reused=frozenset(found),
    )


def _run_queue(trials: SweepQueue, plan: SweepPlan, placed: Settings, folder: Path) -> None:
    """Run the trials of a queue with Ray Tune until all have ended.

    Raises:
        Interrupted, RunFailed: As `run_plan`.
    """
    sweep, cluster, progress = placed.sweep, placed.cluster, trials.progress
    progress.start("sweep", trials.num_all)
    try:
        if not trials.is_over:
            say = partial(progress.advance, trials.num_ended)
            with ray_cluster(cluster, folder=folder, say=say):
                from orchestrator.cluster import tune  # Ray reads its environment when imported.

                tune.run_trials(
                    run_trial,
                    trials,
                    folder / RAY_FOLDER,
                    sweep,
                    cluster,
                    num_trials=trials.num_ready,
                    scheduler=tune.AshaByModel(asha_rule(sweep), competing_trials(plan, sweep)),
                )
        if trials.search:
            trials.search.enter(trials.results)  # With those that an earlier call had suggested.
        trials.publish()
        progress.finish(trials.summary())
    except Interrupted:
        if not trials.failed_while_stopping:
            raise
        failed = trials.failed_while_stopping.items()
        error = RunFailed("; ".join(f"trial {name} failed: {why}" for name, why in failed))
        note_saved_state(error, trials.saved())
        raise error from None


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
    ) -> None:
        """Queue the trials that wait, beside results by key and early stops by label from before.

        Their number, with those that the search will suggest, is that of the live sweep.
        """
        self.results, self.failures, self.search = dict(found), dict[str, str](), search
        self.progress, self.num_all = progress, live.num_trials
        self.stopped = dict(stopped)
        """Label -> reason of what was stopped."""
        self.failed_while_stopping: dict[str, str] = {}
        self._live, self._num_before = live, len(found)

        def order(trial: Trial) -> tuple[bool, float]:
            # The teacher comes first, because fronts are drawn beside it. Then the costly ones, so
            # that none runs alone at the end; a training is three evaluations.
            work = inference_cost(trial.model).evaluations_per_token * (3.0 if trial.job else 1.0)
            return trial.role != "teacher", -work

        self._waiting = sorted(waiting, key=order)
        self._taken: dict[str, Trial] = {}
        self._running: set[str] = set()
        self._interrupted: list[Trial] = []
        self._journals: dict[str, JournalReader] = {}
        self._ended: queue.SimpleQueue[tuple[Trial, Trial | None, str]] = queue.SimpleQueue()

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
            self._waiting.remove(trial)
            if trial.job is None and trial.is_elastic and not Path(str(trial.checkpoint)).is_dir():
                self._end(trial, error="its weights are not trained")
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
            self._taken[suggested.key] = suggested
        return suggested

    def on_start(self, key: str) -> None:
        """Note that a trial has started."""
        self._running.add(key)

    def on_end(self, key: str, result: Trial | None, error: str) -> None:
        """Note how a trial ended; one whose process was asked to stop by others waits again."""
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

    def start_again(self, reason: str) -> None:
        """Put the trials back that were taken and have not ended, and say why."""
        self._waiting = [*self._taken.values(), *self._waiting]
        self._taken.clear()
        self._running.clear()
        self.progress.note(reason)

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
                self._live.on_results(result)
                continue
            stop = self.stopped.get(trial.label)
            if reason := f"failed: {error}" if error else stop.text if stop else "":
                self.progress.note(f"trial {trial.label} {reason}")
            self._live.on_end(trial, "FAILED" if error else "KILLED", error or reason)

    def watch(self) -> None:
        """Show what runs and what has ended."""
        self.publish()
        running = [trial for trial in list(self._taken.values()) if trial.key in self._running]
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

    def begin_saving(self) -> bool:
        """Say what the running trials save, and return whether there are any."""
        running = [trial for trial in self._taken.values() if trial.key in self._running]
        note_saving([trial.job for trial in running if trial.job], self.progress.note)
        return bool(running)

    def summary(self) -> str:
        """Say in one line how the sweep ended."""
        counts = {
            "of them found finished": self._num_before,
            "stopped early": len(self.stopped),
            "failed": len(self.failures),
        }
        parts = [f", {count} {what}" for what, count in counts.items() if count]
        return f"{self.num_all} trials{''.join(parts)}"


# What MLflow shows while a sweep runs


class LiveSweep:
    """The runs of a sweep and of its trials from their start to their end, and the front so far.

    The process that waits for the trials says what changes; MLflow's background thread shows it.
    """

    def __init__(
        self,
        plan: SweepPlan,
        settings: Settings,
        tracking: Tracking,
        workspace: Workspace,
        *,
        num_trials: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show the sweep as running from now on; what its run showed before stays.

        Its `num_trials` include those that a search will suggest.
        """
        self.num_trials = num_trials
        self._name = plan.name
        self._tracking = tracking
        self._workspace = workspace
        self._folder = workspace.sweeps / plan.name
        self._full = full_trial(plan)
        self._open: dict[str, Trial] = {}
        self._measured: dict[str, Trial] = {}
        self._failures: dict[str, str] = {}
        self._has_new_results = False
        self._clock = clock
        self._next_front = clock()
        stored = tracking.stored("sweep", plan.key)
        self._run = sweep_run(stored, plan.name, plan.key, self._folder)
        self.change(
            status="RUNNING",
            params=sweep_parameters(plan, settings),
            tags={SWEEP_TAG: plan.name},
            dataset=describe_data(plan.tokens_folder),
            texts={SETTINGS_NAME: to_yaml(settings)},
        )

    def change(self, **changes: Any) -> None:
        """Show changes of the sweep's own run, as `TrackedRun.changed` takes them."""
        self._run = self._run.changed(**changes)
        self._tracking.publish(self._run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """End the sweep's run; after a failure, wait only a moment for the store."""
        self.change(status=status_after(error), ended_ms=now_ms())
        self._tracking.wait(briefly=error is not None)

    def watch(self, running: Iterable[Trial]) -> None:
        """Show the trials that have started; call it a few times a second with those that run."""
        new = [trial for trial in running if trial.key not in self._open]
        self._open |= {trial.key: trial for trial in new}
        self._show(new, "RUNNING")
        if self._has_new_results and self._clock() >= self._next_front:
            self._show_front()

    def _show_front(self) -> None:
        """Show the front so far, once the full model is measured."""
        self._has_new_results = False
        trials = [*self._measured.values()]
        reason = reason_against_accuracy(self._workspace, trials)
        front = find_front(result_table(trials), parse_axes(against_accuracy=reason))
        if self._full.key not in self._measured or not front.members:
            return
        notes = [f"{len(self._measured)} of {self.num_trials} models are measured so far."]
        notes += [f"{label} failed: {why}" for label, why in self._failures.items()]
        notes += [reason] if reason else []
        picture_folder = self._folder / LIVE_FOLDER
        self.change(**front_so_far(front, name=self._name, notes=notes, folder=picture_folder))
        self._next_front = self._clock() + SECONDS_BETWEEN_FRONTS

    def on_results(self, *results: Trial) -> None:
        """End the runs of measured trials, and show the front soon."""
        for result in results:
            self._open.pop(result.key, None)
            self._measured[result.key] = self._with_cost(result)
        self._show(results, "FINISHED")
        self._has_new_results |= bool(results)

    def on_end(self, trial: Trial, status: Status, reason: str = "") -> None:
        """End the run of a trial without a result, as FAILED or KILLED."""
        self._open.pop(trial.key, None)
        if status == "FAILED":
            self._failures[trial.label] = reason
        self._show([trial], status, reason)

    def close(self) -> None:
        """End the runs of the trials that were running."""
        for trial in list(self._open.values()):
            self.on_end(trial, "KILLED")

    def _show(self, trials: Sequence[Trial], status: Status, reason: str = "") -> None:
        runs = []
        for trial in trials:
            # A teacher or a baseline that was trained before has its own training's journal.
            journal = Path(trial.folder) if trial.job else None
            if not trial.job and trial.checkpoint and trial.role != "trial":
                journal = Path(trial.checkpoint).parent
            ended: dict[str, Any] = {"status": status, "reason": reason}
            costed = self._with_cost(trial)
            runs.append(trial_run(self._name, self._run.key, costed, journal, **ended))
            if status == "FINISHED" and journal and not trial.job:
                # The run that showed it while it was trained for this sweep.
                with suppress(UserError):
                    own = read_json(journal / JOB_NAME) or {}
                    self._tracking.withdraw(PRETRAIN_OF_SWEEP, str(own.get("key")))
        self._tracking.publish(*runs)

    def _with_cost(self, trial: Trial) -> Trial:
        """Return a trial with its exact cost."""
        return trial.with_numbers("cost", exact_cost(trial.model, self._full.model))
