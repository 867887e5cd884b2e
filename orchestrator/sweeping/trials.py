"""The list of a sweep's trials, by reading only.

An iterations sweep pretrains models. A threshold sweep and a search distill a teacher into students
under schedules that its influence gives. `states.py` reads the state of each trial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from iiet.iiad.pruning import InfluenceTable
from orchestrator.data.preparation import tokens_folder_of
from orchestrator.models.folder import load_config
from orchestrator.models.labels import group_of
from orchestrator.models.tokenizer import ModelTokenizer, check_template
from orchestrator.records.evaluation import Suite
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import (
    Role,
    SweepTrials,
    Trial,
    baseline_role,
)
from orchestrator.settings import SearchSettings, Settings
from orchestrator.sweeping.models import (
    SweptModels,
    check_teacher,
    has_counts,
    settings_of,
    swept_variants,
)
from orchestrator.sweeping.student_schedules import StudentSchedule, most_left_out
from orchestrator.sweeping.students import Students, checkpoint_trial, make_trial
from orchestrator.sweeping.suite import plan_suite
from orchestrator.training.job import job_key, pretraining_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import PLAN_FILE, Workspace
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch


def trials_from_scratch(
    settings: Settings,
    workspace: Workspace,
    tokens: Path | None,
    models: Mapping[str, Settings] | None = None,
    *,
    named_baselines: Mapping[str, Path] | None = None,
    name: str | None = None,
    hashes: Mapping[str, str] | None = None,
) -> SweepTrials:
    """Plan a sweep of models that are trained from random weights on the same tokens.

    Args:
        models: Label -> settings, of which sections `model`, `training` and `cluster` are read;
            the models of the sweep's settings when unset. Labels that differ only in `, seed N` at
            the end are seeds of one model.
        named_baselines: Label -> checkpoint of the user's baselines.
        hashes: Of lm-eval's tasks, if they are loaded.
    """
    if models is None:
        models = {
            variant.label: settings_of(settings, variant) for variant in swept_variants(settings)
        }
    jobs = [pretraining_job(model, workspace, tokens) for model in models.values()]
    suite = Suite()
    if tokens is not None:
        suite = plan_suite(settings.evaluation, tokens, jobs[0].model, hashes, workspace=workspace)
    labeled_jobs = dict(zip(models, jobs, strict=True))
    named_trials = baseline_trials(named_baselines or {}, suite, workspace)
    return trials_of_jobs(labeled_jobs, suite, named_trials=named_trials, name=name)


def trials_of_jobs(
    jobs: Mapping[str, TrainingJob],
    suite: Suite,
    *,
    named_trials: Sequence[Trial] = (),
    name: str | None = None,
) -> SweepTrials:
    """Plan a sweep that pretrains models; equal jobs are one trial.

    Args:
        jobs: Label -> training of the model.
        named_trials: Trials of the user's baselines.
    """
    trials = {}
    models = set()
    for label, job in jobs.items():
        group = group_of(label, job.recipe.seed)
        trial = pretraining_trial(label, job, suite)
        if group is not None:
            trial = trial.model_copy(update={"seed": job.recipe.seed, "group": group})
        trials[trial.key] = trial
        models.add(group or label)
    return _named_trials("iterations", name, [*trials.values(), *named_trials], len(models))


def unmeasured_trials(jobs: Mapping[str, TrainingJob]) -> SweepTrials:
    """Return the models that a sweep trains before its students, as trials without measurements.

    They are all that is known before the teacher is trained.
    """
    suite = Suite(tokens_folder=next(iter(jobs.values())).tokens_folder)
    return trials_of_jobs(jobs, suite, name="the teacher and its baselines")


def pretraining_trial(label: str, job: TrainingJob, suite: Suite) -> Trial:
    """Return the trial that pretrains a model; a model without corrections is a baseline."""
    role: Role = "trial" if has_counts(job.model.method) else baseline_role(label)
    return make_trial(
        role, label, job_key(job), suite, model=job.model, folder=job.run_folder, job=job
    )


def baseline_trials(
    baselines: Mapping[str, Path], suite: Suite, workspace: Workspace
) -> list[Trial]:
    """Return the trials that measure the user's baselines."""
    return [
        checkpoint_trial("baseline", label, checkpoint, load_config(checkpoint), suite, workspace)
        for label, checkpoint in baselines.items()
    ]


