"""Distill one student: the teacher's weights under a cheaper schedule, trained with the IIAD loss.

A student is stored where a sweep stores it, so a sweep that plans the same schedule finds it
trained. The controls (cross-entropy only, from scratch) use the same recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from iiet.schedule import IterationSchedule
from orchestrator.cluster.joining import check_ray_can_run
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.pretraining import PretrainResult, tracked_jobs
from orchestrator.planning.fit import check_trainings
from orchestrator.planning.resources import check_run_resources
from orchestrator.settings import Settings
from orchestrator.sweeping.student_plans import distillation_job
from orchestrator.terminal.progress import Progress
from orchestrator.training.model_lookup import resolve_teacher, tokens_folder_of
from orchestrator.workspace.folders import Workspace


@dataclass(frozen=True, kw_only=True)
class DistillResult(PretrainResult):
    """A distilled student."""

    schedule: IterationSchedule
    """The student's corrections."""


def distill(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    schedule: str | IterationSchedule,
    teacher: Path | str | None = None,
    local: bool = False,
    progress: Progress | None = None,
) -> DistillResult:
    """Distill a teacher into itself under a cheaper schedule; a finished student is found again.

    Args:
        settings: Sections `distillation` and `cluster`.
        schedule: The student's corrections: `1`, or one number a layer (`2,1,1,0,0,0`).
        teacher: A checkpoint or run, by path or name; the newest IIET with corrections when unset.
        local: Train in this process, without Ray.

    Raises:
        UserError: If there is no such teacher, the schedule does not fit it, or the control trains
            nothing.
        Interrupted: After Ctrl-C; says at which step the state is saved.
        RunFailed: If the run failed or diverged.
    """
    check_run_resources(settings.cluster, local=local)
    context = open_context(workspace, progress, loggers=settings.tracking.loggers)
    return distill_in_context(settings, context, schedule=schedule, teacher=teacher, local=local)


def distill_in_context(
    settings: Settings,
    context: Context,
    *,
    schedule: str | IterationSchedule,
    teacher: Path | str | None = None,
    local: bool = False,
) -> DistillResult:
    """Distill a teacher in an open workspace; as `distill`, after `check_run_resources`."""
    if not local:
        check_ray_can_run(settings.cluster.ray_address)
    checkpoint = resolve_teacher(context.workspace, Path(teacher) if teacher else None)
    tokens = tokens_folder_of(checkpoint, context.workspace)
    return distill_teacher(settings, context, checkpoint, str(schedule), tokens, local=local)


def distill_teacher(
    settings: Settings,
    context: Context,
    teacher: Path,
    schedule: str,
    tokens: Path,
    *,
    local: bool = False,
) -> DistillResult:
    """Distill a teacher on these tokens; as `distill`."""
    job = distillation_job(settings, context.workspace, teacher, schedule, tokens)
    check_trainings([job], settings.cluster)
    label = str(job.model.corrections)
    named, cluster = {label: settings}, settings.cluster
    with tracked_jobs("distill", {label: job}, named, cluster, context, local=local) as (run, _):
        (outcome,) = run()
    context.progress.finish(f"schedule {label}, validation loss {outcome.validation_loss:.3f}")
    return DistillResult(
        checkpoint=Path(str(outcome.checkpoint)),
        validation_loss=outcome.validation_loss,
        schedule=job.model.corrections,
    )
