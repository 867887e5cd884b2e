"""Which trials ASHA may stop early, and why it stopped one.

A trial competes with the same model at other learning rates, by validation loss on the same
held-out tokens; `cluster/asha_scheduler.py` decides. The reason lies beside a stopped trial, is
written once and is final. Such a trial keeps its checkpoint and has no result, so a sweep without
ASHA, or with another rule, trains it to its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.records.record import Record
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.trial import Trial
from orchestrator.settings import SweepSettings
from orchestrator.training.job import clear_stop_request, request_stop
from orchestrator.workspace.journal import read_journal

if TYPE_CHECKING:
    from orchestrator.cluster.asha_scheduler import AshaByModel

STOPPED_NAME = "stopped-early.json"


class AshaRule(Record):
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
            f"{', '.join(rungs)} of the steps (ASHA), so the cost is an upper bound"
        )


class EarlyStop(Record):
    """Why a trial was stopped."""

    rule: AshaRule
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


class AshaTrial(Record):
    """What a trial competes with."""

    rule: AshaRule
    folder: str
    """Folder of the trial."""
    num_steps: int
    """Steps of its whole training."""
    competitors: dict[str, str]
    """Label -> folder of the same model at other learning rates."""


def asha_trials(plan: SweepPlan, sweep: SweepSettings) -> dict[str, AshaTrial]:
    """Return key -> comparison of the trials that can be stopped early; empty without ASHA."""
    if plan.kind != "iterations" or not sweep.asha:
        return {}
    rule = AshaRule(first_rung=sweep.asha_first_rung, reduction_factor=sweep.asha_reduction_factor)
    models: dict[str, list[Trial]] = {}
    for trial in plan.trials:
        if trial.job:
            models.setdefault(_without_learning_rate(trial), []).append(trial)
    return {
        trial.key: AshaTrial(
            rule=rule,
            folder=trial.folder,
            num_steps=trial.job.recipe.num_steps,
            competitors={other.label: other.folder for other in same if other is not trial},
        )
        for same in models.values()
        for trial in same
        if trial.job and len(same) > 1
    }


def _without_learning_rate(trial: Trial) -> str:
    assert trial.job is not None
    recipe = trial.job.recipe.model_copy(update={"learning_rate": None})
    changes = {"recipe": recipe, "run_folder": "", "first_stages": None}
    return trial.job.model_copy(update=changes).model_dump_json(warnings=False)


def asha_scheduler(asha: Mapping[str, AshaTrial]) -> AshaByModel | None:
    """Return the Tune scheduler that stops a model's worse learning rates; None without ASHA."""
    if not asha:
        return None
    from orchestrator.cluster.asha_scheduler import AshaByModel, Contestant  # Imports Ray.

    contestants = {
        key: Contestant(
            model=min([trial.folder, *trial.competitors.values()]),
            folder=trial.folder,
            num_steps=trial.num_steps,
            first_rung=max(1, math.ceil(trial.rule.first_rung * trial.num_steps)),
        )
        for key, trial in asha.items()
    }
    factor = next(iter(asha.values())).rule.reduction_factor
    return AshaByModel(contestants, factor, partial(stop_early, dict(asha)))


def stop_early(asha: Mapping[str, AshaTrial], key: str, step: int, loss: float) -> None:
    """Store why a trial is stopped, and ask its training to save and return.

    A reason that is there already stays.
    """
    trial = asha[key]
    path = Path(trial.folder) / STOPPED_NAME
    if not path.exists():
        losses = {label: _loss_near(step, other) for label, other in trial.competitors.items()}
        better = min(losses, key=lambda label: losses[label])
        reason = f"its validation loss is {loss:.3f}, {better} had {losses[better]:.3f}"
        stop = EarlyStop(
            rule=trial.rule,
            step=step,
            num_steps=trial.num_steps,
            competitor=better,
            reason=reason,
        )
        stop.write(path)
    request_stop(Path(trial.folder))


def _loss_near(step: int, folder: str) -> float:
    """Return a training's loss at the validation nearest to a step; infinite before the first."""
    from orchestrator.cluster.asha_scheduler import validation_losses

    losses = validation_losses(read_journal(Path(folder))[0])
    return min(((abs(at - step), loss) for at, loss in losses), default=(0, math.inf))[1]


def stored_early_stop(trial: Trial, asha: AshaTrial | None) -> EarlyStop | None:
    """Return why a trial was stopped, if it was: by this rule, for one of these competitors."""
    if asha is None or trial.result():
        return None
    stop = EarlyStop.read(Path(trial.folder) / STOPPED_NAME)
    is_same = stop and stop.rule == asha.rule and stop.competitor in asha.competitors
    return stop if is_same else None


def discard_early_stop(trial: Trial) -> None:
    """Delete the message that stopped a trial, so that it can train to its end."""
    clear_stop_request(Path(trial.folder))
    (Path(trial.folder) / STOPPED_NAME).unlink(missing_ok=True)