def trials_of_teachers(
    settings: Settings,
    swept: SweptModels,
    workspace: Workspace,
    teachers: Mapping[str, Path],
    influence: Mapping[str, InfluenceTable],
    *,
    baselines: Mapping[str, Path] | None = None,
    named_baselines: Mapping[str, Path] | None = None,
    name: str | None = None,
    hashes: Mapping[str, str] | None = None,
) -> SweepTrials:
    """Plan the trials of a threshold sweep or a search that are known before any has run.

    All seeds of a teacher have the same schedules, from their mean influence.

    Args:
        teachers: Label -> checkpoint.
        influence: Label -> table; without it the plan has no students.
        baselines: Label -> checkpoint of baselines that the sweep has trained. With several
            teachers, a baseline is listed once for each seed.
        named_baselines: Label -> checkpoint of the user's baselines.
        hashes: Of lm-eval's tasks, if they are loaded.
    """
    variants = swept.teachers
    first_name = next(iter(variants.values())).name
    students_by_teacher: list[Students] = []
    for label, checkpoint in teachers.items():
        variant = variants[label]
        config = load_config(checkpoint)
        check_teacher(settings.sweep, config, settings.influence.metric)
        tokens = tokens_folder_of(checkpoint, workspace)
        suite = plan_suite(
            settings.evaluation, tokens, config, hashes, teacher=checkpoint, workspace=workspace
        )
        if suite.prompts:
            check_template(ModelTokenizer(checkpoint), suite.prompts)

        # With several teachers, baselines belong to the seeds of the first one.
        teacher_baselines: Mapping[str, Path] = baselines or {}
        if settings.sweep.teachers and variant.name == first_name:
            teacher_baselines = {
                model.name: baselines[model.label]
                for model in swept.baselines
                if baselines and model.seed == variant.seed and model.label in baselines
            }
        elif settings.sweep.teachers:
            teacher_baselines = {}

        # Tables of all seeds of this teacher.
        tables = [
            table
            for other_label, table in influence.items()
            if variants[other_label].name == variant.name
        ]
        students_by_teacher.append(
            Students(
                settings.sweep,
                settings.distillation,
                workspace,
                checkpoint,
                suite,
                mean_influence(tables) if tables else None,
                teacher_baselines,
                name=variant.name if settings.sweep.teachers else "",
                seed=variant.seed,
            )
        )
    suite = students_by_teacher[0].suite
    named_trials = baseline_trials(named_baselines or {}, suite, workspace)
    if settings.sweep.kind == "search":
        family = trials_of_students(*students_by_teacher, named_trials=named_trials)
        return trials_of_search(family, settings.search, name)
    return trials_of_students(*students_by_teacher, named_trials=named_trials, name=name)


def trials_of_students(
    *students: Students, named_trials: Sequence[Trial] = (), name: str | None = None
) -> SweepTrials:
    """Plan the trials of the students of one or several teachers; each key is one trial.

    Args:
        named_trials: Trials of the user's baselines.
        name: Made from the plan's key when unset.
    """
    sweep = students[0].sweep
    trials = {trial.key: trial for of_teacher in students for trial in of_teacher.trials()}
    for trial in named_trials:  # A teacher or trained baseline of the same key keeps its role.
        trials.setdefault(trial.key, trial)
    num_teachers = len({of_teacher.name for of_teacher in students})
    return _named_trials(
        "threshold",
        name,
        [*trials.values()],
        sweep.num_requested * num_teachers,
        teacher=students[0].teacher,
    )


