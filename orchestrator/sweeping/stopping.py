"""Ends a trial early when it is one of a model's worse learning rates (`sweep.asha`).

The rule is `orchestrator.sweeping.halving.halve`; here are the files that it is fed from. The
rivals of a trial are the same model at other learning rates, compared as far as they are. Their
losses are those that their own trainings wrote down, of the same held-out tokens. A trial that was
ended keeps its checkpoint and has no result, so that a sweep without ASHA trains it on; the verdict
lies beside it. Hence nothing of a rule is lost with the process that applied it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.settings import SweepSettings
from orchestrator.sweeping.halving import Verdict, halve
from orchestrator.sweeping.trials import PlannedTrial, SweepPlan
from orchestrator.workspace.files import damage_as_user_error, read_json_object, write_json
from orchestrator.workspace.journal import Journal, read_journal

STOPPED_NAME = "stopped-early.json"
VALIDATION_METRIC = "validation/loss"


Rivals = Mapping[str, Mapping[str, str]]
"""Key of a trial -> label -> folder of those that can end it."""


@dataclass(frozen=True)
class StopRule:
    """Asynchronous successive halving (ASHA); a plain value that travels to where trials run."""

    first_rung: float
    """Share of the steps at which trials are first compared."""
    reduction_factor: int = 2
    """Of so many trials at a rung, one goes on."""

    @property
    def text(self) -> str:
        """What it does, in a sentence for a plan."""
        rungs, share = [], self.first_rung
        while share < 1:
            rungs.append(f"{share:.3g}")
            share *= self.reduction_factor
        return (
            f"one of {self.reduction_factor} learning rates of a model goes on at "
            f"{', '.join(rungs)} of the steps (ASHA): the price is the most that it can be"
        )


@dataclass(frozen=True)
class Stopping:
    """The rule that a sweep's trials are ended by, if any, and who is whose rival."""

    rule: StopRule | None = None
    """None trains all to their end."""
    rivals: Rivals = field(default_factory=dict)
    """Whom a trial has to beat; a trial without rivals is never ended."""

    def rivals_of(self, trial: PlannedTrial) -> dict[str, str]:
        """Return label -> folder of a trial's rivals."""
        return dict(self.rivals.get(trial.key, {}))

    def verdict_of(self, trial: PlannedTrial) -> Verdict | None:
        """Return why a trial was ended, if it was, by this rule and for one of these rivals."""
        return verdict_of(trial, self.rivals_of(trial), self.rule) if self.rule else None


def stopping_of(plan: SweepPlan, settings: SweepSettings) -> Stopping:
    """Return how a sweep's trials are ended early; where nobody has a rival, not at all."""
    if plan.kind != "iterations" or not settings.asha:
        return Stopping()
    rule = StopRule(settings.asha_first_rung, settings.asha_reduction_factor)
    rivals = {trial.key: other_rates_of(trial, plan.trials) for trial in plan.trials}
    return Stopping(rule, rivals) if any(rivals.values()) else Stopping()


def other_rates_of(trial: PlannedTrial, trials: Sequence[PlannedTrial]) -> dict[str, str]:
    """Return label -> folder of the trials that differ from this one in the learning rate alone."""
    return {
        other.label: other.folder
        for other in trials
        if other.job
        and trial.job
        and other.key != trial.key
        and _but_for_the_rate(other.job) == _but_for_the_rate(trial.job)
    }


def _but_for_the_rate(job: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {**job["recipe"], "learning_rate": None}
    return {**job, "recipe": recipe, "run_folder": None, "first_stages": None}


class Referee:
    """Hears a trial's numbers, and knows when it is lost."""

    def __init__(self, trial: PlannedTrial, rivals: Mapping[str, str], rule: StopRule) -> None:
        """Start from what the trial's journal holds, if it goes on.

        Args:
            trial: One with a job.
            rivals: Label -> folder, as `Stopping.rivals_of` returns them.
            rule: When it is lost.
        """
        assert trial.job is not None, "who is not trained cannot be stopped"
        self.verdict: Verdict | None = None
        """Why the trial is lost; None as long as it is not."""
        self._folder, self._rivals, self._rule = Path(trial.folder), dict(rivals), rule
        self._num_steps = int(trial.job["recipe"]["num_steps"])
        self._losses = validation_losses(self._folder)
        if self._losses:
            self.verdict = self._judge()

    def hear(self, step: int, numbers: Mapping[str, float]) -> None:
        """Note a validation loss, and judge."""
        if VALIDATION_METRIC in numbers:
            self._losses[step] = numbers[VALIDATION_METRIC]
            # It stands: a look that comes before the training has ended changes nothing.
            self.verdict = self.verdict or self._judge()

    def write_verdict(self) -> None:
        """Put the verdict beside the trial, and into its journal; call it when the run is over."""
        assert self.verdict is not None
        stored = {"verdict": asdict(self.verdict), "rule": asdict(self._rule)}
        write_json(self._folder / STOPPED_NAME, stored)
        journal = Journal(self._folder)
        journal.event("stopped early", text=self.verdict.text)
        journal.close()

    def _judge(self) -> Verdict | None:
        folders = {label: Path(folder) for label, folder in self._rivals.items()}
        return halve(
            self._losses,
            self._num_steps,
            {label: validation_losses(folder) for label, folder in folders.items()},
            first_rung=self._rule.first_rung,
            reduction_factor=self._rule.reduction_factor,
        )


def validation_losses(folder: Path) -> dict[int, float]:
    """Return step -> validation loss of a training, as far as it is."""
    return {
        record["step"]: record["values"][VALIDATION_METRIC]
        for record in read_journal(folder)[0]
        if record["kind"] == "metrics" and VALIDATION_METRIC in record["values"]
    }


def verdict_of(trial: PlannedTrial, rivals: Mapping[str, str], rule: StopRule) -> Verdict | None:
    """Return why a trial was ended early, if it was, by this rule and for one of these rivals."""
    path = Path(trial.folder) / STOPPED_NAME
    stored = None if trial.result() else read_json_object(path)
    if not stored or stored.get("rule") != asdict(rule):
        return None
    with damage_as_user_error(path):
        verdict = Verdict(**stored["verdict"])
    return verdict if verdict.rival in rivals else None
