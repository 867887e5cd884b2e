"""The unfinished trials of a sweep under Ray Tune; each trial runs once in the workspace.

The first round skips trials that another process runs, so two sweeps at the same time share the
work instead of waiting for each other trial by trial. Then this process waits for what is left,
and takes over trials that no process runs any more. While it waits it holds no lock and no CPUs
that others wait for, so two processes cannot wait for each other.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iiet.cost import inference_cost
from orchestrator.cluster.asha_scheduler import AshaByModel
from orchestrator.cluster.ray import Signal, ray_cluster, wait_for_gpus
from orchestrator.cluster.ray_tune import TrialContext, TrialHooks, run_trials
from orchestrator.cluster.trial_search import TrialSearch
from orchestrator.cluster.tune_callback import TrialReport
from orchestrator.planning.estimate import seconds_to_save
from orchestrator.records.trial import AshaTrial, Trial
from orchestrator.settings import ClusterSettings, SweepSettings
from orchestrator.sweeping.asha import record_early_stop, stored_early_stop
from orchestrator.sweeping.elastic_plans import waits_for_weights
from orchestrator.sweeping.trial_run import is_trial_locked, run_trial
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import note_saved_state, wait_interruptibly
from orchestrator.training.watching import JournalReader, describe_saved_state, waiting_text
from orchestrator.workspace.errors import Interrupted, RunFailed
from orchestrator.workspace.journal import FAILED_EVENT, Journal
from orchestrator.workspace.layout import find_checkpoints

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch


@dataclass
class TrialQueue:
    """The unfinished trials of a sweep while they run, and how they ended."""

    folder: Path
    """The sweep's folder."""
    settings: SweepSettings
    progress: Progress
    num_all: int
    """Trials of the sweep, the finished ones included."""
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    """Where the trials run."""
    asha: Mapping[str, AshaTrial] = field(default_factory=dict)
    """Key of each trial that can be stopped early -> what it is compared with."""
    on_end: Callable[[Trial, str, str], None] = lambda *_: None
    """Called in this thread with each trial that has ended: its state, as in `TrialRun` or
    `failed`, and the reason if it failed or was stopped early."""
    watch: Callable[[Sequence[Trial]], None] = lambda _: None
    """Called a few times a second in this thread with the running trials."""
    failures: dict[str, str] = field(default_factory=dict)
    """Label -> reason of trials that failed for good."""
    made: set[str] = field(default_factory=set)
    """Keys of trials that this sweep finished itself."""
    stopped: set[str] = field(default_factory=set)
    """Keys of trials that were stopped early, now or before."""
    _found: set[str] = field(default_factory=set)
    _failed_while_stopping: dict[str, str] = field(default_factory=dict)
    _busy: set[str] = field(default_factory=set)

    def run(self, waiting: Sequence[Trial], search: ScheduleSearch | None = None) -> None:
        """Run unfinished trials, then those that measure their weights, then a search's.

        Waits for those that another process runs.

        Raises:
            Interrupted: After Ctrl-C; finished trials stay finished.
            RunFailed: If a trial failed while it was stopping after Ctrl-C.
        """
        self.progress.start("sweep", self.num_all)
        num_new = search.num_left if search else 0
        num_found = self.num_all - len(waiting) - num_new - len(self.stopped)
        if waiting or num_new:
            say = partial(self.progress.advance, num_found)
            with ray_cluster(self.cluster, folder=self.folder, say=say):
                if self.cluster.wait_for_gpus:
                    wait_for_gpus(self.settings.gpus_per_trial or 0, self.progress.note)
                later = [t for t in waiting if waits_for_weights(t, waiting)]
                first = [t for t in waiting if t not in later]
                self._run_or_wait(first, num_later=len(later) + num_new)
                self._run_or_wait(list(filter(self._has_weights, later)), num_later=num_new)
                if search:
                    self._run_search(search)
        if search:
            search.update_study()  # With what ended last, or was finished when this began.
        self.progress.finish(self._summary(num_found))

    def _run_search(self, search: ScheduleSearch) -> None:
        search.update_study()
        self._run_round([], self.num_all - search.num_left, search)
        # Another process may have suggested and may run the others.
        more = [t for t in search.known_trials() if t.label not in self.failures]
        self._run_or_wait([t for t in more if not t.result()])

    def _has_weights(self, trial: Trial) -> bool:
        # The training has failed, or was stopped early, if there are none by now.
        has_weights = Path(str(trial.checkpoint)).is_dir()
        if not has_weights:
            self.failures[trial.label] = "its weights are not trained"
            self.on_end(trial, "failed", self.failures[trial.label])
        return has_weights

    def _run_or_wait(self, trials: Sequence[Trial], *, num_later: int = 0) -> None:
        if not trials:
            return
        self._run_round(trials, self.num_all - num_later - len(trials))
        left = [t for t in trials if t.key in self._busy and self._is_unfinished(t)]
        begin: Callable[[], None] | None = partial(self._note_waiting, left)
        while left:
            watch = partial(self.watch, left)
            wait_interruptibly(partial(_any_ended, left), begin=begin, watch=watch)
            begin = None
            free = [t for t in left if self._is_unfinished(t) and not is_trial_locked(t)]
            self._busy.difference_update(trial.key for trial in free)
            self._run_round(free, self.num_all - num_later - len(left))
            left = [t for t in left if t not in free or t.key in self._busy]
            left = [t for t in left if self._is_unfinished(t)]

    def _note_waiting(self, trials: Sequence[Trial]) -> None:
        self.progress.note(waiting_text([trial.label for trial in trials]))

    def _is_unfinished(self, trial: Trial) -> bool:
        if trial.result():
            self._found.add(trial.key)
        return trial.key not in self._found

    def _summary(self, num_found: int) -> str:
        counts = {
            "of them found finished": num_found,
            "made by another process meanwhile": len(self._found - self.made),
            "stopped early": len(self.stopped),
            "failed": len(self.failures),
        }
        parts = [f", {count} {what}" for what, count in counts.items() if count]
        return f"{self.num_all} trials{''.join(parts)}"

    def _run_round(
        self, trials: Sequence[Trial], num_done: int, search: ScheduleSearch | None = None
    ) -> None:
        """Run trials, or those that a search suggests."""
        trials_now = RoundProgress(self.progress, trials, num_done=num_done, num_all=self.num_all)

        def parameters(trial: Trial) -> dict[str, Any]:
            trials_now.add(trial)
            return self._parameters(trial)

        def seconds(keys: Collection[str]) -> float:
            jobs = [job for key in keys if (job := trials_now.trials[key].job)]
            return seconds_to_save(jobs, self.progress.note)

        def record_end(report: TrialReport) -> None:
            is_finished = (report.result or {}).get("state") in ("made", "found")
            trials_now.end(report.key, finished=is_finished)
            self._record_end(report, trials_now.trials[report.key])

        def show(running: Collection[str]) -> None:
            trials_now.show(running)
            self.watch([trials_now.trials[key] for key in running])

        early_stops, asha = Signal(), dict(self.asha)

        def stop_early(key: str, step: int, loss: float) -> None:
            record_early_stop(asha, key, step, loss)  # Tune pickles this function, so no `self`.
            early_stops.part(key).send()

        # One folder for each process: the same sweep may run twice at the same time.
        storage = self.folder / f"ray-{socket.gethostname()}-{os.getpid()}"
        try:
            run_trials(
                run_tune_trial,
                TrialSearch(search, parameters)
                if search
                else {t.key: self._parameters(t) for t in sorted(trials, key=_run_order)},
                storage,
                self.settings,
                cluster=self.cluster,
                scheduler=AshaByModel(asha, stop_early),
                early_stops=early_stops,
                hooks=TrialHooks(
                    on_result=record_end,
                    watch=show,
                    saved=trials_now.saved,
                    seconds_to_save=seconds,
                ),
            )
        except Interrupted:
            if not self._failed_while_stopping:
                raise
            failed = self._failed_while_stopping.items()
            error = RunFailed("; ".join(f"trial {label} failed: {why}" for label, why in failed))
            note_saved_state(error, trials_now.saved())
            raise error from None

    def _parameters(self, trial: Trial) -> dict[str, Any]:
        asha = self.asha.get(trial.key)
        return {"trial": trial.model_dump(mode="json"), "asha": asha.model_dump() if asha else None}

    def _record_end(self, report: TrialReport, trial: Trial) -> None:
        state, reason = (report.result or {}).get("state", "stopped"), ""
        if report.error:
            state, reason = "failed", report.error
            _record_failure(trial, reason)
            self.failures[trial.label] = report.error
            if report.after_stop:
                self._failed_while_stopping[trial.label] = report.error
            self.progress.note(f"trial {trial.label} failed: {report.error}")
        elif state == "stopped early":
            self.stopped.add(trial.key)
            stop = stored_early_stop(trial, self.asha.get(trial.key))
            reason = stop.text if stop else ""
            self.progress.note(f"trial {trial.label} {reason}".rstrip())
        elif state in (sets := {"made": self.made, "busy": self._busy, "found": self._found}):
            sets[state].add(trial.key)
        self.on_end(trial, state, reason)


