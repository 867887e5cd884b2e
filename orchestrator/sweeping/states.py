"""The state of each trial of a sweep, in a plan and while the sweep runs.

A plan reads the states from the folders of the trials. A running sweep begins with these states and
holds them in one object, `RunningSweep`. Ray Tune runs in its own thread, which takes trials and
reports how they ended; only that thread changes states. The main thread waits for signals and shows
changes (`view.py`). The threads do not communicate by files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from iiet.cost import inference_cost
from orchestrator.planning.estimate import Estimate, note_saving
from orchestrator.records.training import TrainingJob
from orchestrator.records.training_state import Training
from orchestrator.records.trial import AshaRule, EarlyStop, SweepTrials, Trial
from orchestrator.settings import SweepSettings
from orchestrator.terminal.stop import stop_requested
from orchestrator.training.job import finished_outcome
from orchestrator.training.run_locks import describe_saved_state
from orchestrator.workspace.layout import STOPPED_NAME

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch

TrialStatus = Literal[
    "to train",
    "to measure",
    "taken",
    "running",
    "finished",
    "stopped early",
    "failed",
    "interrupted",
]
"""Trials `to train` and `to measure` wait. For a `taken` one, Tune looks for a slot. An
`interrupted` one has saved its state after a request to stop."""
WAITING: tuple[TrialStatus, ...] = ("to train", "to measure")
TAKEN: tuple[TrialStatus, ...] = ("taken", "running")


@dataclass
class TrialState:
    """The state of one trial."""

    trial: Trial
    status: TrialStatus
    result: Trial | None = None
    """The trial with its results, once it is finished."""
    early_stop: EarlyStop | None = None
    """Why ASHA stopped the trial, or asked it to stop."""
    error: str = ""
    """Why the trial failed."""
    was_stopping: bool = False
    """Whether the trial ended after a request to stop."""

    @cached_property
    def training(self) -> Estimate | None:
        """The rest of the trial's training; None if nothing is left."""
        if self.status != "to train" or self.trial.job is None:
            return None
        return Estimate.of(self.trial.job)

    @property
    def steps_done(self) -> int:
        """Training step from which the trial resumes."""
        return self.training.steps_done if self.training else 0

    def wait_again(self) -> None:
        """Put the trial back; it will resume from its folder."""
        self.status = "to train" if self.trial.job else "to measure"
        self.early_stop = None


def trial_states(plan: SweepTrials, sweep: SweepSettings) -> list[TrialState]:
    """Read the state of each trial of a plan from its folder."""
    stops = early_stops(plan, sweep)
    states = []
    for trial in plan.trials:
        if result := trial.result():
            state = TrialState(trial, "finished", result=result)
        elif stop := stops.get(trial.key):
            state = TrialState(trial, "stopped early", early_stop=stop)
        elif trial.job is None or finished_outcome(trial.job):
            state = TrialState(trial, "to measure")
        else:
            state = TrialState(trial, "to train")
        states.append(state)
    return states


# Learning rates that compete


def competing_trials(plan: SweepTrials, sweep: SweepSettings) -> list[list[Trial]]:
    """Return, for each model with several learning rates, its trials; none without ASHA."""
    if plan.kind != "iterations" or not sweep.asha:
        return []
    models: dict[str, list[Trial]] = {}
    for trial in plan.trials:
        if trial.job:
            # Trials compete if their jobs differ only in the learning rate.
            recipe = trial.job.recipe.model_copy(update={"learning_rate": None})
            changes = {"recipe": recipe, "run_folder": ""}
            model = trial.job.model_copy(update=changes).model_dump_json(warnings=False)
            models.setdefault(model, []).append(trial)
    return [trials for trials in models.values() if len(trials) > 1]


