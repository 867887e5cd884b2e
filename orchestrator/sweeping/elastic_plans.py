"""Plan the elastic weights of a threshold sweep: one training, and a trial for each schedule.

The trial of the full schedule trains the weights. The others are measured with its checkpoint, so
they wait for it; their keys follow from the training, and are known before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from iiet.config import ModelConfig
from iiet.pruning import FamilyMember
from orchestrator.models.folder import load_config
from orchestrator.planning.estimate import Estimate, price_of_trials
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.settings import DistillationSettings, ElasticSettings, Settings, TrainingSettings
from orchestrator.sweeping.trials import (
    evaluation_key,
    student_estimates,
    student_job,
    trained_trial,
)
from orchestrator.terminal.render import format_count
from orchestrator.training.job import job_key
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, checkpoint_name
from orchestrator.workspace.provenance import content_key


def elastic_trials(
    settings: Settings,
    workspace: Workspace,
    *,
    teacher: Path,
    members: Sequence[FamilyMember],
    suite: TrialSuite,
) -> list[Trial]:
    """Return the trials of elastic weights, for each seed the full schedule's first.

    Args:
        settings: Sections `sweep` and `distillation`.
        workspace: Where trials are stored.
        teacher: Checkpoint of the full model, whose weights they start from.
        members: The schedules, costliest first; the full one is always measured, too.
        suite: What is measured.

    Raises:
        UserError: If no schedule is below the full one.
    """
    full = load_config(teacher)
    of_schedule = {member.schedule: member for member in members}
    cheaper = [schedule for schedule in of_schedule if schedule != full.corrections]
    if not cheaper:
        raise UserError(
            "sweep.elastic trains schedules that are cheaper than the teacher's, and this sweep "
            f"has none; set lower sweep.budgets, or higher sweep.thresholds than those that keep "
            f"{full.corrections}"
        )
    job = student_job(
        _elastic_distillation(settings, [str(schedule) for schedule in cheaper]),
        teacher=teacher,
        config=full,
        tokens_folder=suite.tokens_folder,
    )
    assert job is not None, "check_sweep refuses controls"
    trials = []
    for seed in settings.sweep.seeds or (None,):
        label, member = f"{full.corrections}, elastic", of_schedule.get(full.corrections)
        trained = trained_trial("trial", label, job, suite, workspace, member=member, seed=seed)
        trained = trained.model_copy(update={"is_elastic": True})
        assert trained.job is not None
        trials.append(trained)
        for schedule in cheaper:
            # The key is that of the training, because the weights are not known before it.
            config, member = replace(full, schedule=schedule), of_schedule[schedule]
            weights = content_key("elastic", job_key(trained.job), config.to_dict())
            last, label = checkpoint_name(job.recipe.num_steps), f"{schedule}, elastic"
            changes = {
                "key": evaluation_key(weights, suite),
                "label": label if seed is None else f"{label}, seed {seed}",
                "group": None if seed is None else label,
                "model": config,
                "folder": str(workspace.trials / weights),
                "job": None,
                "checkpoint": str(trained.job.folder / last),
                "threshold_above": member.threshold_above,
                "threshold_up_to": member.threshold_up_to,
            }
            trials.append(trained.model_copy(update=changes))
    return trials


def elastic_upper_bound(
    settings: Settings, teacher: ModelConfig
) -> tuple[ModelConfig, TrainingSettings]:
    """Return the elastic model and its recipe, with a family that costs as much as any could.

    Members of a nested family cost at least one evaluation less than the one before.
    """
    schedule, chain = teacher.corrections, []
    while schedule.num_corrections:
        layer = max(range(len(schedule)), key=lambda number: schedule[number])
        schedule = schedule.with_layer(layer, schedule[layer] - 1)
        chain.append(str(schedule))
    most = settings.distillation.training.elastic or ElasticSettings()
    return teacher, _elastic_distillation(settings, chain[: most.num_drawn]).training


class ElasticFlops(NamedTuple):
    """Training FLOPs of all seeds of a sweep, from the first step on."""

    elastic: float
    """Of the elastic weights, what their teacher computes included."""
    separate: float
    """Of the student of each schedule, what their teacher computes included."""

    @property
    def share(self) -> float:
        """Share of the separate students' FLOPs that the elastic weights take."""
        return self.elastic / self.separate


def elastic_flops(settings: Settings, trials: Sequence[Trial], teachers: Path) -> ElasticFlops:
    """Return what elastic weights cost, and what the separate students of a sweep would cost.

    Args:
        settings: Sections `sweep` and `distillation`.
        trials: Those of elastic weights; at least one.
        teachers: Folder of stored teacher outputs.
    """
    jobs = [trial.job for trial in trials if trial.job]
    own = [replace(Estimate.of(job), steps_done=0) for job in jobs]
    recipe = without_elastic(settings).distillation.training
    models = {trial.model.corrections: (trial.model, recipe) for trial in trials}
    students = student_estimates(settings, jobs[0].model, [*models.values()])
    return ElasticFlops(
        *(price_of_trials(each, settings, teachers).flops for each in (own, students))
    )


def elastic_savings(settings: Settings, trials: Sequence[Trial], teachers: Path) -> str:
    """Say what `elastic_flops` returns."""
    jobs = [trial.job for trial in trials if trial.job]
    flops = elastic_flops(settings, trials, teachers)
    runs = "one elastic training" if len(jobs) == 1 else f"{len(jobs):,} elastic trainings"
    return (
        f"{runs} of {jobs[0].recipe.num_steps:,} steps: {flops.elastic:.3g} FLOPs, "
        f"{flops.share:.0%} of the {flops.separate:.3g} of "
        f"{format_count(len(trials), 'separate student')}"
    )


def without_elastic(settings: Settings) -> Settings:
    """Return the settings of students, each trained under one schedule."""
    distillation = settings.distillation
    recipe = distillation.training.model_copy(update={"elastic": None})
    students = distillation.model_copy(update={"training": recipe})
    return settings.model_copy(update={"distillation": students})


def _elastic_distillation(settings: Settings, schedules: Sequence[str]) -> DistillationSettings:
    """Return the settings of an elastic training from a teacher."""
    distillation = settings.distillation
    recipe: TrainingSettings = distillation.training
    elastic = recipe.elastic or ElasticSettings()
    changes = {
        "elastic": elastic.model_copy(update={"schedules": tuple(schedules)}),
        "num_steps": settings.sweep.elastic_steps or recipe.num_steps,
    }
    return distillation.model_copy(update={"training": recipe.model_copy(update=changes)})
