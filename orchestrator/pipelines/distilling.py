"""Stage `distill`: one student, the teacher's weights under a cheaper schedule, trained with the
IIAD loss.

A student lies where a sweep would put it, so a sweep that comes to the same schedule finds it
trained. The controls (cross-entropy only, from scratch) run in the same way with the same recipe;
the control without training needs no stage: `evaluate --schedule` measures it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from iiet.config import ModelConfig
from iiet.schedule import IterationSchedule
from orchestrator.cluster.launch import check_jobs, run_jobs
from orchestrator.planning.preflight import check_jobs_fit
from orchestrator.settings import Settings, flatten
from orchestrator.sweeping.students import student_job
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import Tracking
from orchestrator.training.checkpoint import load_config
from orchestrator.training.job import job_key
from orchestrator.training.monitor import JournalFollower
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import Workspace


def distill(
    settings: Settings,
    workspace: Workspace,
    teacher: Path,
    schedule: str,
    tokens: Path,
    *,
    tracking: Tracking,
    local: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Train a student and return its checkpoint; a finished one is found again.

    Args:
        settings: Sections `distillation` and `cluster` count.
        workspace: Where the student lives.
        teacher: Checkpoint of the full model.
        schedule: The student's corrections, as typed: `1`, or one number a layer.
        tokens: Folder of prepared tokens.
        tracking: Where the run is shown.
        local: Train in this process, without Ray.
        progress: Told what is going on.

    Raises:
        UserError: If the schedule does not fit the teacher, or the control trains nothing.
        Interrupted: After Ctrl-C; says at which step the state is saved.
        RunFailed: If the run failed or diverged.
    """
    progress = progress or Progress()
    config = _student_config(teacher, schedule)
    job = student_job(
        settings.distillation, teacher=teacher, config=config, tokens_folder=str(tokens)
    )
    if job is None:
        raise UserError(
            "distillation.control=pruned trains nothing; "
            "`iiet-orch evaluate --schedule` measures it"
        )
    job = replace(job, run_folder=str(workspace.trials / job_key(job)))
    check_jobs([job], settings.cluster, local=local)
    check_jobs_fit([job], settings.cluster)
    label = str(config.corrections)
    follower = JournalFollower({label: job}, tracking, progress)
    follower.open_runs("distill", {label: {"schedule": label, **flatten(settings)}})
    progress.start("distill", job.recipe.num_steps)
    with follower:
        (outcome,) = run_jobs(
            [job],
            settings.cluster,
            local=local,
            watch=follower.look,
            note=progress.note,
            say=partial(progress.advance, 0),
        )
    progress.finish(f"schedule {label}, validation loss {outcome.validation_loss:.3f}")
    return Path(str(outcome.checkpoint))


def _student_config(teacher: Path, schedule: str) -> ModelConfig:
    """Return the teacher's configuration under a cheaper schedule, as typed."""
    full = load_config(teacher)
    try:
        wanted = IterationSchedule.parse(schedule, num_layers=full.num_layers)
        config = replace(full, schedule=wanted)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not wanted.is_within(full.corrections):
        raise UserError(
            f"the schedule {wanted} asks for more corrections than the teacher makes, "
            f"{full.corrections}"
        )
    return config
