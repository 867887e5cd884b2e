"""One teacher's students: their schedules, trainings and trials, and the baselines beside them.

A trial's key is the hash of all that determines its result, and its folder is named by the hash of
all that determines its weights. So any sweep or restart finds finished trials, and other tasks are
measured with the same weights. Of elastic weights, the trial of the full schedule trains them, and
those of the others wait for its checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from iiet.config import DistillationConfig, ModelConfig
from iiet.pruning import (
    Cost,
    FamilyMember,
    InfluenceTable,
    knapsack,
    num_evaluations,
    schedule_family,
    spread_over_cost,
)
from iiet.schedule import IterationSchedule
from orchestrator.models.folder import load_config, weights_key
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Role, Trial, TrialSuite
from orchestrator.settings import (
    DistillationSettings,
    ElasticSettings,
    Settings,
    SweepSettings,
    TrainingSettings,
)
from orchestrator.sweeping.models import (
    STUDENTS_SECTION,
    schedule_cost,
)
from orchestrator.terminal.render import format_count
from orchestrator.training.job import folder_of_weights, job_key, sequences_per_step
from orchestrator.training.schedules import checked_family
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, checkpoint_name
from orchestrator.workspace.provenance import content_key


def choose_members(
    influence: InfluenceTable, sweep: SweepSettings, *, cost: Cost = num_evaluations
) -> tuple[FamilyMember, ...]:
    """Return the schedules of a threshold sweep, costliest first, each once.

    Args:
        influence: The teacher's table.
        sweep: Thresholds, budgets or a number of schedules; and the selection.
        cost: Unit of the budgets, and the scale over which schedules are spread.

    Returns:
        Members with the thresholds that give them; those of a knapsack have none (NaN).

    Raises:
        UserError: If no correction matters more than another, so that none can be chosen.
    """
    values = [value for row in influence.value_rows for value in row]
    if len(set(values)) == 1 and (len(values) > 1 or values[0] == 0.0):
        raise UserError(
            f"influence.metric={influence.metric}: the influence of all corrections of the teacher "
            f"({format_count(len(values), 'correction')}) is {values[0]:g}, so they do nothing "
            "yet; train it further, or with a higher training.gate_rate_factor"
        )
    family = schedule_family(influence)
    if sweep.thresholds:
        wanted = {
            member.schedule
            for threshold in sweep.thresholds
            for member in family
            if member.threshold_above < threshold <= member.threshold_up_to
        }
    elif sweep.budgets:
        wanted = {family.within_cost(most, cost) for most in sweep.budgets}
    else:
        number = min(sweep.num_schedules, len(family))
        wanted = {member.schedule for member in spread_over_cost(family, number, cost=cost)}
    chosen = tuple(member for member in family if member.schedule in wanted)
    if sweep.selection != "knapsack":
        return chosen
    # The best schedule under each budget, or else at the cost of each chosen member.
    if sweep.budgets:
        budgets = sorted(sweep.budgets, reverse=True)
        best = [knapsack(influence, budget, cost=cost) for budget in budgets]
    else:
        best = [knapsack(influence, member.schedule.num_evaluations) for member in chosen]
    return tuple(FamilyMember(schedule, math.nan, math.nan) for schedule in dict.fromkeys(best))


# Trainings


def student_job(
    distillation: DistillationSettings, *, teacher: Path, config: ModelConfig, tokens_folder: str
) -> TrainingJob | None:
    """Return the job that trains a student; None for the control without training.

    Raises:
        UserError: If a step of the training is not a whole number of sequences.
    """
    if distillation.control == "pruned":
        return None
    sequences_per_step(distillation.training, config, section=STUDENTS_SECTION)
    is_scratch = distillation.control == "scratch"
    is_distilled = distillation.control == "distill"
    return TrainingJob(
        run_folder="",
        tokens_folder=tokens_folder,
        model=config,
        recipe=checked_family(distillation.training, config, section=STUDENTS_SECTION),
        objective="pretrain" if is_scratch else "distill" if is_distilled else "cross_entropy",
        teacher_folder=str(teacher) if is_distilled else None,
        initial_folder=None if is_scratch else str(teacher),
        distillation=_loss_of(distillation) if is_distilled else None,
        section=STUDENTS_SECTION,
        provenance={"teacher": weights_key(teacher)},
    )


def _loss_of(distillation: DistillationSettings) -> DistillationConfig:
    return DistillationConfig(
        kl_weight=distillation.kl_weight,
        temperature=distillation.temperature,
        divergence=distillation.divergence,
        hidden_weight=distillation.hidden_weight,
        start_step=distillation.teacher_from_step,
        end_step=distillation.teacher_until_step,
    )


def student_config(teacher: Path, schedule: str) -> ModelConfig:
    """Return a teacher's configuration under the schedule of a student.

    Raises:
        UserError: If the schedule does not fit the teacher.
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
    return config


