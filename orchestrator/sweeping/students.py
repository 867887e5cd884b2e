"""One teacher's students: their schedules, trainings and trials; and the baselines.

A trial's key is the hash of everything that determines its result; its folder is named by the hash
of everything that determines its weights. So any sweep finds finished trials again, and other tasks
are measured with the same weights. Elastic weights are trained by the trial of the full schedule;
the trials of cheaper schedules wait for its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from iiet.iiad.pruning import InfluenceTable, ThresholdSchedule
from iiet.model.config import DistillationConfig, ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.models.folder import load_config, weights_key
from orchestrator.models.labels import seed_label
from orchestrator.planning.estimate import Estimate
from orchestrator.records.evaluation import Suite
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Role, Trial, baseline_role
from orchestrator.settings import (
    DistillationSettings,
    ElasticSettings,
    SearchSettings,
    SweepSettings,
    TrainingSettings,
)
from orchestrator.sweeping.models import schedule_cost
from orchestrator.sweeping.retrofit import steps_at, training_flops
from orchestrator.sweeping.student_schedules import (
    StudentSchedule,
    choose_schedules,
    most_left_out,
    num_named,
)
from orchestrator.terminal.render import format_count
from orchestrator.training.distilling import STUDENTS_SECTION, distillation_loss, student_job
from orchestrator.training.job import folder_of_weights, job_key
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, checkpoint_name
from orchestrator.workspace.provenance import content_key

TEACHER_CONTINUED = "teacher, trained further"
"""Label of the control of a plain teacher."""


# Trainings


def student_estimate(
    distillation: DistillationSettings,
    teacher: ModelConfig,
    config: ModelConfig,
    recipe: TrainingSettings,
) -> Estimate:
    """Return the estimate of a student's training, without its teacher's."""
    is_distilled = distillation.control == "distill"
    loss = distillation_loss(distillation) if is_distilled else DistillationConfig()
    return Estimate(
        config=config,
        recipe=recipe,
        section=STUDENTS_SECTION,
        teacher=teacher if is_distilled else None,
        loss=loss,
    )


def most_students(sweep: SweepSettings, search: SearchSettings, teacher: ModelConfig) -> int:
    """Return the most schedules that a teacher's students can have, before they are known."""
    # In a family of nested schedules each leaves out one evaluation more.
    num_droppable = sum(teacher.corrections) + most_left_out(sweep, teacher)
    num_chosen = min(sweep.num_requested, 1 + num_droppable)
    num_schedules = num_chosen + num_named(sweep, num_chosen)
    if sweep.kind == "search":
        num_searched = num_schedules + search.num_trials
        return min(num_searched, teacher.corrections.num_within(most_left_out(sweep, teacher)))
    return num_schedules


def bound_of_students(
    sweep: SweepSettings, distillation: DistillationSettings, teacher: ModelConfig, number: int
) -> list[Estimate]:
    """Return trainings that cost at least as much as those of a teacher's unknown students.

    Each is assumed to make all of the teacher's corrections.

    Args:
        number: Number of unknown schedules; elastic weights are trained once for all of them.
    """
    recipe = distillation.training
    if distillation.control == "pruned":
        return []
    num_trainings = number
    if sweep.elastic:
        # Each step trains the full schedule and the drawn ones, like as many students.
        num_trainings = 1 + (recipe.elastic or ElasticSettings()).num_drawn
        num_steps = sweep.elastic_steps or recipe.num_steps
        recipe = recipe.model_copy(update={"num_steps": num_steps})
    bound = []
    for seed in sweep.seeds or (recipe.seed,):
        changes = {"seed": seed, "elastic": None}
        student_recipe = recipe.model_copy(update=changes)
        training = student_estimate(distillation, teacher, teacher, student_recipe)
        bound += [training] * num_trainings
        if not teacher.corrections.num_corrections:
            # The control: the teacher, fine-tuned with the FLOPs of the costliest student.
            bound.append(training)
    return bound


def bound_text(
    sweep: SweepSettings, distillation: DistillationSettings, teacher: ModelConfig, number: int
) -> str:
    """Say how many students a teacher has at most, and how they are priced.

    Arguments are those of `bound_of_students`.
    """
    is_pruned = distillation.control == "pruned"
    # Weights that are not trained have no seeds.
    num_seeds = 1 if is_pruned else max(1, len(sweep.seeds))
    if sweep.elastic:
        counts = format_count(num_seeds, "elastic training")
    else:
        counts = format_count(number * num_seeds, "student")
    price = "they are priced with all of the teacher's corrections"
    if not teacher.corrections.num_corrections:
        price = "they are priced with all of the teacher's layers"
    if is_pruned:
        price = "none of them is trained"
    return f"its students' schedules are not known yet: at most {counts}; {price}"


def without_elastic(distillation: DistillationSettings) -> DistillationSettings:
    """Return the settings of students that are trained one by one, without elastic training."""
    recipe = distillation.training.model_copy(update={"elastic": None})
    return distillation.model_copy(update={"training": recipe})


