"""Asynchronous successive halving (ASHA; Li et al., MLSys 2020) over a model's learning rates.

A trial competes with the same model at other learning rates, by validation loss on the same
held-out tokens. Ray Tune's and Optuna's schedulers keep the losses in their own process or store,
and lose them, or judge late ones differently, when a sweep resumes; here all follows from the
journals of the trainings. A stopped trial keeps its checkpoint and has no result, so a sweep
without ASHA trains it to its end; the reason lies beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial
from orchestrator.settings import SweepSettings
from orchestrator.sweeping.trials import SweepPlan
from orchestrator.workspace.files import damage_as_user_error, read_json_object, write_json
from orchestrator.workspace.journal import VALIDATION_METRIC, Journal, read_journal

STOPPED_NAME = "stopped-early.json"


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Why a trial was stopped."""

    step: int
    """Steps done."""
    num_steps: int
    """Steps of the whole training."""
    competitor: str
    """Label of the trial that was better."""
    reason: str
    """Both validation losses."""

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
    """When trials are compared, and how many continue."""

    first_rung: float
    """Share of the steps at which trials are first compared."""
    reduction_factor: int = 2
    """One of this many trials at a rung continues."""

    @property
    def text(self) -> str:
        """One sentence for a plan."""
        rungs, share = [], self.first_rung
        while share < 1:
            rungs.append(f"{share:.3g}")
            share *= self.reduction_factor
        return (
            f"one of {self.reduction_factor} learning rates of a model continues at "
            f"{', '.join(rungs)} of the steps (ASHA), so the cost above is an upper bound"
        )


@dataclass(frozen=True)
class AshaTrial:
    """What a trial is compared with; a plain value that travels to the process of the trial."""

    rule: AshaRule
    competitors: dict[str, str]
    """Label -> folder of the same model at other learning rates."""


def asha_trials(plan: SweepPlan, sweep: SweepSettings) -> dict[str, AshaTrial]:
    """Return key -> comparison of the trials that can be stopped early; empty without ASHA."""
    if plan.kind != "iterations" or not sweep.asha:
        return {}
    rule = AshaRule(sweep.asha_first_rung, sweep.asha_reduction_factor)
    found = {}
    for trial in plan.trials:
        own = _without_learning_rate(trial)
        competitors = {
            other.label: other.folder
            for other in plan.trials
            if own and other.key != trial.key and _without_learning_rate(other) == own
        }
        if competitors:
            found[trial.key] = AshaTrial(rule, competitors)
    return found


def _without_learning_rate(trial: Trial) -> TrainingJob | None:
    if not trial.job:
        return None
    recipe = trial.job.recipe.model_copy(update={"learning_rate": None})
    return trial.job.model_copy(update={"recipe": recipe, "run_folder": "", "first_stages": None})


class AshaMonitor:
    """Reads a trial's validation losses, and decides when to stop it."""

    def __init__(self, trial: Trial, asha: AshaTrial) -> None:
        """Start from what the trial's journal holds, if it resumes."""
        assert trial.job is not None, "a trial without training cannot be stopped"
        self.early_stop: EarlyStop | None = None
        self._trial, self._asha = trial, asha
        self._num_steps = trial.job.recipe.num_steps
        self._losses = validation_losses(Path(trial.folder))
        if self._losses:
            self._decide()

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record a validation loss, and decide."""
        if VALIDATION_METRIC in numbers:
            self._losses[step] = numbers[VALIDATION_METRIC]
            self._decide()

    def _decide(self) -> None:
        # A decision stands: a loss that comes before the training has ended changes nothing.
        self.early_stop = self.early_stop or asha_decision(
            self._losses,
            self._num_steps,
            {
                label: validation_losses(Path(folder))
                for label, folder in self._asha.competitors.items()
            },
            self._asha.rule,
        )


def validation_losses(folder: Path) -> dict[int, float]:
    """Return step -> validation loss of a training so far."""
    return {
        record["step"]: record["values"][VALIDATION_METRIC]
        for record in read_journal(folder)[0]
        if record["kind"] == "metrics" and VALIDATION_METRIC in record["values"]
    }


def write_early_stop(trial: Trial, stop: EarlyStop, rule: AshaRule) -> None:
    """Store why a trial was stopped, beside it and in its journal; call it when the run is over."""
    stored = asdict(stop)
    stored["rival"] = stored.pop("competitor")
    write_json(Path(trial.folder) / STOPPED_NAME, {"verdict": stored, "rule": asdict(rule)})
    journal = Journal(Path(trial.folder))
    journal.event("stopped early", text=stop.text)
    journal.close()


def stored_early_stop(trial: Trial, asha: AshaTrial | None) -> EarlyStop | None:
    """Return why a trial was stopped, if it was: by this rule, for one of these competitors."""
    if asha is None or trial.result():
        return None
    path = Path(trial.folder) / STOPPED_NAME
    stored = read_json_object(path)
    if not stored or stored.get("rule") != asdict(asha.rule):
        return None
    with damage_as_user_error(path):
        values = dict(stored["verdict"])
        stop = EarlyStop(competitor=values.pop("rival"), **values)
    return stop if stop.competitor in asha.competitors else None


def asha_decision(
    losses: Mapping[int, float],
    num_steps: int,
    competitors: Mapping[str, Mapping[int, float]],
    rule: AshaRule,
) -> EarlyStop | None:
    """Return why a trial is to be stopped at the rung that it has just reached, if it is.

    Rungs are at `first_rung * num_steps` steps and at each `reduction_factor` times as many. The
    best `1 / reduction_factor` of the trials that have reached a rung continue, and always the
    best one, hence the first to arrive. A trial that is validated rarely is judged at every rung
    since its last validation.

    Args:
        losses: Step -> validation loss of the trial, up to now.
        num_steps: Steps of the whole training.
        competitors: Label -> step -> validation loss of the other trials, however far they are.
        rule: Rungs and reduction factor.
    """
    steps = sorted(losses)
    if not steps or steps[-1] >= num_steps or not math.isfinite(losses[steps[-1]]):
        return None  # A loss that is not finite ends the training by itself.
    step, before = steps[-1], steps[-2] if len(steps) > 1 else 0
    rung = max(1, math.ceil(rule.first_rung * num_steps))
    while rung <= step:
        there = _losses_at(rung, competitors) if rung > before else {}
        best = sorted([*there.values(), losses[step]])
        if losses[step] > best[max(0, len(best) // rule.reduction_factor - 1)]:
            better = min(there, key=lambda label: there[label])
            reason = f"its validation loss is {losses[step]:.3f}, {better} had {there[better]:.3f}"
            return EarlyStop(step=step, num_steps=num_steps, competitor=better, reason=reason)
        rung *= rule.reduction_factor
    return None


def _losses_at(rung: int, curves: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Return label -> first loss at or after a rung, of the trials that have reached it."""
    found = {}
    for label, curve in curves.items():
        steps = [step for step in curve if step >= rung]
        if steps and math.isfinite(curve[min(steps)]):
            found[label] = curve[min(steps)]
    return found