def mean_influence(tables: Sequence[InfluenceTable]) -> InfluenceTable:
    """Return the mean influence of one model's seeds.

    Standard errors are averaged, too, which is an upper bound.
    """
    if len(tables) == 1:
        return tables[0]

    def mean(*rows: Sequence[float]) -> tuple[float, ...]:
        return tuple(map(fmean, zip(*rows, strict=True)))

    def mean_by_layer(*matrices: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        return tuple(mean(*rows) for rows in zip(*matrices, strict=True))

    return replace(
        tables[0],
        value_rows=mean_by_layer(*(table.value_rows for table in tables)),
        error_rows=mean_by_layer(*(table.error_rows for table in tables)),
        residual_rows=mean_by_layer(*(table.residual_rows for table in tables)),
        accuracy_lost_rows=mean_by_layer(*(table.accuracy_lost_rows for table in tables)),
        layer_values=mean(*(table.layer_values for table in tables)),
        layer_errors=mean(*(table.layer_errors for table in tables)),
        layer_accuracy_lost=mean(*(table.layer_accuracy_lost for table in tables)),
    )


def trials_of_search(
    family: SweepTrials, settings: SearchSettings, name: str | None = None
) -> SweepTrials:
    """Return the plan that a search starts with: the trials of the threshold family.

    Its name is made from its key when unset. A longer search has the same key, and continues.
    """
    key_settings = settings.model_dump(mode="json", exclude={"num_trials"})
    key = content_key("search", family.key, key_settings)
    changes = {"key": key, "kind": "search", "name": name or f"search-{key[:8]}"}
    return family.model_copy(update=changes)


def make_search(
    settings: Settings, workspace: Workspace, plan: SweepTrials, teacher: Path
) -> ScheduleSearch:
    """Return the search that suggests further trials for a plan."""
    from orchestrator.sweeping.search import ScheduleSearch  # Imports optuna.

    students = Students(
        settings.sweep, settings.distillation, workspace, teacher, plan.trials[0].suite
    )
    return ScheduleSearch(
        plan,
        students.full.corrections,
        settings.search,
        lambda schedule: students.student(StudentSchedule.of(schedule, "own")),
        max_left_out=most_left_out(settings.sweep, students.full),
        folder=workspace.sweeps / plan.name,
    )


def check_sweep_folder(plan: SweepTrials, workspace: Workspace) -> None:
    """Check that the folder of a sweep's name holds no other sweep.

    Raises:
        UserError: If it does.
    """
    folder = workspace.sweeps / plan.name
    stored = SweepTrials.read(folder / PLAN_FILE)
    if stored is not None and stored.key != plan.key:
        raise UserError(
            f"--name {plan.name}: {folder} holds a sweep of other trials; choose another name"
        )


def _named_trials(
    kind: str,
    name: str | None,
    trials: Sequence[Trial],
    num_requested: int,
    teacher: Path | None = None,
) -> SweepTrials:
    # Two metrics of influence may give the same schedules at other thresholds.
    identities = [[t.key, t.threshold_above, t.threshold_up_to] for t in trials]
    key = content_key("sweep", kind, identities)
    return SweepTrials(
        key=key,
        name=name or f"{kind}-{key[:8]}",
        kind=kind,
        tokens_folder=trials[0].suite.tokens_folder,
        teacher=str(teacher) if teacher else None,
        num_requested=num_requested,
        trials=tuple(trials),
        num_distinct=num_models(trials),
    )


def num_models(trials: Sequence[Trial]) -> int:
    """Return the number of distinct schedules or models of a sweep; seeds count once.

    In an iterations sweep, baselines count, too.
    """
    counted = [t for t in trials if t.role == "trial" or (t.job and t.parent is None)]
    return len({t.schedule_text if t.parent else t.group or t.key for t in counted})
