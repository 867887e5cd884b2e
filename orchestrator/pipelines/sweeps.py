"""Sweeps and searches: from settings, or from a teacher's checkpoint, to the front and its report.

A sweep has three stages. Its models are trained: a teacher and baselines, unless a teacher was
given, before them the teacher's source, and after them the controls of a teacher with a source.
Influence of the teachers is measured. The trials are run: students of the teachers, or the models
of an iterations sweep, which has this stage alone.

A stage is planned once, as soon as all that it follows from exists: by `plan_sweep`, which only
reads, or else by `run_sweep` after the stage before. Trials that are not known yet have a simple
bound, and trainings that follow from others are only priced. The same call resumes an interrupted
sweep; for a finished one, it only writes the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from iiet.config import ModelConfig
from iiet.pruning import InfluenceTable
from orchestrator.cluster.task import joined_cluster, shard_runner
from orchestrator.cluster.work import sweep_place
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import expected_tokens, find_prepared
from orchestrator.data.preparation import prepare as prepare_tokens
from orchestrator.evaluation.heldout import heldout_chances, offered_tasks
from orchestrator.evaluation.tasks import check_sweep_tasks, needs_lm_eval, tasks_of_source
from orchestrator.models.folder import load_config
from orchestrator.models.hub import DRY_RUN, offline
from orchestrator.models.open import open_model
from orchestrator.pipelines.context import Context, in_one_call
from orchestrator.pipelines.influence import InfluencePlan, plan_influence, run_influence
from orchestrator.pipelines.models import imported_model
from orchestrator.pipelines.training import (
    UNPREPARED,
    TrainingPlan,
    plan_models,
    run_trainings,
    source_defaults_text,
)
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.fit import find_problems
from orchestrator.planning.price import Price, price_of
from orchestrator.planning.trial_gpus import assign_trial_gpus, on_trial_devices
from orchestrator.records.tracked_run import PRETRAIN_OF_SWEEP
from orchestrator.records.trial import SOURCE, SOURCE_CONTINUED, AshaRule, SweepTrials, Trial
from orchestrator.reporting import results
from orchestrator.reporting.command_tables import price_rows
from orchestrator.reporting.result import Result
from orchestrator.reporting.sections import two_column_table
from orchestrator.reporting.sweep_report import ReportResult
from orchestrator.settings import Settings, flatten, to_yaml
from orchestrator.sweeping import plan as trial_plans
from orchestrator.sweeping.models import (
    TEACHER,
    baseline_models,
    check_devices,
    check_models,
    check_named_baselines,
    check_sweep,
    claims_answered,
    named_baselines,
    teacher_and_baselines,
    teachers_by_label,
)
from orchestrator.sweeping.retrofit import (
    Retrofit,
    retrofit_of,
    source_settings,
    training_of_source,
    with_retention,
)
from orchestrator.sweeping.states import TrialState, competing_trials, early_stops, trial_states
from orchestrator.sweeping.students import bound_of_students, bound_text, most_students
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.training.source import (
    find_source,
    follow_source,
    source_of_run,
    with_source,
)
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.journal import read_tail, record_event
from orchestrator.workspace.layout import (
    SWEEP_LOCK_NAME,
    Workspace,
    find_workspace,
    portable_path,
)
from orchestrator.workspace.locks import refuse_second
from orchestrator.workspace.provenance import content_key, environment

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.sweeping.states import SweepRun

NEWEST = "newest"
"""As a teacher: the workspace's newest IIET with corrections."""


