"""How far each trial of a plan is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.planning.estimate import Estimate
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.settings import SweepSettings
from orchestrator.sweeping.asha import asha_trials, stored_early_stop
from orchestrator.training.job import finished_outcome
from orchestrator.training.run import DIVERGED_EVENT
from orchestrator.workspace.journal import FAILED_EVENT, STOPPED_EVENT, read_tail


@dataclass(frozen=True, kw_only=True)
class TrialState:
    """How far a trial is."""

    trial: Trial
    name: Literal["finished", "stopped early", "to measure", "to train"]
    """Its state, or what is done next."""
    training: Estimate | None = None
    """Its training, if that is not finished."""

    @property
    def steps_done(self) -> int:
        """Training steps that it resumes after."""
        return self.training.steps_done if self.training else 0

    @property
    def text(self) -> str:
        """The state in a table."""
        return f"from step {self.steps_done:,}" if self.steps_done else self.name


def trial_states(plan: SweepPlan, sweep: SweepSettings) -> list[TrialState]:
    """Return how far each trial of a plan is."""
    asha = asha_trials(plan, sweep)
    states = []
    for trial in plan.trials:
        if trial.result():
            states.append(TrialState(trial=trial, name="finished"))
        elif stored_early_stop(trial, asha.get(trial.key)):
            states.append(TrialState(trial=trial, name="stopped early"))
        elif trial.job is None or finished_outcome(trial.job):
            states.append(TrialState(trial=trial, name="to measure"))
        else:
            training = Estimate.of(trial.job)
            states.append(TrialState(trial=trial, name="to train", training=training))
    return states


def recorded_end(folder: Path) -> tuple[str, str] | None:
    """Return MLflow's status and the reason of a training or trial that ended without a result.

    They are those that the journal ends with; None if it is empty.
    """
    records = read_tail(folder)
    if not records:
        return None
    name = records[-1].get("name")
    status = "FAILED" if name in (FAILED_EVENT, DIVERGED_EVENT) else "KILLED"
    has_reason = status == "FAILED" or name == STOPPED_EVENT
    return status, str(records[-1].get("text", "")) if has_reason else ""


def requested_noun(plan: SweepPlan, sweep: SweepSettings) -> str:
    """Return what `num_requested` of a plan counts."""
    if plan.kind == "iterations":
        return "model"
    return "threshold" if sweep.thresholds else "budget" if sweep.budgets else "schedule"
