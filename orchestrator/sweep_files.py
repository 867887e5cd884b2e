"""What `iiet-orch sweep FILE` does: each kind of sweep file leads to its procedure."""

from __future__ import annotations

from pathlib import Path

from orchestrator.desk import Desk
from orchestrator.errors import UserError
from orchestrator.procedure import quickstart, show_search_plan, sweep_iterations
from orchestrator.settings import Settings
from orchestrator.showing import show_plan
from orchestrator.stages.prepare import prepare
from orchestrator.stages.pretrain import plan_pretraining
from orchestrator.study import run_study
from orchestrator.sweep_plans import plan_iterations, plan_thresholds
from orchestrator.training.job import finished_outcome


def run_file(settings: Settings, desk: Desk, *, dry_run: bool = False) -> None:
    """Run the sweep that a settings file describes, its teacher's pretraining included."""
    if settings.sweep.kind == "study":
        run_study(settings, desk, dry_run=dry_run)
    elif settings.sweep.kind == "iterations":
        if dry_run:
            show_plan(plan_iterations(settings, desk), settings, desk)
        else:
            sweep_iterations(settings, desk)
    elif dry_run:
        teacher = _finished_teacher(settings, desk)
        if settings.sweep.kind == "search":
            show_search_plan(settings, desk, teacher, None)
            return
        show_plan(plan_thresholds(settings, desk, teacher), settings, desk)
    else:
        quickstart(settings, desk)


def _finished_teacher(settings: Settings, desk: Desk) -> Path:
    tokens = prepare(settings.data, desk.workspace, desk.progress)
    job = plan_pretraining(settings, desk.workspace, tokens)
    outcome = finished_outcome(job)
    if outcome is None or outcome.checkpoint is None:
        raise UserError(
            "the plan of a threshold sweep follows from its teacher's influence, and the teacher "
            f"is not trained yet ({job.run_folder}); `iiet-orch pretrain` trains it"
        )
    return Path(outcome.checkpoint)