def early_stops(plan: SweepTrials, sweep: SweepSettings) -> dict[str, EarlyStop]:
    """Return key -> reason of unfinished trials that an earlier call stopped early.

    They count only under the same ASHA rule, and if the better trial is in the plan.
    """
    rule = AshaRule.of(sweep)
    stops: dict[str, EarlyStop] = {}
    for trials in competing_trials(plan, sweep):
        for trial in trials:
            rivals = {rival.label for rival in trials if rival is not trial}
            stop = EarlyStop.read(Path(trial.folder) / STOPPED_NAME)
            is_ours = stop is not None and stop.rule == rule and stop.competitor in rivals
            if stop and is_ours and not trial.result_path.exists():
                stops[trial.key] = stop
    return stops


# A sweep that runs


class RunningSweep:
    """The trials of a running or ended sweep, and their states.

    Only Tune's thread calls methods that change a state.
    """

    def __init__(
        self,
        plan: SweepTrials,
        states: Iterable[TrialState],
        search: ScheduleSearch | None = None,
    ) -> None:
        """Begin with the states of a plan's trials.

        Args:
            plan: All known trials.
            states: Their states, from `trial_states`.
            search: Suggests further trials when these have ended.
        """
        self.plan = plan
        self.search = search
        ordered = sorted(states, key=lambda state: _urgency(state.trial))
        self.states = {state.trial.key: state for state in ordered}
        """By key, in the order in which trials start."""
        self.reused = frozenset(state.trial.key for state in self.with_status("finished"))
        """Keys of the trials that were finished before."""
        self.num_all = len(plan.trials) + (search.num_left if search else 0)
        """Number of trials, including those that the search will suggest."""
        self.notes: list[str] = []
        """Notes on the sweep as a whole."""
        self.results: tuple[Trial, ...] = ()
        """Finished trials with their costs, in the plan's order, including teacher and baselines;
        empty until the sweep is over."""

    # Called in Tune's thread.

    def take(self) -> Trial | None:
        """Return a trial that can start; None if there is none at the moment."""
        for state in self.with_status(*WAITING):
            trial = state.trial
            if self._waits_for_weights(trial):
                continue
            if trial.is_elastic and not trial.job and not Path(str(trial.checkpoint)).is_dir():
                # The trial that trains these weights has failed.
                self._end(state, "failed", error="its weights are not trained")
                continue
            state.status = "taken"
            return trial
        # A search first learns from the whole family.
        if self.search is None or self.num_of(*WAITING):
            return None
        if not self.search.is_open:
            if self.num_taken:
                return None
            self.search.open(self.results_by_key)
        suggested = self.search.suggest()
        if suggested:
            self.states[suggested.key] = TrialState(suggested, "taken")
        return suggested

    def on_start(self, key: str) -> None:
        """Note that a trial has started."""
        self.states[key].status = "running"

    def on_early_stop(self, key: str, stop: EarlyStop) -> None:
        """Note that ASHA stops a trial, and store why, so that later calls do not resume it."""
        state = self.states[key]
        state.early_stop = stop
        # The trial still holds its folder's lock, so no other process has resumed it.
        stop.write(Path(state.trial.folder) / STOPPED_NAME)

    def on_end(self, key: str, result: Trial | None, error: str) -> None:
        """Note how a trial ended; a trial that something else interrupted waits again."""
        state = self.states[key]
        state.was_stopping = stop_requested()
        if result:
            state.result = result
            self._end(state, "finished")
        elif error:
            self._end(state, "failed", error=error)
        elif state.early_stop:
            self._end(state, "stopped early")
        elif state.was_stopping:
            self._end(state, "interrupted")
        else:
            state.wait_again()

    def start_again(self, reason: str) -> None:
        """Put taken trials that have not ended back, and note why."""
        for state in self.with_status(*TAKEN):
            state.wait_again()
        self.notes.append(reason)

    def _end(self, state: TrialState, status: TrialStatus, error: str = "") -> None:
        state.error = error
        state.status = status
        if self.search:
            self.search.tell(state.trial, state.result)

    def _waits_for_weights(self, trial: Trial) -> bool:
        """Return whether a trial needs weights that an unfinished trial trains."""
        if trial.job or not trial.checkpoint:
            return False
        unfinished = self.with_status(*WAITING, *TAKEN)
        training_folders = {state.trial.folder for state in unfinished if state.trial.job}
        return str(Path(trial.checkpoint).parent) in training_folders

    # Called in any thread.

    def with_status(self, *statuses: TrialStatus) -> Iterator[TrialState]:
        """Yield the trials of some statuses, in the order in which they start."""
        # From a list, because a search may add a trial meanwhile.
        return (state for state in list(self.states.values()) if state.status in statuses)

    def num_of(self, *statuses: TrialStatus) -> int:
        """Return the number of trials of some statuses."""
        return sum(1 for _ in self.with_status(*statuses))

    @property
    def num_taken(self) -> int:
        """Number of trials that were taken and have not ended."""
        return self.num_of(*TAKEN)

    @property
    def num_ready(self) -> int:
        """Number of trials that can start now, including suggestions of a search."""
        ready = sum(not self._waits_for_weights(s.trial) for s in self.with_status(*WAITING))
        return ready + (self.search.num_left if self.search else 0)

    @property
    def num_ended(self) -> int:
        """Number of trials that are finished, stopped early or failed."""
        return self.num_of("finished", "stopped early", "failed")

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended."""
        has_suggestions = self.search is not None and self.search.num_left > 0
        return not (self.num_of(*WAITING, *TAKEN) or has_suggestions)

    @property
    def results_by_key(self) -> dict[str, Trial]:
        """Key -> finished trial."""
        return {s.trial.key: s.result for s in self.with_status("finished") if s.result}

    @property
    def failures(self) -> dict[str, str]:
        """Label -> reason of the trials that failed for good."""
        return {state.trial.label: state.error for state in self.with_status("failed")}

    @property
    def stopped(self) -> dict[str, EarlyStop]:
        """Label -> reason of the trials that were stopped early."""
        stops = self.with_status("stopped early")
        return {state.trial.label: state.early_stop for state in stops if state.early_stop}

    @property
    def all_trials(self) -> SweepTrials:
        """The plan, including the trials that the search has suggested."""
        known = {trial.key for trial in self.plan.trials}
        suggested = [state.trial for key, state in self.states.items() if key not in known]
        return self.plan.model_copy(update={"trials": (*self.plan.trials, *suggested)})

    def begin_saving(self) -> bool:
        """Announce that training trials save their state, and return whether there are any.

        A measurement has nothing to save, because its answers are stored one by one.
        """
        running_jobs = [state.trial.job for state in self.with_status("running")]
        # Checkpoints are not verified here, which would delay the stop.
        training_jobs = [job for job in running_jobs if job and not Training(job.folder).outcome]
        note_saving(training_jobs, self.notes.append)
        return bool(training_jobs)

    def saved(self) -> str:
        """Return as text how many trials are finished, and what the others have saved."""
        begun: dict[str, TrainingJob] = {}
        for state in self.with_status(*TAKEN, "interrupted", "failed"):
            job = state.trial.job
            has_just_ended = state.status != "failed" or state.was_stopping
            if job and has_just_ended and Training(job.folder).step > 0:
                begun[f"trial {state.trial.label}"] = job
        text = f"{self.num_of('finished')} of {self.num_all} trials are finished"
        return f"{text}; {describe_saved_state(begun, named=True)}" if begun else text

    def summary(self) -> str:
        """Return in one line how the sweep ended."""
        counts = {
            "of them found finished": len(self.reused),
            "stopped early": self.num_of("stopped early"),
            "failed": self.num_of("failed"),
        }
        parts = [f", {count} {state}" for state, count in counts.items() if count]
        return f"{self.num_all} trials{''.join(parts)}"


def _urgency(trial: Trial) -> tuple[bool, float]:
    """Return the sort key by which trials start.

    The teacher comes first, because fronts need it. Then come the costly trials, so that none of
    them runs alone at the end.
    """
    # A training takes about as long as three evaluations.
    work = inference_cost(trial.model).evaluations_per_token * (3.0 if trial.job else 1.0)
    return trial.role != "teacher", -work
