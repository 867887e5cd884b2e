"""Ends a trial early when it is one of a model's worse learning rates (`sweep.asha`).

The rule is `orchestrator.sweeping.asha.asha_decision`; here are the files that it is fed from. The
rivals of a trial are the same model at other learning rates, compared as far as they are. Their
losses are those that their own trainings wrote down, of the same held-out tokens. A trial that was
ended keeps its checkpoint and has no result, so that a sweep without ASHA trains it on; the verdict
lies beside it. Hence nothing of a rule is lost with the process that applied it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.settings import SweepSettings
from orchestrator.sweeping.trials import PlannedTrial, SweepPlan
from orchestrator.workspace.files import damage_as_user_error, read_json_object, write_json
from orchestrator.workspace.journal import Journal, read_journal

STOPPED_NAME = "stopped-early.json"
VALIDATION_METRIC = "validation/loss"


Rivals = Mapping[str, Mapping[str, str]]
"""Key of a trial -> label -> folder of those that can end it."""


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Why a trial was stopped."""

    step: int
    """Steps done."""
    num_steps: int
    """Steps of the whole training."""
    rival: str
    """Label of the trial that it lost to."""
    reason: str
    """What it has and what the rival has."""

    @property
    def share_saved(self) -> float:
        """Share of the trial's steps that were not made."""
        return 1.0 - self.step / self.num_steps

    @property
    def text(self) -> str:
        """All of it in one line."""
        return f"stopped early at step {self.step} of {self.num_steps}: {self.reason}"


@dataclass(frozen=True)
class AshaRule:
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
class EarlyStopping:
    """The rule that a sweep's trials are ended by, if any, and who is whose rival."""

    rule: AshaRule | None = None
    """None trains all to their end."""
    rivals: Rivals = field(default_factory=dict)
    """Whom a trial has to beat; a trial without rivals is never ended."""

    def rivals_of(self, trial: PlannedTrial) -> dict[str, str]:
        """Return label -> folder of a trial's rivals."""
        return dict(self.rivals.get(trial.key, {}))

    def verdict_of(self, trial: PlannedTrial) -> EarlyStop | None:
        """Return why a trial was ended, if it was, by this rule and for one of these rivals."""
        return verdict_of(trial, self.rivals_of(trial), self.rule) if self.rule else None


def early_stopping_of(plan: SweepPlan, settings: SweepSettings) -> EarlyStopping:
    """Return how a sweep's trials are ended early; where nobody has a rival, not at all."""
    if plan.kind != "iterations" or not settings.asha:
        return EarlyStopping()
    rule = AshaRule(settings.asha_first_rung, settings.asha_reduction_factor)
    rivals = {trial.key: other_learning_rates(trial, plan.trials) for trial in plan.trials}
    return EarlyStopping(rule, rivals) if any(rivals.values()) else EarlyStopping()


def other_learning_rates(trial: PlannedTrial, trials: Sequence[PlannedTrial]) -> dict[str, str]:
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


class AshaMonitor:
    """Hears a trial's numbers, and knows when it is lost."""

    def __init__(self, trial: PlannedTrial, rivals: Mapping[str, str], rule: AshaRule) -> None:
        """Start from what the trial's journal holds, if it goes on.

        Args:
            trial: One with a job.
            rivals: Label -> folder, as `EarlyStopping.rivals_of` returns them.
            rule: When it is lost.
        """
        assert trial.job is not None, "who is not trained cannot be stopped"
        self.verdict: EarlyStop | None = None
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

    def _judge(self) -> EarlyStop | None:
        folders = {label: Path(folder) for label, folder in self._rivals.items()}
        return asha_decision(
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


def verdict_of(trial: PlannedTrial, rivals: Mapping[str, str], rule: AshaRule) -> EarlyStop | None:
    """Return why a trial was ended early, if it was, by this rule and for one of these rivals."""
    path = Path(trial.folder) / STOPPED_NAME
    stored = None if trial.result() else read_json_object(path)
    if not stored or stored.get("rule") != asdict(rule):
        return None
    with damage_as_user_error(path):
        verdict = EarlyStop(**stored["verdict"])
    return verdict if verdict.rival in rivals else None


def asha_decision(
    losses: Mapping[int, float],
    num_steps: int,
    rivals: Mapping[str, Mapping[int, float]],
    *,
    first_rung: float,
    reduction_factor: int,
) -> EarlyStop | None:
    """Say whether a trial is not among the best at the rung that it has just reached.

    Rungs are at `first_rung * num_steps` steps and at each `reduction_factor` times as many. Who
    is among the best `1 / reduction_factor` of those that have reached a rung goes on; so does the
    best one, and hence the first. Who is looked at rarely is judged at every rung since its last
    look.

    Args:
        losses: Step -> validation loss of the trial, up to now.
        num_steps: Steps of the whole training.
        rivals: Label -> step -> validation loss of the other trials, however far they are.
        first_rung: Share of the steps of the lowest rung.
        reduction_factor: Of so many trials at a rung, one goes on.
    """
    looks = sorted(losses)
    if not looks or looks[-1] >= num_steps or not math.isfinite(losses[looks[-1]]):
        return None  # A loss that is no number ends the training by itself.
    step, before = looks[-1], looks[-2] if len(looks) > 1 else 0
    rung = max(1, math.ceil(first_rung * num_steps))
    while rung <= step:
        there = _losses_at(rung, rivals) if rung > before else {}
        best = sorted([*there.values(), losses[step]])
        if losses[step] > best[max(0, len(best) // reduction_factor - 1)]:
            rival = min(there, key=lambda label: there[label])
            reason = f"its validation loss is {losses[step]:.3f}, {rival} had {there[rival]:.3f}"
            return EarlyStop(step=step, num_steps=num_steps, rival=rival, reason=reason)
        rung *= reduction_factor
    return None


def _losses_at(rung: int, curves: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Return label -> loss at the first look from a rung on, of those that have come to it."""
    found = {}
    for label, curve in curves.items():
        steps = [step for step in curve if step >= rung]
        if steps and math.isfinite(curve[min(steps)]):
            found[label] = curve[min(steps)]
    return found