def distillation_job(
    settings: Settings,
    workspace: Workspace,
    teacher: Path,
    config: ModelConfig,
    tokens: Path,
    kept_layers: tuple[int, ...] | None = None,
) -> TrainingJob:
    """Return the job that distills a teacher into a student, in the folder of a sweep's trial.

    Args:
        kept_layers: Numbers of the teacher's layers that the student has, the first being 0; all
            when unset.

    Raises:
        UserError: If the control trains nothing.
    """
    distillation = settings.distillation
    job = student_job(distillation, teacher=teacher, config=config, tokens_folder=str(tokens))
    if job is None:
        raise UserError(
            "distillation.control=pruned trains nothing; "
            "`iiet-orch evaluate --schedule` measures it"
        )
    if job.initial_folder:  # Random weights have no layers to keep.
        job = job.model_copy(update={"kept_layers": kept_layers})
    return job.model_copy(update={"run_folder": str(workspace.trials / job_key(job))})


def student_estimate(
    settings: Settings, teacher: ModelConfig, config: ModelConfig, recipe: TrainingSettings
) -> Estimate:
    """Return what a student takes whose teacher need not be trained."""
    is_distilled = settings.distillation.control == "distill"
    loss = _loss_of(settings.distillation) if is_distilled else DistillationConfig()
    return Estimate(
        config=config,
        recipe=recipe,
        section=STUDENTS_SECTION,
        teacher=teacher if is_distilled else None,
        loss=loss,
    )


def unknown_students(settings: Settings, teacher: ModelConfig) -> tuple[list[Estimate], str]:
    """Return a simple bound of what a teacher's students take, and a sentence that counts them.

    Their schedules are unknown, so each student makes all of the teacher's corrections.
    """
    sweep, recipe = settings.sweep, settings.distillation.training
    is_pruned, num_seeds = settings.distillation.control == "pruned", max(1, len(sweep.seeds))
    number = len(sweep.thresholds) or len(sweep.budgets) or sweep.num_schedules
    number = min(number, 1 + sum(teacher.corrections))
    if sweep.kind == "search":
        number = min(number + settings.search.num_trials, teacher.corrections.num_within)
    counts = format_count(number if is_pruned else number * num_seeds, "student")
    models: list[tuple[ModelConfig, TrainingSettings]] = []
    if not is_pruned and not sweep.elastic:
        models += [(teacher, recipe)] * number
    if sweep.elastic:
        # Each step trains the full schedule and those that are drawn: as so many students.
        passes = 1 + (recipe.elastic or ElasticSettings()).num_drawn
        steps = sweep.elastic_steps or recipe.num_steps
        models += [(teacher, recipe.model_copy(update={"num_steps": steps}))] * passes
        counts = format_count(num_seeds, "elastic training")
    trainings = [
        student_estimate(
            settings, teacher, config, own.model_copy(update={"seed": seed, "elastic": None})
        )
        for seed in sweep.seeds or (recipe.seed,)
        for config, own in models
    ]
    priced = "they are priced as if each made all of the teacher's corrections"
    return trainings, (
        f"its students' schedules are not known yet: at most {counts}; "
        f"{priced if trainings else 'none of them is trained'}"
    )


