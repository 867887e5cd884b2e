"""Trials with their keys: of checkpoints, trainings, a teacher's students and elastic weights.

A trial's key is the hash of all that determines its result, and its folder is named by the hash of
all that determines its weights. So a second sweep, another range of thresholds or a restart finds
finished trials, and other tasks are measured with the same weights without training again.

Elastic weights are one training, and a trial for each schedule. The trial of the full schedule
trains them. The others are measured with its checkpoint, so they wait for it; their keys follow
from the training, and are known before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.distillation import DistillationConfig
from iiet.pruning import FamilyMember
from iiet.schedule import IterationSchedule
from orchestrator.models.folder import load_config, weights_key
from orchestrator.planning.estimate import Estimate, price_of_trials
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import (
    AshaRule,
    EarlyStop,
    Role,
    SweepPlan,
    Trial,
    TrialSuite,
    teacher_or_costliest,
)
from orchestrator.settings import (
    DistillationSettings,
    ElasticSettings,
    Settings,
    SweepSettings,
    TrainingSettings,
)
from orchestrator.terminal.render import format_count
from orchestrator.training.job import folder_of_weights, job_key, sequences_per_step
from orchestrator.training.schedules import checked_family
from orchestrator.training.teacher_cache import answers_plan
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import STOPPED_NAME, Workspace, checkpoint_name
from orchestrator.workspace.provenance import content_key


def exact_cost(config: ModelConfig, full: ModelConfig) -> dict[str, float]:
    """Return the cost of a model in all units that follow from shapes, and relative to `full`."""
    cost, most = inference_cost(config), inference_cost(full)
    return {
        "evaluations": cost.evaluations_per_token,
        "relative_evaluations": cost.evaluations_per_token / most.evaluations_per_token,
        "flops_per_token": cost.decode_flops_per_token,
        "relative_flops": cost.decode_flops_per_token / most.decode_flops_per_token,
        "prefill_flops_per_token": cost.prefill_flops_per_token,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "weight_bytes_per_token": cost.weight_bytes_per_token,
        "num_parameters": cost.num_parameters,
    }


def full_trial(plan: SweepPlan) -> Trial:
    """Return the trial that the others are compared with; see `teacher_or_costliest`."""
    found = teacher_or_costliest(
        plan.trials,
        role=lambda trial: trial.role,
        cost=lambda trial: inference_cost(trial.model).evaluations_per_token,
    )
    assert found is not None, "a plan has trials"
    return found


def full_config(plan: SweepPlan) -> ModelConfig:
    """Return the model that relative costs are relative to."""
    return full_trial(plan).model


def evaluation_key(weights: str, suite: TrialSuite) -> str:
    """Return the key of a trial.

    Args:
        weights: Key of the training, or of a checkpoint under a schedule.
        suite: What is measured.
    """
    return content_key("trial", weights, suite.key)


def checkpoint_trial(
    role: Role,
    label: str,
    checkpoint: Path,
    config: ModelConfig,
    suite: TrialSuite,
    workspace: Workspace,
) -> Trial:
    """Return the trial that measures a checkpoint without training it."""
    # A pruned student under all corrections is another trial than its teacher.
    kind = "pruned" if role == "trial" else "as it is"
    weights = content_key(kind, weights_key(checkpoint), config.to_dict())
    return Trial(
        key=evaluation_key(weights, suite),
        role=role,
        label=label,
        model=config,
        folder=str(workspace.trials / weights),
        checkpoint=str(checkpoint),
        suite=suite,
    )


def trained_trial(
    role: Role,
    label: str,
    job: TrainingJob,
    suite: TrialSuite,
    workspace: Workspace,
    *,
    member: FamilyMember | None = None,
    seed: int | None = None,
) -> Trial:
    """Return the trial that trains a teacher's student, and measures it.

    Args:
        role: `trial` or `baseline`.
        label: Name without the seed.
        job: The training; its folder is that of a finished one, or follows from its key.
        suite: What is measured.
        workspace: Where trials are stored.
        member: Its thresholds are those that give this schedule.
        seed: Seed of the training if the sweep has several; the recipe's when unset.
    """
    if seed is not None:
        job = job.model_copy(update={"recipe": job.recipe.model_copy(update={"seed": seed})})
    weights = job_key(job)
    folder = str(folder_of_weights(workspace, weights, workspace.trials / weights))
    return Trial(
        key=evaluation_key(weights, suite),
        role=role,
        label=label if seed is None else f"{label}, seed {seed}",
        model=job.model,
        folder=folder,
        job=job.model_copy(update={"run_folder": folder}),
        suite=suite,
        threshold_above=member.threshold_above if member else None,
        threshold_up_to=member.threshold_up_to if member else None,
        parent=job.provenance.get("teacher"),
        seed=seed,
        group=None if seed is None else label,
    )


def num_models(trials: Sequence[Trial]) -> int:
    """Return the number of schedules or models that a sweep is about; seeds count once.

    Of a teacher's students, schedules count: an elastic one and a separate one are the same.
    Baselines count where all models are trained from scratch.
    """
    own = [t for t in trials if t.role == "trial" or (t.job and t.parent is None)]
    return len({t.schedule if t.parent else t.group or t.key for t in own})


def num_distilled_baselines(trials: Sequence[Trial]) -> int:
    """Return the number of baselines that a sweep distills; seeds of one count once."""
    return len({t.group or t.key for t in trials if t.is_distilled_baseline})


SECTION = "distillation.training"
"""Settings section of the students' recipe."""