def run_tune_trial(parameters: dict[str, Any], context: TrialContext) -> dict[str, Any]:
    """Run one trial in a Ray worker. Tune gets how it ended; the result is in a file."""
    run = run_trial(
        Trial.model_validate(parameters["trial"]),
        wait=False,
        report=context.report,
        asha=AshaTrial.model_validate(parameters["asha"]) if parameters["asha"] else None,
        train=context.train,
        on_device=context.on_device,
    )
    return {"state": run.state}


def _record_failure(trial: Trial, reason: str) -> None:
    # For those who publish the sweep later. The disk may be full, and the trial may run elsewhere.
    with suppress(OSError):
        if not is_trial_locked(trial):
            journal = Journal(Path(trial.folder))
            journal.event(FAILED_EVENT, text=reason)
            journal.close()


def _any_ended(trials: Sequence[Trial]) -> bool:
    return any(trial.result() or not is_trial_locked(trial) for trial in trials)


def _run_order(trial: Trial) -> tuple[bool, bool, float]:
    # Trials that another process runs come last. The teacher comes first, because it spans the box
    # of hypervolumes. Then the costly ones, so none runs alone at the end.
    evaluations = inference_cost(trial.model).evaluations_per_token
    expected_work = evaluations * (3.0 if trial.job else 1.0)
    return is_trial_locked(trial), trial.role != "teacher", -expected_work


