"""Run a sweep: the unfinished trials of a plan under Ray Tune, then their time per token.

The sweep's folder holds its plan and settings. Finished trials are found by their keys and not run
again, so the same command resumes after any interruption. After each trial the sweep's MLflow run
gets the front so far. Milliseconds, also those of drafts, are measured last, the models taking
turns, because trials that run at the same time would disturb the clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from iiet.cost import inference_cost
from orchestrator.cluster.task import trial_device
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import EarlyStop, SweepPlan, Trial
from orchestrator.reporting.training_curves import history_folder
from orchestrator.settings import SETTINGS_NAME, Settings, to_yaml
from orchestrator.sweeping.asha import asha_trials, stored_early_stop
from orchestrator.sweeping.decoding import with_costs, with_decoding
from orchestrator.sweeping.live_sweep import FrontHistory, LiveSweep
from orchestrator.sweeping.trial_queue import TrialQueue
from orchestrator.sweeping.trials import full_config
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import Tracking, status_after
from orchestrator.training.job import check_job, finished_outcome
from orchestrator.training.teacher_cache import delete_answers, store_answers
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import write_text
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import PLAN_FILE, Workspace

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch

STOPPED_TAG = "iiet.stopped_early"


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


def run_sweep(
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
        UserError: If a training cannot run, such as if its workers cannot share a batch.
        Interrupted: After Ctrl-C; finished trials stay finished.
        RunFailed: If no trial at all could be finished.
    """
    progress = progress or Progress()
    placed = placed or settings
    waiting = [trial.job for trial in plan.trials if trial.job and not trial.result()]
    for job in [*waiting, *(search.jobs_left()[:1] if search else [])]:
        check_job(job, num_workers=placed.sweep.num_workers_per_trial)
    folder = workspace.sweeps / plan.name
    _note_other_plan(plan, folder, progress)
    write_text(folder / SETTINGS_NAME, to_yaml(settings))
    journal = Journal(folder)
    journal.event("started")
    journal.close()
    num_all = len(plan.trials) + (search.num_left if search else 0)
    history = history_folder(folder, plan.key)
    live = LiveSweep(plan, settings, tracking, history, num_trials=num_all)
    try:
        sweep = _SweepRun(plan, placed, workspace, live, history, num_all, progress, search)
        sweep.run_trials()
        sweep.delete_answers()
        stopped = sweep.track_early_stops()
        found = _finished_trials(sweep.plan, sweep.failures)
        costed = with_costs(found, sweep.plan, folder, settings, progress)
        results = with_decoding(costed, sweep.plan, folder, settings, progress)
    except BaseException as error:
        live.finish(status_after(error))
        raise
    live.finish("FINISHED")
    return SweepOutcome(
        plan=sweep.plan,
        folder=folder,
        results=tuple(results),
        failures=sweep.failures,
        stopped={label: stop.text for label, stop in stopped.items()},
        reused=frozenset(trial.key for trial in found) - sweep.made,
    )