def student_job(
    distillation: DistillationSettings,
    *,
    teacher: Path,
    config: ModelConfig,
    tokens_folder: str,
    run_folder: str = "",
) -> TrainingJob | None:
    """Return the job that trains a student; None for the control without training.

    Raises:
        UserError: If a step of the training is not a whole number of sequences.
    """
    if distillation.control == "pruned":
        return None
    check_student_batch(distillation, config)
    recipe = checked_family(distillation.training, config, section=SECTION)
    is_scratch = distillation.control == "scratch"
    is_distilled = distillation.control == "distill"
    return TrainingJob(
        run_folder=run_folder,
        tokens_folder=tokens_folder,
        model=config,
        recipe=recipe,
        objective="pretrain" if is_scratch else "distill" if is_distilled else "cross_entropy",
        teacher_folder=str(teacher) if is_distilled else None,
        initial_folder=None if is_scratch else str(teacher),
        distillation=distillation_config(distillation) if is_distilled else None,
        section=SECTION,
        provenance={"teacher": weights_key(teacher)},
    )


def distillation_job(
    settings: Settings, workspace: Workspace, teacher: Path, schedule: str, tokens: Path
) -> TrainingJob:
    """Return the job that distills a teacher under a schedule, in the folder of a sweep's trial.

    Raises:
        UserError: If the schedule does not fit the teacher, or the control trains nothing.
    """
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
    job = student_job(
        settings.distillation, teacher=teacher, config=config, tokens_folder=str(tokens)
    )
    if job is None:
        raise UserError(
            "distillation.control=pruned trains nothing; "
            "`iiet-orch evaluate --schedule` measures it"
        )
    return job.model_copy(update={"run_folder": str(workspace.trials / job_key(job))})


def student_estimates(
    settings: Settings,
    teacher: ModelConfig,
    models: Sequence[tuple[ModelConfig, TrainingSettings]],
) -> list[Estimate]:
    """Return what the students of a teacher take, trained or not, with each of the sweep's seeds.

    Args:
        models: Each model and how it trains, but for the seed.
    """
    is_distilled = settings.distillation.control == "distill"
    loss = distillation_config(settings.distillation) if is_distilled else DistillationConfig()
    found = []
    for seed in settings.sweep.seeds or (settings.distillation.training.seed,):
        for config, training in models:
            recipe = training.model_copy(update={"seed": seed})
            cache = answers_plan(teacher, recipe, loss)
            found.append(
                Estimate(
                    config=config,
                    recipe=recipe,
                    section=SECTION,
                    teacher=teacher if is_distilled else None,
                    loss=loss,
                    cache=cache if is_distilled else None,
                )
            )
    return found