TRAINING_SHARE = 0.9
"""Share of a trial's progress that is its training; the rest is its measurement."""
MAX_NAMED = 3


class RoundProgress:
    """Trials of one round: which have ended, and how far the running ones are."""

    def __init__(
        self, progress: Progress, trials: Iterable[Trial], *, num_done: int, num_all: int
    ) -> None:
        """Start with the trials of the round.

        Args:
            num_done: Trials of the sweep that ended before this round.
            num_all: All trials of the sweep.
        """
        self.trials = {trial.key: trial for trial in trials}
        self._progress, self._num_done, self._num_all = progress, num_done, num_all
        self._journals: dict[str, JournalReader] = {}
        self._num_finished = self._num_ended = 0

    def add(self, trial: Trial) -> None:
        """Add a trial that a search suggests."""
        self.trials[trial.key] = trial

    def end(self, key: str, *, finished: bool) -> None:
        """Note that a trial has ended, with a result or without."""
        self._num_ended += 1
        self._num_finished += finished
        if finished:
            self._journals.pop(key, None)

    def show(self, running: Collection[str]) -> None:
        """Show the progress, given the keys of the running trials."""
        shares = {key: self._share_done(key) for key in running}
        begun = [self.trials[key].label for key, share in shares.items() if share]
        done = self._num_done + self._num_ended + sum(shares.values())
        self._progress.advance(done, "; ".join(begun[:MAX_NAMED]))

    def saved(self) -> str:
        """Return how many trials are finished, and what the begun ones have saved."""
        # A long training may have a checkpoint before its first recorded step.
        begun = [
            self.trials[key]
            for key, journal in self._journals.items()
            if journal.step or find_checkpoints(Path(self.trials[key].folder))
        ]
        jobs = {f"trial {trial.label}": trial.job for trial in begun if trial.job}
        num_finished = self._num_done + self._num_finished
        text = f"{num_finished} of {self._num_all} trials are finished"
        return f"{text}; {describe_saved_state(jobs, named=True)}" if jobs else text

    def _share_done(self, key: str) -> float:
        trial = self.trials[key]
        if not trial.job:
            return 0.0
        journal = self._journals.setdefault(key, JournalReader(Path(trial.folder)))
        journal.read()
        return TRAINING_SHARE * journal.step / trial.job.recipe.num_steps
