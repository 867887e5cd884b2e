"""The procedures that are more than one stage: the whole job, and the sweeps from checkpoint to
front.

Stages do not know each other; here they are put in their order, and what one leaves on disk is
handed to the next. Everything can be repeated: each stage finds what is finished, so a procedure
that was interrupted goes on when it is called again, and one that was finished only shows its
front.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from iiet.influence import InfluenceTable
from orchestrator.cluster.start import ray_cluster
from orchestrator.data.preparation import prepare
from orchestrator.evaluation.evaluated_model import open_models, short_names
from orchestrator.pipelines.context import Desk
from orchestrator.pipelines.evaluating import evaluate
from orchestrator.pipelines.pretraining import pretrain_models, pretraining_job
from orchestrator.pipelines.reports import show_plan, show_report
from orchestrator.pipelines.searching import plan_search, search_price
from orchestrator.pipelines.sweep_plans import influence_of, plan_iterations, plan_thresholds
from orchestrator.planning.feasibility import check_students_fit
from orchestrator.reporting.evaluation_tables import (
    average_notes,
    evaluation_table,
    tasks_with_other_items,
)
from orchestrator.reporting.sweep_report import write_sweep_report
from orchestrator.reporting.sweep_results import LEFT_OUT_TITLE, SweepResults
from orchestrator.settings import Settings, flatten
from orchestrator.sweeping.checks import Kind, check_sweep
from orchestrator.sweeping.execution import Grow, SweepOutcome, sweep
from orchestrator.sweeping.models import TEACHER, check_models, most_students, teacher_and_baselines
from orchestrator.sweeping.trials import PlannedTrial, SweepPlan
from orchestrator.terminal.layout import print_line
from orchestrator.training.job import finished_outcome
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.provenance import environment


def quickstart(settings: Settings, desk: Desk) -> SweepOutcome:
    """Do the whole job: tokens, teacher and baselines, influence, threshold sweep, front.

    Args:
        settings: Section `model` is the teacher's; vanilla and r = 0 share its shape and recipe.
        desk: Workspace, tracking and terminal.

    Raises:
        UserError: If something does not go together; nothing is trained then.
    """
    if settings.sweep.kind not in ("threshold", "search"):
        raise UserError(
            f"sweep.kind is {settings.sweep.kind}, which has no teacher to distill; "
            "`iiet-orch sweep FILE` runs what the file says"
        )
    is_search = settings.sweep.kind == "search"
    kind: Kind = "search" if is_search else "threshold"
    check_sweep(settings, kind, desk.progress)
    check_models(settings, kind)
    tokens = prepare(settings.data, desk.workspace, desk.progress)
    every = teacher_and_baselines(settings)
    jobs = [pretraining_job(own, desk.workspace, tokens) for own in every.values()]
    # Students of a teacher that is there are looked at when they are planned.
    if settings.distillation.control != "pruned" and finished_outcome(jobs[0]) is None:
        check_students_fit(settings, jobs, most_students(settings, jobs[0].config()))
    with ray_cluster(say=desk.progress.start):
        results = pretrain_models(every, desk, tokens)
        checkpoints = {label: result.checkpoint for label, result in results.items()}
        teacher = checkpoints.pop(TEACHER)
        procedure = search_schedules if is_search else sweep_thresholds
        return procedure(settings, desk, teacher, baselines=list(checkpoints.items()))


def sweep_thresholds(
    settings: Settings,
    desk: Desk,
    teacher: Path,
    *,
    baselines: Iterable[tuple[str, Path]] | None = None,
    name: str | None = None,
    failures: dict[str, str] | None = None,
) -> SweepOutcome:
    """Measure a teacher's influence, distill the schedules that thresholds lead to, show the front.

    Args:
        settings: Sections `influence`, `sweep`, `distillation` and `evaluation` count.
        desk: Workspace, tracking and terminal.
        teacher: Checkpoint of the full model.
        baselines: Label and checkpoint of models to show beside it; those of the workspace that
            were trained on the same tokens in the same shape when unset.
        name: Name of the sweep; made from its content when unset.
        failures: As in `run_and_show`.
    """
    influence = influence_of(settings, desk, teacher)
    plan = plan_thresholds(
        settings, desk, teacher, influence=influence, baselines=baselines, name=name
    )
    return run_and_show(plan, settings, desk, influence, failures=failures)


def search_schedules(
    settings: Settings,
    desk: Desk,
    teacher: Path,
    *,
    baselines: Iterable[tuple[str, Path]] | None = None,
    name: str | None = None,
) -> SweepOutcome:
    """Distill the threshold's schedules, then those that a sampler suggests; show all on one front.

    Args:
        settings: As those of a threshold sweep, and section `search`.
        desk: Workspace, tracking and terminal.
        teacher: Checkpoint of the full model.
        baselines: As those of a threshold sweep.
        name: Name of the sweep; made from its content when unset.
    """
    influence = influence_of(settings, desk, teacher)
    plan, search = plan_search(
        settings, desk, teacher, influence=influence, baselines=baselines, name=name
    )
    return run_and_show(plan, settings, desk, influence, grow=search.grow)


def show_search_plan(settings: Settings, desk: Desk, teacher: Path, name: str | None) -> None:
    """Print what a search would do, as far as it follows from what is finished."""
    plan, search = plan_search(settings, desk, teacher, name=name)
    found: list[PlannedTrial] = []
    if all(trial.result() for trial in plan.trials if trial.role == "trial"):
        found = search.finished_part()
    show_plan(replace(plan, trials=(*plan.trials, *found)), settings, desk)
    for line in search_price(plan, search, settings):
        print_line(desk.console, f"  {line}")


def sweep_iterations(settings: Settings, desk: Desk, *, name: str | None = None) -> SweepOutcome:
    """Pretrain several methods and iteration counts on the same tokens, and show them on one front.

    Args:
        settings: Section `sweep` names methods and counts, `training` is the recipe of all.
        desk: Workspace, tracking and terminal.
        name: Name of the sweep; made from its content when unset.
    """
    return run_and_show(plan_iterations(settings, desk, name=name), settings, desk)


def run_and_show(
    plan: SweepPlan,
    settings: Settings,
    desk: Desk,
    influence: InfluenceTable | None = None,
    *,
    grow: Grow | None = None,
    failures: dict[str, str] | None = None,
) -> SweepOutcome:
    """Run a plan, which a search may let grow, write its report and print it.

    Args:
        plan: The trials.
        settings: Section `sweep` says how they run.
        desk: Workspace, tracking and terminal.
        influence: The teacher's, where the sweep has one.
        grow: As in `stages.sweep.sweep`.
        failures: Takes up label and reason of the trials that failed, instead of an error.

    Raises:
        RunFailed: If a trial failed; the others are shown.
    """
    outcome = sweep(
        plan,
        settings,
        desk.workspace,
        tracking=desk.tracking,
        progress=desk.progress,
        grow=grow,
    )
    plan = outcome.plan
    found = SweepResults(
        name=plan.name,
        key=plan.key,
        results=outcome.results,
        influence=influence,
        facts={
            **({LEFT_OUT_TITLE: plan.left_out} if plan.left_out else {}),
            "Trials": _states(plan, outcome),
            "Settings": flatten(settings),
            "Provenance": _provenance(plan),
        },
    )
    written = write_sweep_report(desk.workspace, found, tracking=desk.tracking)
    show_report(written, desk)
    if failures is None:
        raise_failures(outcome.failures)
    else:
        failures |= outcome.failures
    return outcome


def raise_failures(failures: Mapping[str, str]) -> None:
    """Raise `RunFailed` that names the trials that failed, if there are any."""
    if failures:
        raise RunFailed(
            f"{len(failures)} trials failed ({', '.join(failures)}); the same command tries them "
            "again"
        )


def _states(plan: SweepPlan, outcome: SweepOutcome) -> dict[str, str]:
    """Say of each trial whether this call made it, found it finished, or could not."""
    found = {result.key for result in outcome.results}

    def state(trial: PlannedTrial) -> str:
        if trial.label in outcome.failures:
            return f"failed: {outcome.failures[trial.label]}"
        if trial.label in outcome.stopped:
            return outcome.stopped[trial.label]
        if trial.key not in found:
            return "not finished"
        if trial.key in outcome.reused:
            return "reused: it was finished before"
        return "trained and measured" if trial.job else "measured"

    return {trial.label: state(trial) for trial in plan.trials}


def _provenance(plan: SweepPlan) -> dict[str, Any]:
    return {
        "sweep": plan.key,
        "kind": plan.kind,
        "teacher": plan.teacher or "none",
        "tokens": plan.tokens_folder,
        "schedules asked for": plan.num_requested,
        "trials": len(plan.trials),
        **environment(),
    }


def evaluate_and_show(
    settings: Settings,
    desk: Desk,
    paths: Sequence[Path] | None = None,
    schedules: Sequence[str] | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Evaluate models and print their metrics side by side, with standard errors.

    Args:
        settings: Section `evaluation` counts.
        desk: Workspace, tracking and terminal.
        paths: Checkpoints, runs, their names, or model folders; the workspace's newest when empty.
        schedules: Iteration schedules that each is measured under; its own when empty.
        trust_remote_code: Whether code that lies in a model folder may run.
    """
    # All are opened first: a mistake in the last shall not cost the time of the others.
    models = open_models(desk.workspace, paths, schedules, warn=desk.progress.note)
    evaluations = [
        evaluate(
            model,
            settings.evaluation,
            desk.workspace,
            trust_remote_code=trust_remote_code,
            tracking=desk.tracking,
            progress=desk.progress,
        )
        for model in models
    ]
    named = dict(zip(short_names(models), evaluations, strict=True))
    desk.console.print(evaluation_table(named))
    for sentence in average_notes(named):
        print_line(desk.console, f"  {sentence}")
    if different := tasks_with_other_items(evaluations):
        desk.progress.note(
            f"not comparable: {', '.join(different)} had other items for some of the models, "
            "which were trained on different tokens"
        )