class SweepPlan(Result):
    """What a sweep does, and what that takes."""

    # What it was asked for.
    settings: Settings
    workspace: Workspace
    teacher: Path | None
    """A given teacher; without it, the sweep trains its models from scratch."""
    named_baselines: Mapping[str, Path]
    """Label -> checkpoint of the runs in `sweep.baseline_runs`."""
    models: Mapping[str, Settings] | None
    """Label -> settings of the models of an iterations sweep, if they are not the settings' own."""
    name: str | None
    """The sweep's name; made from its content when unset."""

    # Its stages, as far as they are planned.
    source: Any = None
    """The `Source` that the teacher starts from, if the settings name one that exists."""
    pretraining: tuple[TrainingPlan, ...] = ()
    """What is trained before the trials, one after another: the source; the teachers and their
    baselines, if the sweep trains them itself; of a teacher with a source the controls, and last
    `source_continued`. What follows from others that are not trained is only priced."""
    retrofit: Any = None
    """The `Retrofit` with the controls of a teacher that has a source."""
    control_gap: str = ""
    """Why a given teacher with a source has no controls."""
    influence: dict[str, InfluencePlan] = Field(default={})
    """Label of a teacher -> measurement; empty while the teachers are not trained."""
    planned_trials: SweepTrials | None = None
    """The trials, as far as they are known; see `is_complete`."""
    search: Any = None
    """What suggests further trials, if the sweep is a search."""

    # What is not known yet.
    bound: list[Estimate] = Field(default=[])
    """Trainings that take at least as much as those of the trials that are not known."""
    gaps: list[str] = Field(default=[])
    """What is not prepared, trained, measured or known yet."""

    @property
    def trials(self) -> SweepTrials:
        """The trials, as far as they are known; without a trained teacher, what is pretrained."""
        assert self.planned_trials, "plan_sweep plans some"
        return self.planned_trials

    @property
    def is_complete(self) -> bool:
        """Whether the trials are all that the sweep has, but for those that a search suggests."""
        if not self.trials.tokens_folder:
            return False
        if self.settings.sweep.kind == "iterations":
            return True
        are_trained = self.pretrained.keys() == {
            label for stage in self.pretraining for label in stage.jobs
        }
        are_measured = all(measurement.is_stored for measurement in self.influence.values())
        return are_trained and are_measured

    def changed(self, **changes: Any) -> Self:
        """Return the plan with other values, and without what was computed of the old ones."""
        plan = self.model_copy(update=changes)
        # Python stores what a cached property returned beside the fields.
        for name in vars(plan).keys() - type(self).model_fields.keys():
            del vars(plan)[name]
        return plan

    @cached_property
    def pretrained(self) -> dict[str, Path]:
        """Label -> checkpoint of each training before the trials that is finished."""
        checkpoints: dict[str, Path] = {}
        for stage in self.pretraining:
            checkpoints |= stage.finished
        return checkpoints

    @cached_property
    def states(self) -> list[TrialState]:
        """How far each trial is, and each model that is pretrained first."""
        states = trial_states(self.trials, self.settings.sweep)
        if self.trials.teacher:  # Else these models are the plan's trials.
            jobs = {
                label: job
                for stage in self.pretraining
                for label, job in stage.jobs.items()
                if label not in stage.finished
            }
            if jobs:
                pretrained = trial_plans.plan_pretrained(jobs)
                states += trial_states(pretrained, self.settings.sweep)
        return states

    @cached_property
    def pretraining_left(self) -> list[Estimate]:
        """Trainings before the trials that are not finished."""
        return [training for stage in self.pretraining for training in stage.left]

    @cached_property
    def trials_left(self) -> list[Estimate]:
        """Trainings of the trials that are not finished, and the bound of those not known."""
        pretrained = {job.run_folder for stage in self.pretraining for job in stage.jobs.values()}
        of_trials = [
            state.training
            for state in self.states
            if state.training and state.trial.folder not in pretrained
        ]
        return [*of_trials, *self.bound]

    @cached_property
    def placed(self) -> Settings:
        """The settings, with the GPUs of the trials."""
        return assign_trial_gpus(self.settings, self.trials_left)

    @cached_property
    def trainings_left(self) -> list[Estimate]:
        """All trainings that are left, each on its devices."""
        return [*self.pretraining_left, *on_trial_devices(self.trials_left, self.placed)]

    @cached_property
    def price(self) -> Price:
        """Tokens, FLOPs, hours, memory and disk of what is left."""
        new_token_bytes = 0
        if not self.trials.tokens_folder:
            new_token_bytes = expected_tokens(self.settings.data, None).new_bytes
        return price_of(
            self.trainings_left,
            self.workspace.root,
            new_token_bytes=new_token_bytes,
            is_upper_bound=bool(self.bound),
        )

    @cached_property
    def control_prices(self) -> dict[str, Price]:
        """Name of each control of a teacher with a source -> price of its trainings that are left.

        A source that the sweep trains is priced as what it is for the teacher, and not here.
        """
        if self.retrofit is None:
            return {}
        return {
            name: price_of(
                [
                    stage.estimate(label)
                    for stage in self.pretraining
                    for label in stage.jobs
                    if label in labels and label not in stage.finished
                ],
                self.workspace.root,
            )
            for name, labels in self.retrofit.trainings_by_control.items()
        }

    @cached_property
    def problems(self) -> dict[str, str | None]:
        """Place -> why the trainings do not fit there; None if they do. First this machine."""
        check = partial(check_devices, self.placed, pretrains=bool(self.pretraining_left))
        address = self.settings.cluster.ray_address
        root = self.workspace.root
        return find_problems(self.trainings_left, self.price.disk, root, address, check)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is reused, and what is not known yet."""
        sweep = self.placed.sweep
        suite = self.trials.trials[0].suite
        notes = [*trial_plans.plan_sentences(self.trials, sweep, self.states), *self.gaps]
        prices = self.control_prices
        sentences = self.retrofit.sentences if self.retrofit else {}
        for name, text in sentences.items():
            flops_left = prices[name].flops if name in prices else 0.0
            ending = f"; {flops_left:.3g} FLOPs are left" if flops_left else ""
            notes.append(f"{name}: {text}{ending}")
        if needs_lm_eval(self.settings.evaluation) and suite.tasks and not suite.fingerprints:
            notes.append("the tasks of lm-eval are not loaded, so no trial can be found measured")
        if sweep.gpus_per_trial and self.trials_left:
            gpus = format_count(sweep.num_workers_per_trial, "GPU")
            at_once = min(sweep.trials_at_once or 1, len(self.trials_left))
            notes.append(f"each trial runs on {gpus}, at most {at_once} at once")
        if competing_trials(self.trials, sweep):
            notes.append(AshaRule.of(sweep).text)
        return tuple(notes)

    @property
    def sentences(self) -> tuple[str, ...]:
        """The notes, the price, and what does not fit."""
        rows = price_rows(self.price, self.problems)
        return (*self.notes, *(f"{name}: {text}" for name, text in rows))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per trial: label, role, schedule, exact costs, state."""
        full = trial_plans.full_trial(self.trials).model
        return [
            {
                "name": state.trial.label,
                "role": state.trial.role,
                "method": state.trial.model.method,
                "schedule": state.trial.schedule_text,
                "state": state.status,
                "steps_done": state.steps_done,
                **trial_plans.exact_cost(state.trial.model, full),
            }
            for state in self.states
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the trials, the notes, the price, and what does not fit.

        Keys:
            name: the sweep's name, if it is known yet
            trials: one entry per known trial: `name`, `role`, `method`, `schedule` (as text; empty
                without corrections), `state`, `steps_done`, exact costs
            notes: what is reused, and what is not known yet
            price: what is left to train: `num_trainings`, `num_tokens`, `num_teacher_tokens`,
                `flops`, `hours` (shortest and longest), `num_devices`, `uses_gpus`, `rate`,
                `memory` and `disk` (bytes by name), `free_disk`, `is_upper_bound`
            source_controls: (optional) of a teacher with a source, name of a control to what of its
                trainings is left, as `price`
            problems: place to why the trainings do not fit there, or `null`
        """
        controls = {
            name: price.model_dump(mode="json") for name, price in self.control_prices.items()
        }
        return {
            "name": self.trials.name,
            "trials": self.rows(),
            "notes": list(self.notes),
            "price": self.price.model_dump(mode="json"),
            **({"source_controls": controls} if self.retrofit else {}),
            "problems": self.problems,
        }

    def shown(self) -> Iterable[RenderableType]:
        yield trial_plans.plan_table(self.trials, self.states)
        yield from (f"  {note}" for note in self.notes)
        yield two_column_table(None, [*price_rows(self.price, self.problems)])


class SweepResult(ReportResult):
    """A sweep that has ended, and its report."""

    name: str
    """Name of the sweep; `report` and `pick` find it by this."""
    failures: dict[str, str]
    """Label to reason of the trials that failed; the same call tries them again."""
    stopped: dict[str, str]
    """Label to reason of the trials that a rule stopped early."""
    next_steps: tuple[str, ...] = Field(default=(), exclude=True)
    """Lines on what a person may do next."""

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Finished trials, the teacher and the baselines among them, in the plan's order."""
        return self.sweeps[0].results

    def shown(self) -> Iterable[RenderableType]:
        yield from super().shown()
        yield from self.next_steps

    def raise_failures(self) -> None:
        raise_failures(self.failures)


def raise_failures(failures: Mapping[str, str]) -> None:
    """Raise `RunFailed` with the names of the trials that failed, if there are any."""
    if failures:
        raise RunFailed(
            f"{len(failures)} trials failed ({', '.join(failures)}); the same command tries them "
            "again"
        )


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
    """Return what a sweep does, as far as it is known.

    `threshold` prunes a teacher by influence, and distills and evaluates each schedule; `search`
    continues with schedules that a sampler suggests; `iterations` pretrains methods and iteration
    counts from scratch. Finished trials are not run again.

    Args:
        settings: The whole tree.
        teacher: The full model: a checkpoint or run, by path or name, or `newest`. When unset, it
            is pretrained from the settings, with its baselines.
        models: Models that an iterations sweep trains instead of those that the settings name:
            label -> settings. Labels that differ in `, seed N` at their end are seeds of one model.

    Raises:
        UserError: If something does not go together; nothing is trained then.
        Interrupted: After Ctrl-C; finished trials stay finished.
        RunFailed: If the teacher's training or every trial failed; single failures are in the
            result.
    """
    kind = settings.sweep.kind
    if kind == "depth":
        raise UserError("sweep.kind=depth trains nothing; `loops.plan_depths` plans such a sweep")
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
    plan = SweepPlan(
        settings=settings,
        workspace=space,
        teacher=checkpoint,
        named_baselines=named_baselines(settings, space, checkpoint),
        models=models,
        name=name,
        source=source,
    )
    if checkpoint is not None:
        plan = _plan_pretraining(plan, None)
        plan = _plan_from_influence(plan, *_by_role(plan, plan.pretrained))
    else:
        check_sweep_tasks(settings, tasks_of_source(settings.data))
        if models is None:
            check_models(settings, source)
        plan = _plan_from_tokens(plan, find_prepared(settings.data, space.tokens))
    for training in plan.trainings_left:
        training.check_workers()
    return plan


def _plan_from_tokens(plan: SweepPlan, tokens: Path | None) -> SweepPlan:
    """Plan what follows from the data: the models from scratch, and more if they are trained."""
    settings = plan.settings
    gaps = [] if tokens else [UNPREPARED]
    if settings.sweep.kind == "iterations":
        return _plan_models_from_scratch(plan.changed(gaps=gaps), tokens)

    plan = _plan_pretraining(plan.changed(gaps=gaps), tokens)
    jobs = {label: job for stage in plan.pretraining for label, job in stage.jobs.items()}
    teacher_configs = {label: jobs[label].model for label in teachers_by_label(settings)}
    if tokens:  # Before anything is trained.
        check_named_baselines(plan.named_baselines, tokens, teacher_configs.values())
    plan = plan.changed(gaps=[*plan.gaps, claims_answered(settings)])
    teachers, baselines = _by_role(plan, plan.pretrained)
    if teachers.keys() == teacher_configs.keys():
        return _plan_from_influence(plan, teachers, baselines)

    # Nothing more is known before the teachers are trained.
    bounded = _with_bound(plan, teacher_configs, " is not trained")
    return bounded.changed(planned_trials=trial_plans.plan_pretrained(jobs))


def _plan_pretraining(plan: SweepPlan, tokens: Path | None) -> SweepPlan:
    """Plan the first stage: the source, the teachers and their baselines, and the controls.

    Without tokens the trainings are known but for their keys, so they can be priced.
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
            teacher_and_baselines(settings, teacher_settings),
            plan.workspace,
            tokens if is_source_there else None,  # The keys follow from the source's weights, too.
            model_source=source,
        )
        stages.append(teacher_stage)

        retrofit = None
        if source is not None:
            [teacher_label] = teachers_by_label(settings)
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
        settings=with_retention(settings, retrofit),
        pretraining=tuple(stages),
        retrofit=retrofit,
        control_gap=control_gap,
        bound=[],
        gaps=[*plan.gaps, *gaps],
    )


def _plan_controls(retrofit: Retrofit) -> list[TrainingPlan]:
    """Plan the trainings of a retrofit's controls, and after them that of `source_continued`, whose
    rate they decide."""
    jobs_of_stages = [{**retrofit.candidates, **retrofit.scratch}]
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
    """Plan what follows from trained teachers: their influence, and more if it is measured.

    Args:
        teachers: Label -> checkpoint.
        baselines: Label -> checkpoint of the baselines that are trained.
    """
    # Stage 2.
    plan = plan.changed(influence=_plan_measurements(plan, teachers))
    tables = {
        label: measurement.table
        for label, measurement in plan.influence.items()
        if measurement.table
    }
    if tables.keys() == teachers.keys():
        return _plan_students(plan, teachers, baselines, tables)

    # The schedules of students follow from all tables.
    plan = _plan_students(plan, teachers, baselines, {})
    configs = {label: load_config(checkpoint) for label, checkpoint in teachers.items()}
    return _with_bound(plan, configs, "'s influence is not measured")


@offline(DRY_RUN)
def _plan_measurements(plan: SweepPlan, teachers: Mapping[str, Path]) -> dict[str, InfluencePlan]:
    """Plan the second stage: label of a teacher -> measurement of its influence."""
    return {
        label: plan_influence(plan.settings, workspace=plan.workspace, model=checkpoint)
        for label, checkpoint in teachers.items()
    }


@offline(DRY_RUN)
def _plan_students(
    plan: SweepPlan,
    teachers: Mapping[str, Path],
    baselines: Mapping[str, Path],
    tables: Mapping[str, InfluenceTable],
    hashes: Mapping[str, str] | None = None,
) -> SweepPlan:
    """Plan the third stage of a threshold sweep or a search.

    Args:
        teachers, baselines: As in `_plan_from_influence`.
        tables: Label of a teacher -> influence; without them the students are not known.
        hashes: Of lm-eval's tasks, if they are loaded.
    """
    settings = plan.settings
    trials = trial_plans.plan_students(
        settings,
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
    search = trial_plans.schedule_search(settings, plan.workspace, trials, teacher)
    suggested = search.suggested_trials()
    return plan.changed(
        planned_trials=trials.model_copy(update={"trials": (*trials.trials, *suggested)}),
        search=search,
        bound=bound_of_students(settings, load_config(teacher), search.num_left),
        gaps=[*plan.gaps, search.text],
    )


@offline(DRY_RUN)
def _plan_models_from_scratch(
    plan: SweepPlan, tokens: Path | None, hashes: Mapping[str, str] | None = None
) -> SweepPlan:
    """Plan the only stage of an iterations sweep: models that are trained from scratch.

    Args:
        hashes: Of lm-eval's tasks, if they are loaded.
    """
    # The sweep's own name follows from the tokens.
    name = plan.name or (None if tokens else "the sweep")
    trials = trial_plans.plan_iterations(
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


def _by_role(
    plan: SweepPlan, finished: Mapping[str, Path]
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the teachers, and the baselines and controls beside them, as far as they are trained.

    Args:
        finished: Label -> checkpoint of what was trained before the trials.
    """
    teachers = {TEACHER: plan.teacher} if plan.teacher else {}
    baselines: dict[str, Path] = {}
    if not plan.teacher:
        labels = teachers_by_label(plan.settings)
        teachers = {label: finished[label] for label in labels if label in finished}
        for model in baseline_models(plan.settings):
            if model.label not in labels and model.label in finished:
                baselines[model.label] = finished[model.label]
    if plan.retrofit:
        baselines |= plan.retrofit.beside(finished)
    return teachers, baselines


def _with_bound(plan: SweepPlan, teachers: Mapping[str, ModelConfig], reason: str) -> SweepPlan:
    """Return a plan with a bound of the students that are not known.

    Args:
        teachers: Label -> model.
        reason: End of a sentence that begins with the teacher: why its students are not known.
    """
    settings = plan.settings
    seeds = settings.sweep.seeds
    bound = []
    sentences = []
    for label, variant in teachers_by_label(settings).items():
        # The bound of a teacher's first seed is that of the students of all its seeds.
        if variant.seed is None or variant.seed == seeds[0]:
            config = teachers[label]
            bound += bound_of_students(settings, config, most_students(settings, config))
            name = f" {variant.name}" if settings.sweep.teachers else ""
            sentences.append(f"the teacher{name}{reason}, so {bound_text(settings, config)}")
    return plan.changed(bound=bound, gaps=[*plan.gaps, *sentences])


def run_sweep(plan: SweepPlan, context: Context) -> SweepResult:
    """Run the sweep that `settings.sweep.kind` describes, and write its report."""
    plan.check()
    stored = _stored_results(plan)
    if stored is not None:
        context.progress.note("all trials are finished and found again")
        return _report_of(plan, stored, context)
    from orchestrator.cluster.ray import ray_cluster
    from orchestrator.sweeping.run import run_plan  # Imports Ray, MLflow and lm-eval.

    workspace = plan.workspace
    progress = context.progress
    if plan.source is not None and not plan.source.is_checkpoint:
        imported = imported_model(
            plan.settings.training.source, workspace, progress, also_folders=True
        )
        plan = plan_sweep(with_source(plan.settings, imported), workspace=workspace, name=plan.name)
        plan.check()
    settings = plan.settings
    is_from_scratch = settings.sweep.kind == "iterations"
    pretrains = bool(plan.pretraining)
    check = partial(check_devices, settings, pretrains=pretrains)
    # The sweep's folder has its name only when the influence is measured. The same call a second
    # time is refused at once.
    call_key = content_key(to_yaml(settings), str(plan.teacher), plan.name)
    call_lock = workspace.logs / f".sweep-{call_key}.lock"  # A call that is a mistake deletes it.
    with (
        refuse_second(call_lock, "this sweep"),
        joined_cluster(settings.cluster, workspace.root, check, progress),
    ):
        # The data. What follows from it is planned now, if it did not exist before.
        check_sweep(settings, progress)
        if plan.teacher is None:
            tokens = prepare_tokens(
                settings.data, workspace, progress, open_runner=shard_runner(settings.cluster)
            )
            if str(tokens) != plan.trials.tokens_folder:
                with offline(DRY_RUN):
                    plan = _plan_from_tokens(plan, tokens)
                plan.check()
        tokens = Path(plan.trials.tokens_folder)

        # The tasks, before pretraining: the held-out text may be too poor for them.
        check_sweep_tasks(settings, offered_tasks(open_data(tokens)))
        first = plan.trials.trials[0]
        hashes = trial_plans.load_tasks(settings.evaluation, tokens, first.model, progress)
        has_all_trials = plan.is_complete and first.suite.fingerprints == (hashes or None)

        start_ray = partial(
            ray_cluster, settings.cluster, folder=workspace.root, say=progress.start
        )
        with start_ray() if pretrains else nullcontext():
            # Stage 1: the source, the teachers and their baselines, the controls.
            finished: dict[str, Path] = {}
            failed_controls: dict[str, str] = {}
            for number in range(len(plan.pretraining)):
                if not plan.pretraining[number].has_tokens:
                    # It follows from what was just trained.
                    with offline(DRY_RUN):
                        plan = _plan_pretraining(plan, tokens)
                    plan.check()
                stage = plan.pretraining[number]
                try:
                    trained = run_trainings(stage, context, kind=PRETRAIN_OF_SWEEP)
                except RunFailed as error:
                    # A control at a higher rate may diverge; its teacher has students even so.
                    if plan.retrofit is None or not plan.retrofit.has_controls(stage.jobs):
                        raise
                    failed_controls = dict.fromkeys(stage.jobs, str(error))
                    progress.note(f"controls failed, the sweep goes on without them: {error}")
                    break
                finished |= {label: result.checkpoint for label, result in trained.items()}
            teachers, baselines = _by_role(plan, finished)

            # Stage 2: the influence of the teachers.
            if not plan.influence:
                plan = plan.changed(influence=_plan_measurements(plan, teachers))
            place = sweep_place(settings, workspace.root)
            tables = {
                label: run_influence(measurement, context, place=place).table
                for label, measurement in plan.influence.items()
            }

            # Stage 3: the trials. Nothing is left of the other stages.
            if not has_all_trials:
                plan = plan.changed(pretraining=(), bound=[], gaps=[])
                if is_from_scratch:
                    plan = _plan_models_from_scratch(plan, tokens, hashes)
                else:
                    plan = _plan_students(plan, teachers, baselines, tables, hashes)
                plan.check()
            trials = plan.trials
            lock = workspace.sweeps / trials.name / SWEEP_LOCK_NAME
            with refuse_second(lock, f"the sweep {trials.name}"):
                run = run_plan(
                    trials,
                    settings,
                    workspace,
                    placed=plan.placed,
                    tracking=context.tracking,
                    progress=progress,
                    search=plan.search,
                )
                sweep_results = _results_of(plan, run, next(iter(tables.values()), None))
                failures = failed_controls | run.failures
                return _report_of(plan, sweep_results, context, failures)


sweep = in_one_call(plan_sweep, run_sweep, teacher=imported_model)


def _stored_results(plan: SweepPlan) -> results.StoredSweep | None:
    """Return the results of a sweep that has ended and has nothing left; None if it has not.

    The tasks of lm-eval may have changed, which is known when they are loaded.
    """
    is_left = any(state.status in ("to measure", "to train") for state in plan.states)
    if is_left or plan.bound or (plan.search and plan.search.num_left):
        return None
    if needs_lm_eval(plan.settings.evaluation):
        return None
    last_record = read_tail(plan.workspace.sweeps / plan.trials.name)[-1:]
    if not last_record or last_record[0].get("name") != "finished":
        return None
    finished = {state.trial.key for state in plan.states if state.status == "finished"}
    with suppress(UserError):  # Else they are written again.
        stored = results.load_sweep_results(plan.workspace, plan.trials.name)
        has_same_results = {result.key for result in stored.results} == finished
        if stored.key == plan.trials.key and has_same_results:
            # The bounds are no part of what was measured.
            return stored.model_copy(update={"retention": _retention_of(plan)})
    return None


def _results_of(
    plan: SweepPlan, run: SweepRun, influence: InfluenceTable | None
) -> results.StoredSweep:
    """Return what a report needs of a sweep that was run."""
    trials = run.all_trials
    suite = trials.trials[0].suite
    suite_folder = Path(suite.suite_folder) if suite.suite_folder else None
    chances = {
        name: text
        for name, text in heldout_chances(suite_folder).items()
        if not suite.tasks or name in suite.tasks
    }
    facts: dict[str, dict[str, Any]] = {}
    if chances:
        facts[results.CHANCE_TITLE] = chances
    if plan.retrofit is not None:
        facts[results.CONTROLS_TITLE] = plan.retrofit.sentences
    elif plan.control_gap:
        facts[results.CONTROLS_TITLE] = {SOURCE_CONTINUED: plan.control_gap}
    facts["Trials"] = {trial.label: _end_of(trial, run) for trial in trials.trials}
    facts[results.SETTINGS_TITLE] = flatten(plan.settings)
    root = plan.workspace.root
    facts[results.PROVENANCE_TITLE] = {
        "sweep": trials.key,
        "kind": trials.kind,
        "teacher": portable_path(trials.teacher or "none", root),
        "tokens": portable_path(trials.tokens_folder, root),
        "schedules asked for": trials.num_requested,
        "trials": len(trials.trials),
        **environment(),
    }
    return results.StoredSweep(
        name=trials.name,
        key=trials.key,
        results=run.results,
        influence=influence,
        retention=_retention_of(plan),
        facts=facts,
    )


def _retention_of(plan: SweepPlan) -> dict[str, float]:
    """Return how much the models of a sweep may lose against the source, by task."""
    return plan.settings.evaluation.retention or {}


def _end_of(trial: Trial, run: SweepRun) -> str:
    """Say how a trial of a sweep ended."""
    state = run.states[trial.key]
    if state.status == "failed":
        return f"failed: {state.error}"
    if state.status == "stopped early" and state.early_stop:
        return state.early_stop.text
    if state.status != "finished":
        return "not finished"
    if trial.key in run.reused:
        return "reused: it was finished before"
    return "trained and measured" if trial.job else "measured"


def _report_of(
    plan: SweepPlan,
    sweep_results: results.StoredSweep,
    context: Context,
    failures: Mapping[str, str] | None = None,
) -> SweepResult:
    """Write the report of a sweep that has ended."""
    from orchestrator.reporting.report import write_sweep_report  # Imports vl-convert.

    workspace = plan.workspace
    name = plan.trials.name
    report = write_sweep_report(workspace, sweep_results, tracking=lambda: context.tracking)
    # Commands without a name take the newest sweep.
    record_event(workspace.sweeps / name, "finished")
    stops = early_stops(plan.trials, plan.placed.sweep)
    return SweepResult(
        **dict(report),
        name=name,
        failures=dict(failures or {}),
        stopped={
            trial.label: stops[trial.key].text for trial in plan.trials.trials if trial.key in stops
        },
    )
