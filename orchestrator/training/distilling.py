"""The training of a student: its job, and its schedule relative to the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from iiet.model.config import DistillationConfig
from iiet.model.schedule import IterationSchedule, ScheduleLike
from orchestrator.models.folder import load_config, weights_key
from orchestrator.records.training import TrainingJob
from orchestrator.settings import DistillationSettings, Settings
from orchestrator.training.job import job_key, sequences_per_step
from orchestrator.training.schedules import checked_family
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace

STUDENTS_SECTION = "distillation.training"
"""Settings section of the students' recipe."""


def student_schedule(
    text: ScheduleLike, full: IterationSchedule, setting: str
) -> IterationSchedule:
    """Read a student's schedule, relative to the teacher, as a user writes it.

    Args:
        setting: The setting or option that holds it, for errors.

    Raises:
        UserError: If it has another number of layers than the teacher, or more corrections.
    """
    try:
        schedule = IterationSchedule.parse(text, num_layers=full.num_layers)
    except ValueError as error:
        raise UserError(f"{setting}: {error}") from None
    if not schedule.is_within(full):
        raise UserError(
            f"{setting}: the schedule {schedule} asks for more corrections than the teacher makes, "
            f"{full}"
        )
    return schedule


def student_job(
    distillation: DistillationSettings,
    *,
    teacher: Path,
    schedule: IterationSchedule,
    tokens_folder: str,
) -> TrainingJob | None:
    """Return the job that trains a student; None for the control without training.

    Args:
        schedule: The student's, relative to the teacher.

    Raises:
        UserError: If a step is not a whole number of sequences, or the loss compares hidden states
            with a student of fewer layers.
    """
    if distillation.control == "pruned":
        return None
    config = load_config(teacher).of_kept_layers(schedule)
    leaves_layers_out = bool(schedule.left_out_layers)
    if leaves_layers_out and distillation.control == "distill" and distillation.hidden_weight:
        raise UserError(
            f"distillation.hidden_weight={distillation.hidden_weight:g}: hidden states are "
            f"compared layer by layer, and a student under {schedule} has fewer layers; leave it "
            "out, or set sweep.leave_out_layers=none"
        )
    sequences_per_step(distillation.training, config, section=STUDENTS_SECTION)
    is_scratch = distillation.control == "scratch"
    is_distilled = distillation.control == "distill"
    objective: Literal["pretrain", "distill", "cross_entropy"] = "cross_entropy"
    if is_scratch:
        objective = "pretrain"
    elif is_distilled:
        objective = "distill"
    return TrainingJob(
        run_folder="",
        tokens_folder=tokens_folder,
        model=config,
        recipe=checked_family(distillation.training, config, section=STUDENTS_SECTION),
        objective=objective,
        teacher_folder=str(teacher) if is_distilled else None,
        initial_folder=None if is_scratch else str(teacher),
        # From random weights, there are no layers to keep.
        kept_layers=schedule.kept_layers if leaves_layers_out and not is_scratch else None,
        distillation=distillation_loss(distillation) if is_distilled else None,
        section=STUDENTS_SECTION,
        provenance={"teacher": weights_key(teacher)},
    )


def distillation_loss(distillation: DistillationSettings) -> DistillationConfig:
    """Return the loss of a student that learns from its teacher's predictions."""
    return DistillationConfig(
        kl_weight=distillation.kl_weight,
        temperature=distillation.temperature,
        divergence=distillation.divergence,
        hidden_weight=distillation.hidden_weight,
        start_step=distillation.teacher_from_step,
        end_step=distillation.teacher_until_step,
    )


def distillation_job(
    settings: Settings,
    workspace: Workspace,
    teacher: Path,
    schedule: IterationSchedule,
    tokens: Path,
) -> TrainingJob:
    """Return the job that distills a teacher into a student, in the folder of a sweep's trial.

    Args:
        schedule: The student's, relative to the teacher.

    Raises:
        UserError: If the control trains nothing.
    """
    job = student_job(
        settings.distillation, teacher=teacher, schedule=schedule, tokens_folder=str(tokens)
    )
    if job is None:
        raise UserError(
            "distillation.control=pruned trains nothing; "
            "`iiet-orch evaluate --schedule` measures it"
        )
    return job.model_copy(update={"run_folder": str(workspace.trials / job_key(job))})
