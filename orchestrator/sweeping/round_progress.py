"""Progress of the trials that run now; the cost of a look depends only on their number."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from orchestrator.records.trial import Trial
from orchestrator.terminal.progress import Progress
from orchestrator.training.monitor import JournalReader
from orchestrator.training.resume_point import describe_saved_state
from orchestrator.workspace.layout import find_checkpoints

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
