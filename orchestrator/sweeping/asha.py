"""Which trials ASHA may stop early, and why it stopped one.

A trial competes with the same model at other learning rates, by validation loss on the same
held-out tokens; `cluster/asha_scheduler.py` decides. The reason lies beside a stopped trial, is
written once and is final. Such a trial keeps its checkpoint and has no result, so a sweep without
ASHA, or with another rule, trains it to its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from orchestrator.records.trial import AshaRule, AshaTrial, EarlyStop, SweepPlan, Trial
from orchestrator.settings import SweepSettings
from orchestrator.workspace.journal import read_journal, validation_losses
from orchestrator.workspace.layout import STOPPED_NAME


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


def record_early_stop(asha: Mapping[str, AshaTrial], key: str, step: int, loss: float) -> None:
    """Store why a trial is stopped. A reason that is there already stays."""
    trial = asha[key]
    path = Path(trial.folder) / STOPPED_NAME
    if path.exists():
        return
    losses = {label: _loss_near(step, other) for label, other in trial.competitors.items()}
    better = min(losses, key=lambda label: losses[label])
    reason = f"its validation loss is {loss:.3f}, {better} had {losses[better]:.3f}"
    stop = EarlyStop(
        rule=trial.rule, step=step, num_steps=trial.num_steps, competitor=better, reason=reason
    )
    stop.write(path)


def _loss_near(step: int, folder: str) -> float:
    """Return a training's loss at the validation nearest to a step; infinite before the first."""
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
    """Delete the reason why a trial was stopped, so that it can train to its end."""
    (Path(trial.folder) / STOPPED_NAME).unlink(missing_ok=True)