def without_elastic(settings: Settings) -> Settings:
    """Return the settings of students, each trained under one schedule."""
    distillation = settings.distillation
    recipe = distillation.training.model_copy(update={"elastic": None})
    students = distillation.model_copy(update={"training": recipe})
    return settings.model_copy(update={"distillation": students})


def _elastic(settings: Settings, schedules: Sequence[IterationSchedule]) -> DistillationSettings:
    """Return the settings of an elastic training from a teacher."""
    distillation, recipe = settings.distillation, settings.distillation.training
    elastic = recipe.elastic or ElasticSettings()
    changes = {
        "elastic": elastic.model_copy(update={"schedules": tuple(map(str, schedules))}),
        "num_steps": settings.sweep.elastic_steps or recipe.num_steps,
    }
    return distillation.model_copy(update={"training": recipe.model_copy(update=changes)})


# Trials


def make_trial(
    role: Role, label: str, weights: str, suite: TrialSuite, seed: int | None = None, **fields: Any
) -> Trial:
    """Return a trial whose key follows from its weights and from what is measured.

    Args:
        label: With the seed, if the sweep has several; without it, it is the trial's group.
        weights: Key of the training, or of a checkpoint under a schedule.
    """
    if seed is not None:
        fields |= {"seed": seed, "group": label}
        label = f"{label}, seed {seed}"
    key = content_key("trial", weights, suite.key)
    return Trial(key=key, role=role, label=label, suite=suite, **fields)


def checkpoint_trial(
    role: Role,
    label: str,
    checkpoint: Path,
    config: ModelConfig,
    suite: TrialSuite,
    workspace: Workspace,
    **fields: Any,
) -> Trial:
    """Return the trial that measures a checkpoint without training it."""
    # A pruned student under all corrections is another trial than its teacher.
    kind = "pruned" if role == "trial" else "as it is"
    weights = content_key(kind, weights_key(checkpoint), config.to_dict())
    folder = str(workspace.trials / weights)
    fields |= {"model": config, "folder": folder, "checkpoint": str(checkpoint)}
    return make_trial(role, label, weights, suite, **fields)


