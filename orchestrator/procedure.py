"""The procedures that are more than one stage: the whole job, and the sweeps from checkpoint to
front.

Stages do not know each other; here they are put in their order, and what one leaves on disk is
handed to the next. Everything can be repeated: each stage finds what is finished, so a procedure
that was interrupted goes on when it is called again, and one that was finished only shows its
front.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from iiet.config import ModelConfig
from iiet.influence import InfluenceTable
from orchestrator.analysis.requested import HELDOUT, requested_tasks
from orchestrator.analysis.results import SweepResults
from orchestrator.analysis.subject import open_subjects, short_names
from orchestrator.catalog import (
    NO_CORRECTIONS,
    find_references,
    tokens_of,
)
from orchestrator.cluster import ray_cluster
from orchestrator.console import Progress
from orchestrator.data.tokens import open_tokens
from orchestrator.desk import Desk
from orchestrator.errors import StageFailed, UserError
from orchestrator.plan import PlannedTrial, SweepPlan, iterations_plan, threshold_plan
from orchestrator.provenance import environment
from orchestrator.settings import EvaluationSettings, ModelSettings, Settings, flatten
from orchestrator.showing import show_plan, show_report
from orchestrator.stages.evaluate import evaluate
from orchestrator.stages.influence import measure_influence
from orchestrator.stages.prepare import prepare
from orchestrator.stages.pretrain import plan_pretraining, pretrain
from orchestrator.stages.report import write_report
from orchestrator.stages.sweep import SweepOutcome, sweep
from orchestrator.training.checkpoint import load_config
from orchestrator.training.job import finished_outcome
from orchestrator.views import evaluation_table, tasks_with_other_items

VANILLA = "vanilla"


def quickstart(settings: Settings, desk: Desk) -> SweepOutcome:
    """Do the whole job: tokens, teacher and references, influence, threshold sweep, front.

    Args:
        settings: Section `model` is the teacher's; vanilla and r = 0 share its shape and recipe.
        desk: Workspace, tracking and terminal.
    """
    tokens = prepare(settings.data, desk.workspace, desk.progress)
    reference_models = {
        VANILLA: _with_model(settings, method="vanilla"),
        NO_CORRECTIONS: _with_model(settings, corrections=0),
    }
    with ray_cluster():
        every = {"teacher": settings, **reference_models}
        checkpoints = pretrain(
            every, desk.workspace, tokens, tracking=desk.tracking, progress=desk.progress
        )
        references = [(label, checkpoints[label]) for label in reference_models]
        return sweep_thresholds(settings, desk, checkpoints["teacher"], references=references)


def sweep_thresholds(
    settings: Settings,
    desk: Desk,
    teacher: Path,
    *,
    references: Iterable[tuple[str, Path]] | None = None,
    name: str | None = None,
) -> SweepOutcome:
    """Measure a teacher's influence, distill the schedules that thresholds lead to, show the front.

    Args:
        settings: Sections `influence`, `sweep`, `distillation` and `evaluation` count.
        desk: Workspace, tracking and terminal.
        teacher: Checkpoint of the full model.
        references: Label and checkpoint of models to show beside it; those of the workspace that
            were trained on the same tokens in the same shape when unset.
        name: Name of the sweep; made from its content when unset.
    """
    influence = _influence(settings, desk, teacher)
    plan = _plan_thresholds(settings, desk, teacher, influence, references, name)
    return _run_and_show(plan, settings, desk, influence)


def plan_thresholds(
    settings: Settings, desk: Desk, teacher: Path, *, name: str | None = None
) -> SweepPlan:
    """Plan a threshold sweep, which takes the influence and the tasks but no training."""
    return _plan_thresholds(
        settings, desk, teacher, _influence(settings, desk, teacher), None, name
    )


def _plan_thresholds(
    settings: Settings,
    desk: Desk,
    teacher: Path,
    influence: InfluenceTable,
    references: Iterable[tuple[str, Path]] | None,
    name: str | None,
) -> SweepPlan:
    tokens = tokens_of(teacher, desk.workspace)
    if references is None:
        references = find_references(desk.workspace, teacher)
    return threshold_plan(
        settings,
        desk.workspace,
        teacher=teacher,
        influence=influence,
        suite=plan_suite(settings.evaluation, tokens, load_config(teacher), desk.progress),
        references=list(references),
        name=name,
    )


def sweep_iterations(settings: Settings, desk: Desk, *, name: str | None = None) -> SweepOutcome:
    """Pretrain several methods and iteration counts on the same tokens, and show them on one front.

    Args:
        settings: Section `sweep` names methods and counts, `training` is the recipe of all.
        desk: Workspace, tracking and terminal.
        name: Name of the sweep; made from its content when unset.
    """
    return _run_and_show(plan_iterations(settings, desk, name=name), settings, desk)


def plan_iterations(settings: Settings, desk: Desk, *, name: str | None = None) -> SweepPlan:
    """Plan a sweep over methods and iteration counts."""
    tokens = prepare(settings.data, desk.workspace, desk.progress)
    variants: dict[str, Settings] = {}
    for method in settings.sweep.methods:
        if method != "iiet":
            variants[method] = _with_model(settings, method=method)
            continue
        for count in settings.sweep.iterations:
            variants[f"r = {count}"] = _with_model(settings, corrections=count)
    jobs = [
        (label, plan_pretraining(variant, desk.workspace, tokens))
        for label, variant in variants.items()
    ]
    suite = plan_suite(settings.evaluation, tokens, jobs[0][1].config(), desk.progress)
    return iterations_plan(jobs, suite=suite, name=name)


def plan_suite(
    settings: EvaluationSettings, tokens: Path, config: ModelConfig, progress: Progress
) -> dict[str, Any]:
    """Return what is measured as a plain value: the held-out tasks, made if need be, or tasks by
    name.
    """
    asked = requested_tasks(
        settings, lambda: tokens, context_length=config.context_length, progress=progress
    )
    # Alone they need no names: they are all tasks of their folder.
    is_heldout_alone = settings.suite == HELDOUT and not settings.include_path
    suite: dict[str, Any] = {
        "tokens": open_tokens(tokens).fingerprint,
        "tokens_folder": str(tokens),
        "tasks": [] if is_heldout_alone else list(asked.names),
        "suite": asked.heldout.name if asked.heldout else "",
        "suite_folder": str(asked.heldout or ""),
        "include_folder": settings.include_path or "",
        "batch_size": settings.batch_size,
        "limit": settings.limit,
    }
    # Left out where unset, so that trials that were measured before the setting existed are found.
    few = {} if settings.num_fewshot is None else {"num_fewshot": settings.num_fewshot}
    return suite | few


def _influence(settings: Settings, desk: Desk, teacher: Path) -> InfluenceTable:
    return measure_influence(
        teacher,
        settings.influence,
        tokens_of(teacher, desk.workspace),
        tracking=desk.tracking,
        progress=desk.progress,
    )


def _with_model(settings: Settings, **changes: Any) -> Settings:
    """Return the settings of another method or count, at that method's own learning rate."""
    model = ModelSettings.model_validate({**settings.model.model_dump(), **changes})
    rate = settings.sweep.learning_rates.get(model.method, settings.training.learning_rate)
    training = settings.training.model_copy(update={"learning_rate": rate})
    return settings.model_copy(update={"model": model, "training": training})


