"""Distill one student: the teacher's weights under a cheaper schedule, trained with the IIAD loss.

A student is stored where a sweep stores it, so a sweep that plans the same schedule finds it
trained. The controls (cross-entropy only, from scratch) use the same recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iiet.schedule import IterationSchedule
from orchestrator.cluster.joining import check_ray_can_run
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.hub_imports import local_model
from orchestrator.pipelines.pretraining import PretrainResult, tracked_jobs
from orchestrator.planning.fit import check_trainings
from orchestrator.planning.resources import check_run_resources
from orchestrator.settings import Settings
from orchestrator.sweeping.student_plans import distillation_job
from orchestrator.terminal.progress import Progress
from orchestrator.training.model_lookup import resolve_teacher, tokens_folder_of
from orchestrator.workspace.layout import Workspace


@dataclass(frozen=True, kw_only=True)
class DistillResult(PretrainResult):
    """A distilled student."""

    schedule: IterationSchedule
    """The student's corrections."""

    def to_json(self) -> dict[str, Any]:
        """Return schedule, checkpoint and loss as JSON values."""
        return {"schedule": list(self.schedule), **super().to_json()}


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
    (student,) = distill_in_context(
        settings, context, schedules=[schedule], teacher=teacher, local=local
    )
    return student


def distill_in_context(
    settings: Settings,
    context: Context,
    *,
    schedules: Sequence[str | IterationSchedule],
    teacher: Path | str | None = None,
    local: bool = False,
) -> list[DistillResult]:
    """Distill a student under each schedule; as `distill`, after `check_run_resources`."""
    if not local:
        check_ray_can_run(settings.cluster.ray_address)
    checkpoint = resolve_teacher(context.workspace, local_model(context, teacher))
    tokens = tokens_folder_of(checkpoint, context.workspace)
    wanted = [str(schedule) for schedule in schedules]
    return distill_teacher(settings, context, checkpoint, wanted, tokens, local=local)


def distill_teacher(
    settings: Settings,
    context: Context,
    teacher: Path,
    schedules: Sequence[str],
    tokens: Path,
    *,
    local: bool = False,
) -> list[DistillResult]:
    """Distill a teacher on these tokens; equal schedules give one student; as `distill`."""
    planned = [
        distillation_job(settings, context.workspace, teacher, schedule, tokens)
        for schedule in schedules
    ]
    jobs = {str(job.model.corrections): job for job in planned}
    cluster = settings.cluster
    check_trainings(list(jobs.values()), cluster)
    named = dict.fromkeys(jobs, settings)
    with tracked_jobs("distill", jobs, named, cluster, context, local=local) as (run, _):
        outcomes = dict(zip(jobs, run(), strict=True))
    losses = [f"{label}: {outcome.validation_loss:.3f}" for label, outcome in outcomes.items()]
    context.progress.finish(f"validation loss by schedule {'; '.join(losses)}")
    return [
        DistillResult(
            checkpoint=Path(str(outcome.checkpoint)),
            validation_loss=outcome.validation_loss,
            schedule=jobs[label].model.corrections,
        )
        for label, outcome in outcomes.items()
    ]
