"""Plan a sweep, stage by stage: from settings, or from a teacher's checkpoint.

A sweep has three stages. First its models are trained: the source model, teachers and baselines,
and the controls of a teacher with a source model; a given teacher needs no training. Then the
influence of the teachers is measured. Last the trials run: students of the teachers, or the models
of an iterations sweep, which has only this stage.

A stage is planned once, as soon as its inputs exist: by `plan_sweep`, which only reads, or by
`run_sweep` after the previous stage. Unknown trials have a simple bound, and trainings whose start
is not trained yet are only priced.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from iiet.iiad.pruning import InfluenceTable
from iiet.model.config import ModelConfig
from iiet.model.facts import facts_of
from orchestrator.data.preparation import find_prepared
from orchestrator.evaluation.tasks import check_sweep_tasks, needs_lm_eval, tasks_of_source
from orchestrator.models.folder import load_config
from orchestrator.models.hub import DRY_RUN, offline
from orchestrator.models.open import open_model
from orchestrator.pipelines.influence import InfluencePlan, plan_influence
from orchestrator.pipelines.training import (
    UNPREPARED,
    TrainingPlan,
    plan_models,
    source_defaults_text,
)
from orchestrator.records.trial import SOURCE, SOURCE_CONTINUED
from orchestrator.settings import Settings
from orchestrator.sweeping.models import (
    TEACHER,
    SweptModels,
    check_models,
    check_named_baselines,
    check_sweep,
    named_baselines,
    teacher_and_baselines,
)
from orchestrator.sweeping.plan import SweepPlan
from orchestrator.sweeping.retrofit import (
    Retrofit,
    retrofit_of,
    source_settings,
    training_of_source,
    with_retention,
)
from orchestrator.sweeping.student_schedules import most_left_out
from orchestrator.sweeping.students import bound_of_students, bound_text, most_students
from orchestrator.sweeping.trials import (
    check_sweep_folder,
    make_search,
    trials_from_scratch,
    trials_of_teachers,
    unmeasured_trials,
)
from orchestrator.terminal.progress import Progress
from orchestrator.training.source import find_source, follow_source, source_of_run, with_source
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, find_workspace

NEWEST = "newest"
"""Name of a teacher that means the workspace's newest IIET with corrections."""