def check_student_batch(distillation: DistillationSettings, config: ModelConfig) -> None:
    """Check that a step of the students' training is a whole number of sequences.

    Raises:
        UserError: If it is not.
    """
    sequences_per_step(distillation.training, config, section=SECTION)


def distillation_config(distillation: DistillationSettings) -> DistillationConfig:
    """Return the loss that students are trained on."""
    return DistillationConfig(
        kl_weight=distillation.kl_weight,
        temperature=distillation.temperature,
        divergence=distillation.divergence,
        hidden_weight=distillation.hidden_weight,
        start_step=distillation.teacher_from_step,
        end_step=distillation.teacher_until_step,
    )


def student_trial(
    settings: Settings,
    workspace: Workspace,
    teacher: Path,
    config: ModelConfig,
    member: FamilyMember,
    suite: TrialSuite,
    *,
    seed: int | None = None,
) -> Trial:
    """Return the trial that trains and measures a student or a control under one schedule.

    Args:
        settings: Section `distillation`.
        workspace: Where trials are stored.
        teacher: Checkpoint of the full model.
        config: The student: the teacher's configuration under its own schedule.
        member: Its thresholds are those that give this schedule; NaN if none does.
        suite: What is measured.
        seed: Seed of the training if the sweep has several; the recipe's when unset.
    """
    distillation = settings.distillation
    job = student_job(
        distillation, teacher=teacher, config=config, tokens_folder=suite.tokens_folder
    )
    label = str(config.corrections)
    if distillation.control != "distill":
        label += f", {distillation.control.replace('_', ' ')}"
    if job:
        return trained_trial("trial", label, job, suite, workspace, member=member, seed=seed)
    trial = checkpoint_trial("trial", label, teacher, config, suite, workspace)
    thresholds = {
        "threshold_above": member.threshold_above,
        "threshold_up_to": member.threshold_up_to,
    }
    return trial.model_copy(update={**thresholds, "parent": weights_key(teacher)})


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


def asha_rule(sweep: SweepSettings) -> AshaRule:
    """Return when trials are compared, and how many continue."""
    return AshaRule(first_rung=sweep.asha_first_rung, reduction_factor=sweep.asha_reduction_factor)


def competing_trials(plan: SweepPlan, sweep: SweepSettings) -> list[list[Trial]]:
    """Return, for each model with several learning rates, its trials; none without ASHA."""
    if plan.kind != "iterations" or not sweep.asha:
        return []
    models: dict[str, list[Trial]] = {}
    for trial in plan.trials:
        if trial.job:
            recipe = trial.job.recipe.model_copy(update={"learning_rate": None})
            changes = {"recipe": recipe, "run_folder": "", "first_stages": None}
            same = trial.job.model_copy(update=changes).model_dump_json(warnings=False)
            models.setdefault(same, []).append(trial)
    return [trials for trials in models.values() if len(trials) > 1]


def early_stops(plan: SweepPlan, sweep: SweepSettings) -> dict[str, EarlyStop]:
    """Return key -> reason of the trials that were stopped early: by this rule, for a competitor
    that is in the plan. Those that have a result are among them."""
    found: dict[str, EarlyStop] = {}
    for trials in competing_trials(plan, sweep):
        labels = {trial.label for trial in trials}
        for trial in trials:
            stop = EarlyStop.read(Path(trial.folder) / STOPPED_NAME)
            if stop and stop.rule == asha_rule(sweep) and stop.competitor in labels - {trial.label}:
                found[trial.key] = stop
    return found