def _elastic_distillation(
    distillation: DistillationSettings,
    schedules: Sequence[IterationSchedule],
    num_steps: int | None,
) -> DistillationSettings:
    """Return the settings of an elastic training from a teacher.

    Args:
        num_steps: None for those of the distillation.
    """
    recipe = distillation.training
    elastic = recipe.elastic or ElasticSettings()
    changes = {
        "elastic": elastic.model_copy(update={"schedules": tuple(map(str, schedules))}),
        "num_steps": num_steps or recipe.num_steps,
    }
    return distillation.model_copy(update={"training": recipe.model_copy(update=changes)})


# Trials


def make_trial(
    role: Role, label: str, weights: str, suite: Suite, seed: int | None = None, **fields: Any
) -> Trial:
    """Return a trial, whose key is made of its weights and of what is measured.

    Args:
        label: With the seed, if the sweep has several; without it, it is the trial's group.
        weights: Key of the training, or of a checkpoint under a schedule.
    """
    if seed is not None:
        fields |= {"seed": seed, "group": label}
        label = seed_label(label, seed)
    key = content_key("trial", weights, suite.key)
    return Trial(key=key, role=role, label=label, suite=suite, **fields)


def checkpoint_trial(
    role: Role,
    label: str,
    checkpoint: Path,
    config: ModelConfig,
    suite: Suite,
    workspace: Workspace,
    schedule: IterationSchedule | None = None,
    **fields: Any,
) -> Trial:
    """Return the trial that measures a checkpoint without training it.

    Args:
        config: The measured model.
        schedule: A pruned student's schedule, relative to the checkpoint, if it leaves layers out.
    """
    # A pruned student with all corrections is another trial than its teacher.
    use = "pruned" if role == "trial" else "as it is"
    weights = content_key(use, weights_key(checkpoint), config.to_dict())
    if schedule is not None and schedule.left_out_layers:
        # The configuration does not say which layers were kept.
        weights = content_key(weights, str(schedule))
        fields["teacher_schedule"] = str(schedule)
    return make_trial(
        role,
        label,
        weights,
        suite,
        model=config,
        folder=str(workspace.trials / weights),
        checkpoint=str(checkpoint),
        **fields,
    )


