"""Watches one trial's validation losses beside its rivals', and ends it where it cannot win.

The rule is `orchestrator.analysis.early_stop`; here are the files that it is fed from. A rival is a
trial of the same sweep that needs no more evaluations; its final loss is the one that its own
training wrote down, which is of the same held-out tokens. What was stopped keeps its checkpoint and
has no result, so that a sweep without stopping trains it on; the verdict lies beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iiet.cost import inference_cost
from orchestrator.analysis.early_stop import Verdict, judge
from orchestrator.journal import Journal, read_journal
from orchestrator.plan import PlannedTrial
from orchestrator.training.job import DONE_NAME, JOB_NAME
from orchestrator.workspace import read_json, write_json

STOPPED_NAME = "stopped-early.json"
VALIDATION_METRIC = "validation/loss"


def rivals_of(trial: PlannedTrial, trials: Sequence[PlannedTrial]) -> dict[str, str]:
    """Return label -> folder of the other trials that are trained alike and cost no more.

    None where the iterations are switched on in the middle of the training: there the loss jumps.
    """
    if not trial.job or _is_staged(trial.job["recipe"]):
        return {}
    cost = inference_cost(trial.config()).evaluations_per_token
    return {
        other.label: other.folder
        for other in trials
        if other.job
        and other.key != trial.key
        and other.role == "trial"
        and inference_cost(other.config()).evaluations_per_token <= cost
        and _validation(other.job) == _validation(trial.job)
    }


def _is_staged(recipe: Mapping[str, Any]) -> bool:
    return bool(recipe["iterate_from_fraction"] or recipe.get("iterate_ramp_fraction"))


def _validation(job: Mapping[str, Any]) -> tuple[Any, ...]:
    return job["tokens_folder"], job["recipe"]["num_validation_tokens"], job["model"]["vocab_size"]


class Referee:
    """Hears a trial's numbers, and knows when it is lost."""

    def __init__(
        self, trial: PlannedTrial, rivals: Mapping[str, str], *, grace_fraction: float
    ) -> None:
        """Start from what the trial's journal holds, if it goes on.

        Args:
            trial: One with a job.
            rivals: As `rivals_of` returns them.
            grace_fraction: Share of the steps before which nothing is stopped.
        """
        assert trial.job is not None, "who is not trained cannot be stopped"
        self.verdict: Verdict | None = None
        """Why the trial is lost; None as long as it is not."""
        self._folder, self._rivals, self._grace = Path(trial.folder), dict(rivals), grace_fraction
        self._num_steps = int(trial.job["recipe"]["num_steps"])
        self._validation = _validation(trial.job)
        self._losses: dict[int, float] = {}
        for record in read_journal(self._folder)[0]:
            if record.get("kind") == "metrics":
                self.hear(record["step"], record["values"])

    def hear(self, step: int, numbers: Mapping[str, float]) -> None:
        """Note a validation loss, and judge."""
        if VALIDATION_METRIC not in numbers:
            return
        self._losses[step] = numbers[VALIDATION_METRIC]
        self.verdict = judge(
            self._losses, self._num_steps, self._finished_rivals(), grace_fraction=self._grace
        )

    def write_verdict(self) -> None:
        """Put the verdict beside the trial, and into its journal; call it when the run is over."""
        assert self.verdict is not None
        write_json(self._folder / STOPPED_NAME, asdict(self.verdict))
        journal = Journal(self._folder)
        journal.event("stopped early", text=self.verdict.text)
        journal.close()

    def _finished_rivals(self) -> dict[str, float]:
        losses = {}
        for label, folder in self._rivals.items():
            done, claim = (read_json(Path(folder) / name) for name in (DONE_NAME, JOB_NAME))
            # An earlier sweep may have looked at other tokens.
            if done and claim and _validation(claim["job"]) == self._validation:
                losses[label] = float(done["validation_loss"])
        return losses


def verdict_of(trial: PlannedTrial, rivals: Mapping[str, str]) -> Verdict | None:
    """Return why a trial was stopped early, if it was, and for one of these rivals."""
    stored = None if trial.result() else read_json(Path(trial.folder) / STOPPED_NAME)
    if not stored or stored["rival"] not in rivals:
        return None
    return Verdict(**stored)