@dataclass
class _SweepRun:
    """A sweep in progress: runs its trials and records how they ended."""

    plan: SweepPlan
    settings: Settings
    workspace: Workspace
    live: LiveSweep
    history_folder: Path
    num_all: int
    """Trials, those included that the search will suggest."""
    progress: Progress
    search: ScheduleSearch | None = None
    failures: dict[str, str] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    _jobs: list[TrainingJob] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.workspace.sweeps / self.plan.name

    def run_trials(self) -> None:
        """Run the plan's trials that are not finished, then those that the search suggests."""
        self.plan.write(self.folder / PLAN_FILE)
        self._history = FrontHistory(self.plan, self.history_folder, num_trials=self.num_all)
        self._take_in(self.plan.trials)
        asha, trials = asha_trials(self.plan, self.settings.sweep), self.plan.trials
        stops = {t.key: stop for t in trials if (stop := stored_early_stop(t, asha.get(t.key)))}
        for trial in trials:
            if trial.key in stops:
                self.live.log_end(trial, "KILLED", stops[trial.key].text)
        waiting = [t for t in trials if t.result() is None and t.key not in stops]
        queue = TrialQueue(
            self.folder,
            self.settings.sweep,
            self.progress,
            cluster=self.settings.cluster,
            num_all=self.num_all,
            asha=asha,
            stopped=set(stops),
            on_end=self._take_end,
            watch=self.live.watch,
        )
        try:
            queue.run(self._with_shared_teacher(waiting), self.search)
        finally:
            self.live.close()
            if self.search:
                self._add_suggested(self.search)
        self._take_in(self.plan.trials, at_end=True)
        self.failures, self.made = queue.failures, queue.made

    def _take_in(self, trials: Iterable[Trial], *, at_end: bool = False) -> None:
        """Log the trials that are finished now, and the front."""
        new = [result for trial in trials if (result := self._history.add(trial))]
        self.live.log_results(new)
        if self._history.record(at_end=at_end) and self._history.front:
            self.live.show_front(self._history.front, self._history.num_measured)

    def _take_end(self, trial: Trial, state: str, reason: str) -> None:
        """Log how a trial ended."""
        self._take_in([trial])
        if state in ("failed", "stopped", "stopped early") and trial.result() is None:
            self.live.log_end(trial, "FAILED" if state == "failed" else "KILLED", reason)

    def _add_suggested(self, search: ScheduleSearch) -> None:
        """Add what the search has suggested to the plan."""
        known = {trial.key for trial in self.plan.trials}
        new = [trial for trial in search.known_trials() if trial.key not in known]
        self.plan = self.plan.model_copy(update={"trials": (*self.plan.trials, *new)})
        self.plan.write(self.folder / PLAN_FILE)

    def _with_shared_teacher(self, waiting: Sequence[Trial]) -> list[Trial]:
        """Store the teacher's answers once for all students if the settings say so, and return the
        trials that read them."""
        if not self.settings.distillation.teacher_cache:
            return list(waiting)
        # A trial that is only measured needs no teacher.
        jobs = {t.key: t.job for t in waiting if t.job and finished_outcome(t.job) is None}
        unfinished = [*jobs.values(), *(self.search.jobs_left() if self.search else [])]
        shared, work = store_answers(
            unfinished,
            self.workspace.teachers,
            on_device=trial_device(self.settings, self.folder),
            progress=self.progress,
        )
        if num_tokens := work.num_stored_tokens:
            # A teacher that runs in each trial is in the trials' own FLOPs.
            forward = inference_cost(full_config(self.plan)).forward_flops_per_token
            numbers = {"teacher_tokens": num_tokens, "teacher_flops": num_tokens * forward}
            step = len(self.plan.trials)
            self.live.change(points=[(f"sweep/{n}", float(v), step) for n, v in numbers.items()])
        self._jobs = shared
        if self.search and len(shared) > len(jobs):
            self.search.teacher_cache = shared[-1].teacher_cache
        jobs = dict(zip(jobs, shared, strict=False))
        return [t.model_copy(update={"job": jobs[t.key]}) if t.key in jobs else t for t in waiting]

    def delete_answers(self) -> None:
        """Delete the teacher's stored answers, unless a failed student will need them again."""
        if not self.failures:
            delete_answers(self._jobs)

    def track_early_stops(self) -> dict[str, EarlyStop]:
        """Log the trials that were stopped early, and return label -> reason."""
        asha = asha_trials(self.plan, self.settings.sweep)
        stops = {
            trial.label: stop
            for trial in self.plan.trials
            if (stop := stored_early_stop(trial, asha.get(trial.key)))
        }
        if stops:
            saved = sum(stop.share_saved for stop in stops.values())
            text = "; ".join(f"{label} {stop.text}" for label, stop in stops.items())
            self.live.change(
                points=[("sweep/trainings_saved", saved, len(self.plan.trials))],
                tags={STOPPED_TAG: text},
            )
        return stops


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


def _finished_trials(plan: SweepPlan, failures: Mapping[str, str]) -> list[Trial]:
    found = [result for trial in plan.trials if (result := trial.result())]
    if not found:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in failures.items())
        raise RunFailed(f"no trial of the sweep {plan.name} could be finished: {reasons}")
    return found
