"""What `iiet-orch sweep FILE` does: each kind of sweep file leads to its procedure, or its plan.

The schedules of a threshold sweep follow from its teacher's influence. Where the teacher is not
trained yet, the plan is that of its training, with the most that students may come to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.data.preparation import prepare
from orchestrator.pipelines.context import Desk
from orchestrator.pipelines.pretraining import pretraining_job
from orchestrator.pipelines.reports import show_plan
from orchestrator.pipelines.sweep_plans import plan_iterations, plan_suite, plan_thresholds
from orchestrator.pipelines.sweeps import quickstart, show_search_plan, sweep_iterations
from orchestrator.settings import Settings
from orchestrator.sweeping.checks import Kind, check_sweep
from orchestrator.sweeping.models import TEACHER, check_models, most_students, teacher_and_baselines
from orchestrator.sweeping.variants import Variant, iterations_plan
from orchestrator.terminal.formatting import format_count
from orchestrator.terminal.layout import print_line
from orchestrator.training.job import TrainingJob, finished_outcome


def run_file(settings: Settings, desk: Desk, *, dry_run: bool = False) -> None:
    """Run the sweep that a settings file describes, its teacher's pretraining included."""
    if settings.sweep.kind == "iterations":
        if dry_run:
            show_plan(plan_iterations(settings, desk), settings, desk)
        else:
            sweep_iterations(settings, desk)
    elif dry_run:
        _show_plan(settings, desk, settings.sweep.kind)
    else:
        quickstart(settings, desk)


def _show_plan(settings: Settings, desk: Desk, kind: Kind) -> None:
    """Print the plan of a sweep over students, as far as it follows from what is trained."""
    check_sweep(settings, kind, desk.progress)
    check_models(settings, kind)
    tokens = prepare(settings.data, desk.workspace, desk.progress)
    jobs = {
        name: pretraining_job(own, desk.workspace, tokens)
        for name, own in teacher_and_baselines(settings).items()
    }
    outcomes = {name: finished_outcome(job, desk.progress.note) for name, job in jobs.items()}
    outcome = outcomes[TEACHER]
    if outcome is None or outcome.checkpoint is None:
        _show_pretraining(settings, desk, jobs)
    elif kind == "search":
        show_search_plan(settings, desk, Path(outcome.checkpoint), None)
    else:
        show_plan(plan_thresholds(settings, desk, Path(outcome.checkpoint)), settings, desk)


def _show_pretraining(settings: Settings, desk: Desk, jobs: Mapping[str, TrainingJob]) -> None:
    """Print what comes before the schedules are known, and the most that these may be."""
    tokens, config = Path(jobs[TEACHER].tokens_folder), jobs[TEACHER].config()
    plan = iterations_plan(
        [Variant(label=name, job=job) for name, job in jobs.items()],
        suite=plan_suite(settings.evaluation, tokens, config, desk.progress),
        name="the teacher and its baselines",
    )
    # They are pretrained on the cluster's places, not on those of the sweep's trials.
    places = settings.sweep.model_copy(update={"gpus_per_trial": settings.cluster.num_gpus})
    show_plan(plan, settings.model_copy(update={"sweep": places}), desk)
    recipe, most = settings.distillation.training, most_students(settings, config)
    is_pruned = settings.distillation.control == "pruned"
    num_tokens = recipe.num_steps * recipe.num_tokens_per_step
    training = "none of them trained" if is_pruned else f"each on {num_tokens:,} tokens"
    print_line(
        desk.console,
        f"  then at most {format_count(most, 'student')}, {training}; their schedules follow "
        "from the teacher's influence, and stand in this plan once it is trained",
    )