def _run_and_show(
    plan: SweepPlan, settings: Settings, desk: Desk, influence: InfluenceTable | None = None
) -> SweepOutcome:
    outcome = sweep(plan, settings, desk.workspace, tracking=desk.tracking, progress=desk.progress)
    found = SweepResults(
        name=plan.name,
        key=plan.key,
        results=outcome.results,
        influence=influence,
        facts={
            "Trials": _states(plan, outcome),
            "Settings": flatten(settings),
            "Provenance": _provenance(plan),
        },
    )
    written = write_report(desk.workspace, found, tracking=desk.tracking)
    show_report(written, desk)
    if outcome.failures:
        failed = ", ".join(outcome.failures)
        raise StageFailed(
            f"{len(outcome.failures)} trials failed ({failed}); the same command tries them again"
        )
    return outcome


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
        paths: Checkpoints, runs or model folders; the workspace's newest IIET when empty.
        schedules: Iteration schedules that each is measured under; its own when empty.
        trust_remote_code: Whether code that lies in a model folder may run.
    """
    # All are opened first: a mistake in the last shall not cost the time of the others.
    subjects = open_subjects(desk.workspace, paths, schedules)
    evaluations = [
        evaluate(
            subject,
            settings.evaluation,
            desk.workspace,
            trust_remote_code=trust_remote_code,
            tracking=desk.tracking,
            progress=desk.progress,
        )
        for subject in subjects
    ]
    named = dict(zip(short_names(subjects), evaluations, strict=True))
    desk.console.print(evaluation_table(named))
    if different := tasks_with_other_items(evaluations):
        desk.progress.note(
            f"not comparable: {', '.join(different)} had other items for some of the models, "
            "which were trained on different tokens"
        )


def run_file(settings: Settings, desk: Desk, *, dry_run: bool = False) -> None:
    """Run the sweep that a settings file describes, its teacher's pretraining included."""
    if settings.sweep.kind == "iterations":
        if dry_run:
            show_plan(plan_iterations(settings, desk), desk)
        else:
            sweep_iterations(settings, desk)
    elif dry_run:
        teacher = _finished_teacher(settings, desk)
        show_plan(plan_thresholds(settings, desk, teacher), desk)
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