@dataclass(frozen=True)
class Students:
    """The trials of one teacher's students, and of the baselines beside them."""

    settings: Settings
    """Sections `sweep` and `distillation` count."""
    workspace: Workspace
    """Where trials are stored."""
    teacher: Path
    """Checkpoint of the full model."""
    suite: TrialSuite
    """What is measured."""
    influence: InfluenceTable | None = None
    """The teacher's; without it, the schedules of its students are not known."""
    baselines: Mapping[str, Path] = field(default_factory=dict)
    """Label -> checkpoint of models that stand beside the front."""
    name: str = ""
    """Name of the teacher, if the sweep has several."""
    seed: int | None = None
    """Seed of this teacher and of all its students, if the sweep has others of other seeds."""

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seeds that each student is trained with."""
        own = () if self.name else self.settings.sweep.seeds
        return own or (self.seed,)

    def label(self, text: str) -> str:
        """Return the label of a student: with its teacher's name, if there are several."""
        return f"{self.name}: {text}" if self.name else text

    @cached_property
    def full(self) -> ModelConfig:
        """The teacher."""
        return load_config(self.teacher)

    @cached_property
    def members(self) -> tuple[FamilyMember, ...]:
        """The students' schedules, costliest first."""
        if self.influence is None:
            return ()
        sweep = self.settings.sweep
        cost = schedule_cost(sweep.budget_unit, self.full)
        return choose_members(self.influence, sweep, cost=cost)

    def trials(self) -> list[Trial]:
        """Return the trials of the teacher, of elastic weights or students, and of baselines."""
        sweep = self.settings.sweep
        found = [self._measured("teacher", self.name or "teacher", self.teacher, self.full)]
        if self.influence and sweep.elastic:
            found += self._elastic_trials()
        if not sweep.elastic:
            is_trained = self.settings.distillation.control != "pruned"
            for seed in self.seeds if is_trained else (self.seed,):
                found += [self.student(member, seed) for member in self.members]
        for label, folder in self.baselines.items():
            found.append(self._measured("baseline", label, folder, load_config(folder)))
        return found

    def _measured(self, role: Role, label: str, checkpoint: Path, config: ModelConfig) -> Trial:
        where = self.suite, self.workspace
        return checkpoint_trial(role, label, checkpoint, config, *where, seed=self.seed)

    def _job(self, distillation: DistillationSettings, config: ModelConfig) -> TrainingJob | None:
        tokens = self.suite.tokens_folder
        return student_job(distillation, teacher=self.teacher, config=config, tokens_folder=tokens)

    def _trained(
        self, role: Role, label: str, job: TrainingJob, seed: int | None, **fields: Any
    ) -> Trial:
        if seed is not None:
            job = job.model_copy(update={"recipe": job.recipe.model_copy(update={"seed": seed})})
        weights, trials = job_key(job), self.workspace.trials
        # The folder is that of a finished training, or follows from its key.
        folder = str(folder_of_weights(self.workspace, weights, trials / weights))
        fields |= {
            "model": job.model,
            "folder": folder,
            "job": job.model_copy(update={"run_folder": folder}),
            "parent": job.provenance.get("teacher"),
        }
        return make_trial(role, self.label(label), weights, self.suite, seed, **fields)

    def student(self, member: FamilyMember, seed: int | None = None) -> Trial:
        """Return the trial that trains and measures a student, or a control, under a schedule."""
        config = replace(self.full, schedule=member.schedule)
        control, label = self.settings.distillation.control, str(config.corrections)
        if control != "distill":
            label += f", {control.replace('_', ' ')}"
        if job := self._job(without_elastic(self.settings).distillation, config):
            return self._trained("trial", label, job, seed, **_thresholds(member))
        return checkpoint_trial(
            "trial",
            self.label(label),
            self.teacher,
            config,
            self.suite,
            self.workspace,
            parent=weights_key(self.teacher),
            seed=seed,
            **_thresholds(member),
        )

    def _elastic_trials(self) -> list[Trial]:
        """Return the trials of elastic weights, for each seed the full schedule's first.

        The full schedule is always measured, too.

        Raises:
            UserError: If no schedule is below the full one.
        """
        full, of_schedule = self.full, {member.schedule: member for member in self.members}
        cheaper = [schedule for schedule in of_schedule if schedule != full.corrections]
        if not cheaper:
            raise UserError(
                "sweep.elastic trains schedules that are cheaper than the teacher's, and this "
                "sweep has none; set lower sweep.budgets, or higher sweep.thresholds than those "
                f"that keep {full.corrections}"
            )
        job = self._job(_elastic(self.settings, cheaper), full)
        assert job is not None, "check_sweep refuses controls"
        trials = []
        for seed in self.seeds:
            thresholds = _thresholds(of_schedule.get(full.corrections))
            label = f"{full.corrections}, elastic"
            trained = self._trained("trial", label, job, seed, is_elastic=True, **thresholds)
            trials.append(trained)
            assert trained.job is not None
            for schedule in cheaper:
                # The key is that of the training: the weights are not known before it.
                config = replace(full, schedule=schedule)
                weights = content_key("elastic", job_key(trained.job), config.to_dict())
                last = trained.job.folder / checkpoint_name(job.recipe.num_steps)
                trials.append(
                    make_trial(
                        "trial",
                        self.label(f"{schedule}, elastic"),
                        weights,
                        self.suite,
                        seed,
                        model=config,
                        folder=str(self.workspace.trials / weights),
                        checkpoint=str(last),
                        parent=trained.parent,
                        is_elastic=True,
                        **_thresholds(of_schedule[schedule]),
                    )
                )
        return trials


def _thresholds(member: FamilyMember | None) -> dict[str, float | None]:
    names = "threshold_above", "threshold_up_to"
    return {name: getattr(member, name) for name in names if member}