@offline(DRY_RUN)
def plan_sweep(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    teacher: Path | str | None = None,
    models: Mapping[str, Settings] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> SweepPlan:
    """Return the plan of a sweep, as far as it is known.

    `threshold` prunes a teacher by influence, and distills and evaluates a student under each
    schedule; `search` continues with schedules that a sampler suggests; `iterations` pretrains
    methods with several numbers of corrections. Finished trials are not run again.

    Args:
        settings: The whole tree.
        teacher: The full model: a checkpoint or run, by path or name, or `newest`. When unset, it
            is pretrained from the settings, with its baselines.
        models: Label -> settings of the models of an iterations sweep, instead of those that the
            settings name. Labels that differ only in `, seed N` at the end are seeds of one model.

    Raises:
        UserError: If settings and arguments do not fit each other; nothing is trained then.
    """
    kind = settings.sweep.kind
    if kind == "iterations" and teacher is not None:
        raise UserError(
            f"sweep.kind=iterations trains every model from scratch, and a teacher was given "
            f"({teacher}); leave it out, or set sweep.kind to threshold or search"
        )
    if kind != "iterations" and models is not None:
        raise UserError(
            f"sweep.kind={kind} distills students of one teacher, and models were given; leave "
            "them out, or set sweep.kind to iterations"
        )
    if settings.sweep.teachers and teacher is not None:
        raise UserError(
            "sweep.teachers names teachers that the sweep trains itself, and a teacher was given "
            f"({teacher}); leave one out"
        )
    if settings.source_training is not None and teacher is not None:
        raise UserError(
            "source_training is the source of a teacher that the sweep trains itself, and a "
            f"teacher was given ({teacher}); leave one out"
        )
    check_sweep(settings)
    space = find_workspace(workspace)
    checkpoint = None
    source = None
    if teacher is not None:
        name_or_path = None if str(teacher) == NEWEST else teacher
        note = (progress or Progress()).note
        model = open_model(name_or_path, space, folders="none", with_corrections=True, note=note)
        checkpoint = model.path
    elif settings.training.source is not None:
        source = find_source(space, settings.training.source)
        prepared = find_prepared(settings.data, space.tokens)
        data = follow_source(settings, source, prepared)[0].data
        settings = settings.model_copy(update={"data": data})
    swept = SweptModels.of(settings)
    plan = SweepPlan(
        settings=settings,
        workspace=space,
        teacher=checkpoint,
        named_baselines=named_baselines(settings, swept, space, checkpoint),
        swept=swept,
        models=models,
        name=name,
        source=source,
    )
    if checkpoint is not None:
        plan = plan_pretraining(plan, None)
        plan = _plan_from_influence(plan, *models_by_role(plan, plan.pretrained))
    else:
        check_sweep_tasks(settings, tasks_of_source(settings.data))
        if models is None:
            check_models(settings, swept, source)
        plan = plan_from_tokens(plan, find_prepared(settings.data, space.tokens))
    if name is not None and plan.is_complete:
        # Keys of trials also depend on lm-eval's tasks, which may not be loaded yet.
        suite = plan.trials.trials[0].suite
        if suite.fingerprints or not needs_lm_eval(settings.evaluation):
            check_sweep_folder(plan.trials, space)
    for training in plan.trainings_left:
        training.check_workers()
    return plan


@offline(DRY_RUN)
def plan_from_tokens(plan: SweepPlan, tokens: Path | None) -> SweepPlan:
    """Plan what depends on the data: the models to train, and more if they are trained."""
    settings = plan.settings
    gaps = [] if tokens else [UNPREPARED]
    if settings.sweep.kind == "iterations":
        return plan_models_from_scratch(plan.changed(gaps=gaps), tokens)

    plan = plan_pretraining(plan.changed(gaps=gaps), tokens)
    jobs = {label: job for stage in plan.pretraining for label, job in stage.jobs.items()}
    teacher_configs = {label: jobs[label].model for label in plan.swept.teachers}
    if tokens:  # Before anything is trained.
        check_named_baselines(plan.named_baselines, tokens, teacher_configs.values())
    teachers, baselines = models_by_role(plan, plan.pretrained)
    if teachers.keys() == teacher_configs.keys():
        return _plan_from_influence(plan, teachers, baselines)

    # The rest is unknown until the teachers are trained.
    bounded = _with_bound(plan, teacher_configs, " is not trained")
    return bounded.changed(planned_trials=unmeasured_trials(jobs))


@offline(DRY_RUN)
def plan_pretraining(plan: SweepPlan, tokens: Path | None) -> SweepPlan:
    """Plan the first stage: source model, teachers, baselines and controls.

    Without tokens the trainings have no keys, but can be priced.
    """
    settings = plan.settings
    stages: list[TrainingPlan] = []
    gaps: list[str] = []
    control_gap = ""
    if plan.teacher is not None:
        retrofit, control_gap = retrofit_of(plan.teacher, settings, plan.workspace)
        gaps += [control_gap] if control_gap else []
    else:
        source = plan.source
        source_job = None
        if settings.source_training is not None:
            models = {SOURCE: source_settings(settings)}
            stages.append(plan_models(models, plan.workspace, tokens))
            source_job = stages[0].jobs[SOURCE]
            source = source_of_run(source_job)
        elif source is not None:
            source_job = training_of_source(source)

        teacher_settings = None
        if source is not None:
            from_source = with_source(settings, source.folder)
            from_source = from_source.model_copy(update={"source_training": None})
            teacher_settings, defaults = follow_source(from_source, source, tokens)
            gaps.append(f"the teacher starts from {source.folder}{source_defaults_text(defaults)}")
        is_source_there = source is None or source.is_checkpoint
        teacher_stage = plan_models(
            teacher_and_baselines(settings, plan.swept, teacher_settings),
            plan.workspace,
            tokens if is_source_there else None,  # Keys depend on the source model's weights.
            model_source=source,
        )
        stages.append(teacher_stage)

        retrofit = None
        if source is not None:
            [teacher_label] = plan.swept.teachers
            retrofit = Retrofit(
                teacher=teacher_stage.jobs[teacher_label],
                source=source,
                source_job=source_job,
                settings=settings,
                workspace=plan.workspace,
            )
    if retrofit is not None:
        stages += _plan_controls(retrofit)
    gaps += [text for stage in stages for text in stage.damaged]
    return plan.changed(
        settings=with_retention(settings, retrofit, teacher_is_plain=_is_plain(plan)),
        pretraining=tuple(stages),
        retrofit=retrofit,
        control_gap=control_gap,
        bound=[],
        gaps=[*plan.gaps, *gaps],
    )


def _is_plain(plan: SweepPlan) -> bool:
    """Return whether the teacher makes no corrections."""
    if plan.teacher is not None:
        return not load_config(plan.teacher).corrections.num_corrections
    return not facts_of(plan.settings.model.method).has_corrections


def _plan_controls(retrofit: Retrofit) -> list[TrainingPlan]:
    """Plan the trainings of a retrofit's controls, and then that of `source_continued`, whose
    learning rate follows from them."""
    candidates = {
        label: job for label, job in retrofit.candidates.items() if label not in retrofit.diverged
    }
    jobs_of_stages = [{**candidates, **retrofit.scratch}]
    if retrofit.continued is not None:
        jobs_of_stages.append({SOURCE_CONTINUED: retrofit.continued})
    return [
        TrainingPlan(
            kind="pretrain",
            models={label: retrofit.settings_of(job) for label, job in jobs.items()},
            jobs=jobs,
            workspace=retrofit.workspace,
        )
        for jobs in jobs_of_stages
        if jobs
    ]


def _plan_from_influence(
    plan: SweepPlan, teachers: Mapping[str, Path], baselines: Mapping[str, Path]
) -> SweepPlan:
    """Plan what depends on trained teachers: their influence, and more if it is measured.

    Args:
        teachers: Label -> checkpoint.
        baselines: Label -> checkpoint of the trained baselines.
    """
    # Stage 2.
    plan = plan.changed(influence=plan_measurements(plan, teachers))
    tables = {
        label: measurement.table
        for label, measurement in plan.influence.items()
        if measurement.table
    }
    if tables.keys() == teachers.keys():
        return plan_students(plan, teachers, baselines, tables)

    # The students' schedules depend on all tables.
    plan = plan_students(plan, teachers, baselines, {})
    configs = {label: load_config(checkpoint) for label, checkpoint in teachers.items()}
    return _with_bound(plan, configs, "'s influence is not measured")


@offline(DRY_RUN)
def plan_measurements(plan: SweepPlan, teachers: Mapping[str, Path]) -> dict[str, InfluencePlan]:
    """Plan the second stage: label of a teacher -> measurement of its influence."""
    return {
        label: plan_influence(
            plan.settings,
            workspace=plan.workspace,
            model=checkpoint,
            leaves_out_layers=most_left_out(plan.settings.sweep, load_config(checkpoint)) > 0,
        )
        for label, checkpoint in teachers.items()
    }


@offline(DRY_RUN)
def plan_trials(
    plan: SweepPlan,
    teachers: Mapping[str, Path],
    baselines: Mapping[str, Path],
    tables: Mapping[str, InfluenceTable],
    hashes: Mapping[str, str],
) -> SweepPlan:
    """Plan the third stage, after the others have ended.

    Arguments are those of `plan_students`.
    """
    tokens = Path(plan.trials.tokens_folder)
    plan = plan.changed(pretraining=(), bound=[], gaps=[])
    if plan.settings.sweep.kind == "iterations":
        return plan_models_from_scratch(plan, tokens, hashes)
    return plan_students(plan, teachers, baselines, tables, hashes)


def plan_students(
    plan: SweepPlan,
    teachers: Mapping[str, Path],
    baselines: Mapping[str, Path],
    tables: Mapping[str, InfluenceTable],
    hashes: Mapping[str, str] | None = None,
) -> SweepPlan:
    """Plan the third stage of a threshold sweep or a search.

    Args:
        teachers, baselines: As in `_plan_from_influence`.
        tables: Label of a teacher -> influence; without it the students are unknown.
        hashes: Of lm-eval's tasks, if they are loaded.
    """
    settings = plan.settings
    trials = trials_of_teachers(
        settings,
        plan.swept,
        plan.workspace,
        teachers,
        tables,
        baselines=baselines,
        named_baselines=plan.named_baselines,
        name=plan.name,
        hashes=hashes,
    )
    configs = [load_config(checkpoint) for checkpoint in teachers.values()]
    check_named_baselines(plan.named_baselines, Path(trials.tokens_folder), configs)
    if settings.sweep.kind != "search" or not tables:
        return plan.changed(planned_trials=trials)
    teacher = teachers[TEACHER]
    full = load_config(teacher)
    search = make_search(settings, plan.workspace, trials, teacher)
    suggested = search.suggested_trials()
    return plan.changed(
        planned_trials=trials.model_copy(update={"trials": (*trials.trials, *suggested)}),
        search=search,
        bound=bound_of_students(settings.sweep, settings.distillation, full, search.num_left),
        gaps=[*plan.gaps, search.text],
    )


def plan_models_from_scratch(
    plan: SweepPlan, tokens: Path | None, hashes: Mapping[str, str] | None = None
) -> SweepPlan:
    """Plan the only stage of an iterations sweep: models that are trained from random weights.

    Args:
        hashes: Of lm-eval's tasks, if they are loaded.
    """
    # The sweep's own name depends on the tokens.
    name = plan.name or (None if tokens else "the sweep")
    trials = trials_from_scratch(
        plan.settings,
        plan.workspace,
        tokens,
        plan.models,
        named_baselines=plan.named_baselines,
        name=name,
        hashes=hashes,
    )
    if tokens:
        models = [trial.model for trial in trials.trials if trial.job]
        check_named_baselines(plan.named_baselines, tokens, models)
    return plan.changed(planned_trials=trials)


def models_by_role(
    plan: SweepPlan, finished: Mapping[str, Path]
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the trained teachers, and the trained baselines and controls.

    Args:
        finished: Label -> checkpoint of the finished models before the trials.
    """
    teachers = {TEACHER: plan.teacher} if plan.teacher else {}
    baselines: dict[str, Path] = {}
    if not plan.teacher:
        labels = plan.swept.teachers
        teachers = {label: finished[label] for label in labels if label in finished}
        for model in plan.swept.baselines:
            if model.label not in labels and model.label in finished:
                baselines[model.label] = finished[model.label]
    if plan.retrofit:
        baselines |= plan.retrofit.measurable_controls(finished)
    return teachers, baselines


def _with_bound(plan: SweepPlan, teachers: Mapping[str, ModelConfig], reason: str) -> SweepPlan:
    """Return a plan with a bound for unknown students.

    Args:
        teachers: Label -> model.
        reason: Why the students are unknown: the end of a sentence that begins with the teacher.
    """
    settings = plan.settings
    sweep = settings.sweep
    distillation = settings.distillation
    bound = []
    sentences = []
    for label, variant in plan.swept.teachers.items():
        # The bound of the first seed covers the students of all seeds.
        if variant.seed is None or variant.seed == sweep.seeds[0]:
            config = teachers[label]
            number = most_students(sweep, settings.search, config)
            bound += bound_of_students(sweep, distillation, config, number)
            name = f" {variant.name}" if sweep.teachers else ""
            text = bound_text(sweep, distillation, config, number)
            sentences.append(f"the teacher{name}{reason}, so {text}")
    return plan.changed(bound=bound, gaps=[*plan.gaps, *sentences])
