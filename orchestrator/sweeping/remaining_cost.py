"""Estimate what is left of a sweep's plan: tokens, FLOPs, hours, bytes.

A dry run prints the estimate, and it is stored with the sweep. Only training is counted, without
validation, saving and measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from iiet.cost import inference_cost
from orchestrator.planning.training_estimate import estimate_training
from orchestrator.planning.training_rate import assumed_training_rate
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial
from orchestrator.settings import ClusterSettings, Settings, SweepSettings
from orchestrator.sweeping.asha import asha_trials, stored_early_stop
from orchestrator.sweeping.trials import full_config
from orchestrator.training.checkpoint import load_provenance
from orchestrator.training.checkpoint_lookup import find_checkpoints, newest_checkpoint
from orchestrator.training.first_stage import first_stage_of
from orchestrator.training.job import finished_outcome
from orchestrator.training.schedules import flops_per_token_by_step
from orchestrator.training.teacher_cache_policy import estimate_teacher_work


@dataclass(frozen=True, kw_only=True)
class TrialState:
    """How far a trial is."""

    trial: Trial
    name: Literal["finished", "stopped early", "to measure", "to train"]
    """Its state, or what is done next."""
    steps_done: int = 0
    """Training steps that it resumes after."""

    @property
    def text(self) -> str:
        """The state in a table."""
        return f"from step {self.steps_done:,}" if self.steps_done else self.name


@dataclass(frozen=True, kw_only=True)
class RemainingCost:
    """Cost of the training that is left of a plan."""

    num_tokens: int
    """Tokens that the trials train on."""
    num_teacher_tokens: int
    """Tokens that their teacher reads."""
    flops: float
    """FLOPs of both."""
    hours: float
    """Hours of all CPUs of this machine together, or of one GPU, at the assumed rate."""
    most_hours: float
    """The same at the present load of this machine."""
    uses_gpus: bool
    """Whether the hours are a GPU's."""
    peak_flops: float
    """Peak FLOP/s of these CPUs or GPU; 0 if nothing is left."""
    usual_flops: float
    """FLOP/s at the present load."""
    share: float
    """Share of the FLOP/s that training is assumed to reach."""
    of_what: str
    """Name of the CPUs or GPU."""
    checkpoint_bytes: int
    """Upper bound of the trials' new checkpoints."""
    teacher_bytes: int
    """Size of the teacher's outputs that will be stored."""


def trial_states(plan: SweepPlan, sweep: SweepSettings) -> list[TrialState]:
    """Return how far each trial of a plan is."""
    asha = asha_trials(plan, sweep)
    states = []
    for trial in plan.trials:
        if trial.result():
            states.append(TrialState(trial=trial, name="finished"))
        elif stored_early_stop(trial, asha.get(trial.key)):
            states.append(TrialState(trial=trial, name="stopped early"))
        else:
            states.append(_waiting(trial))
    return states


def _waiting(trial: Trial) -> TrialState:
    job = trial.job
    if job is None or finished_outcome(job):
        return TrialState(trial=trial, name="to measure")
    newest = newest_checkpoint(job.folder)
    stage = first_stage_of(job)
    done = int(load_provenance(newest)["step"]) if newest else 0
    if stage and stage.exists:
        done = max(done, stage.num_steps)
    return TrialState(trial=trial, name="to train", steps_done=done)


def estimate_remaining_cost(
    plan: SweepPlan, states: Sequence[TrialState], settings: Settings, teachers: Path
) -> RemainingCost:
    """Return what is left to train, and what that takes.

    Raises:
        UserError: If a step is no whole number of sequences, or the teacher's outputs do not fit on
            the disk.
    """
    left = [state for state in states if state.name == "to train"]
    jobs = [state.trial.job for state in left if state.trial.job]
    done = _steps_made([state.steps_done for state in left], jobs)
    teacher = estimate_teacher_work(jobs, settings.distillation, teachers, steps_done=done)
    forward = inference_cost(full_config(plan)).forward_flops_per_token
    flops = sum(map(_training_flops, jobs, done)) + teacher.num_tokens * forward
    num_gpus = int(settings.trials_use_gpus)
    peak, usual, share, of_what = 0.0, 0.0, 0.0, ""
    if jobs:
        # CPU trials share the CPUs whole, however many run at once; a GPU's hours do not depend on
        # how many work.
        own = {"cluster": ClusterSettings(num_gpus=num_gpus), "training": jobs[0].recipe}
        rate = assumed_training_rate(settings.model_copy(update=own))
        (peak, usual), share, of_what = rate.flops_range, rate.utilization, rate.peak_source
    return RemainingCost(
        num_tokens=sum(
            (job.recipe.num_steps - steps) * job.recipe.num_tokens_per_step
            for job, steps in zip(jobs, done, strict=True)
        ),
        num_teacher_tokens=teacher.num_tokens,
        flops=flops,
        hours=flops / (peak * share) / 3600 if peak else 0.0,
        most_hours=flops / (usual * share) / 3600 if peak else 0.0,
        uses_gpus=num_gpus > 0,
        peak_flops=peak,
        usual_flops=usual,
        share=share,
        of_what=of_what,
        checkpoint_bytes=sum(map(_new_checkpoint_bytes, jobs)),
        teacher_bytes=teacher.num_bytes,
    )


def plan_record(plan: SweepPlan, settings: Settings, teachers: Path) -> dict[str, Any]:
    """Return what is stored of a plan: its trials, those found finished, and the remaining cost."""
    states = trial_states(plan, settings.sweep)
    values = plan.model_dump(mode="json")
    return {
        **{name: value for name, value in values.items() if name != "trials"},
        "requested": requested_noun(plan, settings.sweep) + "s",
        "reused": [state.trial.label for state in states if state.name == "finished"],
        "price": asdict(estimate_remaining_cost(plan, states, settings, teachers)),
        "trials": values["trials"],
    }


def requested_noun(plan: SweepPlan, sweep: SweepSettings) -> str:
    """Return what `num_requested` of a plan counts."""
    if plan.kind == "iterations":
        return "model"
    return "threshold" if sweep.thresholds else "budget" if sweep.budgets else "schedule"


def _steps_made(done: Sequence[int], jobs: Sequence[TrainingJob]) -> list[int]:
    """Return the steps after which each job resumes; one job trains a shared first stage."""
    made: set[Path] = set()
    found = []
    for steps, job in zip(done, jobs, strict=True):
        stage = first_stage_of(job)
        found.append(max(steps, stage.num_steps) if stage and stage.folder in made else steps)
        if stage:
            made.add(stage.folder)
    return found


def _training_flops(job: TrainingJob, steps_done: int) -> float:
    """Return the FLOPs of the steps that are left, each under its own schedule."""
    recipe, flops_at = job.recipe, flops_per_token_by_step(job)
    steps = range(steps_done, recipe.num_steps)
    return sum(map(flops_at, steps)) * recipe.num_tokens_per_step


def _new_checkpoint_bytes(job: TrainingJob) -> int:
    estimate = estimate_training(job.model, job.recipe)
    present = len(find_checkpoints(job.folder)) * estimate.checkpoint_bytes
    return max(0, estimate.disk_bytes - present)
