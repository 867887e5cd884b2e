"""The unfinished trials of a sweep under Ray Tune, in rounds, each trial once in the workspace.

A trial that another process is at is passed over in the first round, so that two sweeps at the same
time share the work instead of waiting for each other trial by trial. Then this process waits for
what is left, and takes over what nobody is at any more. Who waits holds neither a folder nor a
place in the cluster that others wait for, so that there is no circle.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from iiet.cost import inference_cost
from orchestrator.cluster.ray_tune import TrialContext, TrialReport, run_trials
from orchestrator.cluster.start import ray_cluster
from orchestrator.settings import SweepSettings
from orchestrator.sweeping.asha import EarlyStopping
from orchestrator.sweeping.trial_run import is_trial_locked, run_trial
from orchestrator.sweeping.trials import PlannedTrial
from orchestrator.terminal.formatting import join_names
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.signals import note_saved_state, wait_interruptibly
from orchestrator.training.job import TrainingJob
from orchestrator.training.monitor import JournalReader
from orchestrator.training.resume_point import describe_saved_state
from orchestrator.workspace.errors import Interrupted, RunFailed


@dataclass
class TrialQueue:
    """The unfinished trials of a sweep while they run, and how they ended."""

    folder: Path
    """The sweep's folder."""
    settings: SweepSettings
    """How many run at once, and how often one may fail."""
    progress: Progress
    """Told what is going on."""
    num_all: int
    """Trials of the sweep, the finished ones included."""
    stopping: EarlyStopping = field(default_factory=EarlyStopping)
    """When a trial is ended before its training is."""
    on_end: Callable[[], None] = lambda: None
    """Called in this thread whenever a trial has ended."""
    failures: dict[str, str] = field(default_factory=dict)
    """Label -> reason of trials that failed for good."""
    made: set[str] = field(default_factory=set)
    """Keys of trials that this sweep made itself."""
    lost: set[str] = field(default_factory=set)
    """Keys of trials that were ended by the rule, now or before."""
    _found: set[str] = field(default_factory=set)
    _failed_while_stopping: dict[str, str] = field(default_factory=dict)
    _busy: set[str] = field(default_factory=set)

    def run(self, waiting: Sequence[PlannedTrial]) -> None:
        """Run what is not finished; what another process is at is waited for.

        Raises:
            Interrupted: After Ctrl-C; finished trials stay finished.
            RunFailed: If a trial failed while it was stopping after Ctrl-C.
        """
        self.progress.start("sweep", self.num_all)
        num_found = self.num_all - len(waiting) - len(self.lost)
        if waiting:
            with ray_cluster(say=partial(self.progress.advance, num_found)):
                self._run_or_wait(waiting)
        self.progress.finish(self._summary(num_found))

    def _run_or_wait(self, trials: Sequence[PlannedTrial]) -> None:
        self._round(trials)
        left = [t for t in trials if t.key in self._busy and self._is_to_do(t)]
        begin: Callable[[], None] | None = partial(self._tell_waiting, left)
        while left:
            wait_interruptibly(partial(_one_has_ended, left), begin=begin)
            begin = None
            free = [t for t in left if self._is_to_do(t) and not is_trial_locked(t)]
            self._busy.difference_update(trial.key for trial in free)
            self._round(free, num_elsewhere=len(left) - len(free))
            left = [t for t in left if t not in free or t.key in self._busy]
            left = [t for t in left if self._is_to_do(t)]

    def _tell_waiting(self, trials: Sequence[PlannedTrial]) -> None:
        names = join_names([trial.label for trial in trials])
        self.progress.note(f"waiting for another process, which is at: {names}")

    def _is_to_do(self, trial: PlannedTrial) -> bool:
        """Return whether a trial that another process was at has still no result."""
        if trial.result():
            self._found.add(trial.key)
        return trial.key not in self._found

    def _summary(self, num_found: int) -> str:
        counts = {
            "of them found finished": num_found,
            "made by another process meanwhile": len(self._found - self.made),
            "stopped early": len(self.lost),
            "failed": len(self.failures),
        }
        parts = [f", {count} {what}" for what, count in counts.items() if count]
        return f"{self.num_all} trials{''.join(parts)}"

    def _round(self, trials: Sequence[PlannedTrial], *, num_elsewhere: int = 0) -> None:
        tails = {trial.key: JournalReader(Path(trial.folder)) for trial in trials}
        num_done = self.num_all - len(trials) - num_elsewhere

        def watch() -> None:
            shares = [_share_done(trial, tails[trial.key]) for trial in trials]
            running = [t.label for t, share in zip(trials, shares, strict=True) if 0 < share < 1]
            self.progress.advance(num_done + sum(shares), "; ".join(running[:3]))

        # Of this process alone: the same sweep may run twice at the same time.
        own_folder = self.folder / "processes" / f"{socket.gethostname()}-{os.getpid()}"

        def saved() -> str:
            begun = [t for t in trials if t.job and not t.result() and tails[t.key].step]
            jobs = {f"trial {t.label}": TrainingJob.from_dict(t.job) for t in begun if t.job}
            num_finished = num_done + sum(trial.result() is not None for trial in trials)
            text = f"{num_finished} of {self.num_all} trials are finished"
            return f"{text}; {describe_saved_state(jobs, named=True)}" if jobs else text

        try:
            run_trials(
                run_tune_trial,
                [self._parameters(trial) for trial in sorted(trials, key=self._turn)],
                own_folder,
                self.settings,
                on_result=self._on_result,
                watch=watch,
                saved=saved,
            )
        except Interrupted:
            if not self._failed_while_stopping:
                raise
            failed = self._failed_while_stopping.items()
            error = RunFailed("; ".join(f"trial {label} failed: {why}" for label, why in failed))
            note_saved_state(error, saved())
            raise error from None
        # After an interruption it stays: what still ends reads in it that it shall.
        shutil.rmtree(own_folder, ignore_errors=True)
        with suppress(OSError):  # Another process has a folder there.
            own_folder.parent.rmdir()

    def _turn(self, trial: PlannedTrial) -> tuple[bool, bool, float]:
        # Those that another process is at last. The teacher first, which spans the box of
        # hypervolumes. Then the costly ones, so that none runs alone at the end.
        return is_trial_locked(trial), trial.role != "teacher", -_expected_work(trial)

    def _parameters(self, trial: PlannedTrial) -> dict[str, Any]:
        return {
            "trial": trial.to_dict(),
            "rivals": self.stopping.rivals_of(trial),
            "rule": self.stopping.rule,
        }

    def _on_result(self, report: TrialReport) -> None:
        trial = PlannedTrial(**report.parameters["trial"])
        state = (report.result or {}).get("state")
        if report.error:
            self.failures[trial.label] = report.error
            if report.after_stop:
                self._failed_while_stopping[trial.label] = report.error
            self.progress.note(f"trial {trial.label} failed: {report.error}")
        elif state == "made":
            self.made.add(trial.key)
        elif state == "busy":
            self._busy.add(trial.key)
        elif state == "found":
            self._found.add(trial.key)
        elif state == "lost":
            self.lost.add(trial.key)
            verdict = self.stopping.verdict_of(trial)
            self.progress.note(f"trial {trial.label}" + (f" {verdict.text}" if verdict else ""))
        self.on_end()


def _one_has_ended(trials: Sequence[PlannedTrial]) -> bool:
    return any(trial.result() or not is_trial_locked(trial) for trial in trials)


def run_tune_trial(parameters: dict[str, Any], context: TrialContext) -> dict[str, Any]:
    """Run one trial in a Ray worker; what Tune is given. The result itself goes into a file."""
    trial = parameters["trial"]
    options = {name: parameters[name] for name in ("rivals", "rule")}
    run = run_trial(
        trial,
        wait=False,
        should_stop=context.should_stop,
        train=context.train,
        on_device=context.on_device,
        **options,
    )
    return {"state": run.state}


def _expected_work(trial: PlannedTrial) -> float:
    evaluations = inference_cost(trial.config()).evaluations_per_token
    return evaluations * (3.0 if trial.job else 1.0)


def _share_done(trial: PlannedTrial, tail: JournalReader) -> float:
    """Tell how far a trial is, from its files: training counts nine tenths, measuring the rest."""
    if trial.result_path.exists():
        return 1.0
    if not trial.job:
        return 0.0
    tail.read()
    return 0.9 * tail.step / int(trial.job["recipe"]["num_steps"])