@dataclass(frozen=True)
class Students:
    """The trials of one teacher's students, and of the baselines."""

    sweep: SweepSettings
    distillation: DistillationSettings
    workspace: Workspace
    """Where trials are stored."""
    teacher: Path
    """Checkpoint of the full model."""
    suite: Suite
    """What is measured."""
    influence: InfluenceTable | None = None
    """The teacher's influence; without it, the students' schedules are unknown."""
    baselines: Mapping[str, Path] = field(default_factory=dict)
    """Label -> checkpoint of the baselines."""
    name: str = ""
    """Name of the teacher, if the sweep has several."""
    seed: int | None = None
    """Seed of this teacher and its students, if the sweep has teachers of several seeds."""

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seeds that each student is trained with."""
        # Students of a teacher with a seed have the same seed.
        seeds_of_sweep = () if self.name else self.sweep.seeds
        return seeds_of_sweep or (self.seed,)

    def label(self, text: str) -> str:
        """Return the label of a student: with its teacher's name, if there are several."""
        return f"{self.name}: {text}" if self.name else text

    @cached_property
    def full(self) -> ModelConfig:
        """The teacher."""
        return load_config(self.teacher)

    @cached_property
    def schedules(self) -> tuple[StudentSchedule, ...]:
        """The students' schedules, costliest first."""
        if self.influence is None:
            return ()
        return choose_schedules(
            self.influence,
            self.sweep,
            cost=schedule_cost(self.sweep.budget_unit, self.full),
            max_left_out=most_left_out(self.sweep, self.full),
        )

    def trials(self) -> list[Trial]:
        """Return the trials of the teacher, of elastic weights or students, and of baselines."""
        is_elastic = self.sweep.elastic
        is_trained = self.distillation.control != "pruned"
        trials = [self._checkpoint_trial("teacher", self.name or "teacher", self.teacher)]
        if is_elastic and self.influence:
            trials += self._elastic_trials()
        if not is_elastic:
            seeds = self.seeds if is_trained else (self.seed,)
            for seed in seeds:
                trials += [self.student(schedule, seed) for schedule in self.schedules]
        if not self.full.corrections.num_corrections:
            trials += self._teachers_continued(trials[1:])
        for label, checkpoint in self.baselines.items():
            trials.append(self._checkpoint_trial(baseline_role(label), label, checkpoint))
        return trials

    def _teachers_continued(self, students: Sequence[Trial]) -> list[Trial]:
        """Return the control of a plain teacher for each seed: the teacher, trained further on the
        same tokens with the training FLOPs of the costliest student.

        A student may be better than its teacher only because it was trained longer.
        """
        jobs = [trial.job for trial in students if trial.job is not None]
        if not jobs:  # The students are unknown, or none is trained.
            return []
        distillation = without_elastic(self.distillation)
        continued = distillation.model_copy(update={"control": "cross_entropy"})
        job = self._job(continued, self.full.corrections)
        assert job is not None, "this control is trained"
        num_steps = steps_at(job, max(map(training_flops, jobs)))
        recipe = job.recipe.model_copy(update={"num_steps": num_steps})
        job = job.model_copy(update={"recipe": recipe})
        return [
            self._trained_trial(TEACHER_CONTINUED, job, seed, role="baseline")
            for seed in self.seeds
        ]

    def student(self, student: StudentSchedule, seed: int | None = None) -> Trial:
        """Return the trial that trains and measures a student or a control under a schedule."""
        schedule = student.schedule
        control = self.distillation.control
        label = student.label
        if control != "distill":
            label += f", {control.replace('_', ' ')}"
        fields = _thresholds(student.threshold_schedule)
        job = self._job(without_elastic(self.distillation), schedule)
        if job is None:
            return checkpoint_trial(
                "trial",
                self.label(label),
                self.teacher,
                self.full.of_kept_layers(schedule),
                self.suite,
                self.workspace,
                schedule,
                parent=weights_key(self.teacher),
                seed=seed,
                **fields,
            )
        if schedule.left_out_layers:
            fields["teacher_schedule"] = str(schedule)
        return self._trained_trial(label, job, seed, **fields)

    def _checkpoint_trial(self, role: Role, label: str, checkpoint: Path) -> Trial:
        """Return the trial that measures a trained model under its own schedule."""
        config = load_config(checkpoint)
        return checkpoint_trial(
            role, label, checkpoint, config, self.suite, self.workspace, seed=self.seed
        )

    def _job(
        self, distillation: DistillationSettings, schedule: IterationSchedule
    ) -> TrainingJob | None:
        return student_job(
            distillation,
            teacher=self.teacher,
            schedule=schedule,
            tokens_folder=self.suite.tokens_folder,
        )

    def _trained_trial(
        self,
        label: str,
        job: TrainingJob,
        seed: int | None,
        role: Role = "trial",
        **fields: Any,
    ) -> Trial:
        """Return the trial that runs a job with a seed and measures the weights."""
        if seed is not None:
            recipe = job.recipe.model_copy(update={"seed": seed})
            job = job.model_copy(update={"recipe": recipe})
        weights = job_key(job)
        # The folder is that of a finished training, or named by the key.
        usual_folder = self.workspace.trials / weights
        folder = str(folder_of_weights(self.workspace, weights, usual_folder))
        return make_trial(
            role,
            self.label(label),
            weights,
            self.suite,
            seed,
            model=job.model,
            folder=folder,
            job=job.model_copy(update={"run_folder": folder}),
            parent=job.provenance.get("teacher"),
            **fields,
        )

    def _elastic_trials(self) -> list[Trial]:
        """Return the trials of elastic weights; for each seed, the full schedule comes first.

        The full schedule is always measured, too.

        Raises:
            UserError: If no schedule is below the full one.
        """
        full = self.full
        members = {student.schedule: student.threshold_schedule for student in self.schedules}
        cheaper = [schedule for schedule in members if schedule != full.corrections]
        if not cheaper:
            raise UserError(
                "sweep.elastic trains schedules that are cheaper than the teacher's, and this "
                "sweep has none; set lower sweep.budgets, or higher sweep.thresholds than those "
                f"that keep {full.corrections}"
            )
        elastic = _elastic_distillation(self.distillation, cheaper, self.sweep.elastic_steps)
        job = self._job(elastic, full.corrections)
        assert job is not None, "check_sweep refuses controls"
        trials = []
        for seed in self.seeds:
            thresholds = _thresholds(members.get(full.corrections))
            label = f"{full.corrections}, elastic"
            trained = self._trained_trial(label, job, seed, is_elastic=True, **thresholds)
            assert trained.job is not None, "a trial that is trained has a job"
            trials.append(trained)
            last_checkpoint = trained.job.folder / checkpoint_name(job.recipe.num_steps)
            for schedule in cheaper:
                # The training's key, because the weights do not exist yet.
                config = replace(full, schedule=schedule)
                weights = content_key("elastic", job_key(trained.job), config.to_dict())
                trials.append(
                    make_trial(
                        "trial",
                        self.label(f"{schedule}, elastic"),
                        weights,
                        self.suite,
                        seed,
                        model=config,
                        folder=str(self.workspace.trials / weights),
                        checkpoint=str(last_checkpoint),
                        parent=trained.parent,
                        is_elastic=True,
                        **_thresholds(members[schedule]),
                    )
                )
        return trials


def _thresholds(member: ThresholdSchedule | None) -> dict[str, Any]:
    """Return the bounds of the thresholds that give a schedule, as fields of its trial."""
    if member is None:
        return {}
    return {
        "threshold_above": member.threshold_above,
        "threshold_up_to": member.threshold_up_to,
    }
