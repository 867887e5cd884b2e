"""Sweeps and searches: from settings, or from a teacher's checkpoint, to the front and its report.

A plan is made by reading only: the trials, how far each is, and what the rest takes. What is not
known yet, the students of a teacher that is not trained or measured, has a simple bound. A run
makes what the plan lacks (tokens, tasks, models, influence), plans again, and runs exactly these
trials. The same call resumes an interrupted sweep; for a finished one, it only writes the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from iiet.config import ModelConfig
from iiet.pruning import InfluenceTable
from orchestrator.cluster.task import joined_cluster, trial_device
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import expected_tokens, find_prepared
from orchestrator.data.preparation import prepare as prepare_tokens
from orchestrator.evaluation.heldout import heldout_chances, offered_tasks
from orchestrator.evaluation.tasks import check_sweep_tasks, needs_lm_eval, tasks_of_source
from orchestrator.models.folder import load_config
from orchestrator.models.hub import DRY_RUN, offline
from orchestrator.models.lookup import resolve_teacher
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.influence import plan_influence, run_influence
from orchestrator.pipelines.models import local_model
from orchestrator.pipelines.reports import ReportResult
from orchestrator.pipelines.result import Result
from orchestrator.pipelines.training import UNPREPARED, TrainingPlan, plan_models, run_trainings
from orchestrator.planning.estimate import (
    Estimate,
    Price,
    assign_trial_gpus,
    find_problems,
    on_trial_devices,
    price_of,
)
from orchestrator.records.tracked_run import PRETRAIN_OF_SWEEP
from orchestrator.records.trial import SweepPlan, Trial, TrialSuite
from orchestrator.reporting.command_tables import expected_time, price_rows
from orchestrator.reporting.results import (
    CHANCE_TITLE,
    LEFT_OUT_TITLE,
    PROVENANCE_TITLE,
    SETTINGS_TITLE,
    StoredSweep,
    load_sweep_results,
)
from orchestrator.reporting.sections import two_column_table
from orchestrator.settings import MLFLOW, Settings, flatten
from orchestrator.sweeping.models import (
    TEACHER,
    check_devices,
    check_models,
    check_sweep,
    claims_answered,
    teacher_and_baselines,
    teachers_by_label,
)
from orchestrator.sweeping.plan import (
    SweepModel,
    TrialState,
    asha_rule,
    competing_trials,
    early_stops,
    exact_cost,
    full_trial,
    iterations_plan,
    load_tasks,
    measuring_flops,
    plan_iterations,
    plan_sentences,
    plan_students,
    plan_table,
    schedule_search,
    trial_states,
)
from orchestrator.sweeping.students import unknown_students
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.journal import Journal, read_tail
from orchestrator.workspace.layout import Workspace, find_workspace, portable_path
from orchestrator.workspace.provenance import environment

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.sweeping.run import SweepOutcome
    from orchestrator.sweeping.search import ScheduleSearch

NEWEST = "newest"
"""As a teacher: the workspace's newest IIET with corrections."""


class PlannedSweep(Result):
    """What a sweep does, and what that takes."""

    plan: SweepPlan
    """Its trials, as far as they are known."""
    states: tuple[TrialState, ...]
    """How far each is, and each model that is pretrained first."""
    trainings: tuple[Estimate, ...]
    """What is left to train of them."""
    unknown: tuple[Estimate, ...]
    """A bound of the trainings that are not known yet."""
    said: tuple[str, ...]
    """What is not prepared, trained, measured or known yet."""
    asked: dict[str, Any]
    """The arguments of `plan_sweep`."""
    workspace: Workspace
    new_token_bytes: int = 0
    """Bytes of the tokens that are prepared first."""
    pretraining: TrainingPlan | None = None
    """The teacher and its baselines, if the sweep trains them itself."""
    influence: InfluenceTable | None = None
    """Of the teacher, of several the first, if it is measured."""
    teachers_left: tuple[ModelConfig, ...] = ()
    """Those whose influence is not measured."""
    search: Any = None
    """What suggests further trials, if the sweep is a search."""

    @cached_property
    def placed(self) -> Settings:
        """The settings, with the GPUs of the trials."""
        return assign_trial_gpus(self.asked["settings"], [*self.trainings, *self.unknown])

    @cached_property
    def _parts(self) -> tuple[list[Estimate], list[Estimate]]:
        """The trainings before the trials, and those of the trials, on their devices."""
        before = self.pretraining.left() if self.pretraining else []
        return before, on_trial_devices([*self.trainings, *self.unknown], self.placed)

    @cached_property
    def price(self) -> Price:
        """Tokens, FLOPs, hours, memory and disk of what is left."""
        before, trials = self._parts
        is_stored = self.placed.distillation.teacher_cache
        left = [s.trial.model for s in self.states if s.name in ("to train", "to measure")]
        models = [*left, *(each.config for each in self.unknown)]
        influence, measuring = measuring_flops(self.placed, self.teachers_left, models)
        return price_of(
            [*before, *trials],
            self.workspace.root,
            new_token_bytes=self.new_token_bytes,
            is_upper_bound=bool(self.unknown),
            teachers=self.workspace.teachers if is_stored else None,
            influence_flops=influence,
            measuring_flops=measuring,
        )

    @cached_property
    def problems(self) -> dict[str, str | None]:
        """Place -> why the trainings do not fit there; None if they do. First this machine."""
        before, trials = self._parts
        address = self.placed.cluster.ray_address
        check = partial(check_devices, self.placed, pretrains=bool(before))
        return find_problems(
            [*before, *trials], self.price.disk, self.workspace.root, address, check
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What is reused, and what is not known yet."""
        sweep, trials = self.placed.sweep, self._parts[1]
        notes = [*plan_sentences(self.plan, sweep, self.states), *self.said]
        if sweep.gpus_per_trial and trials:
            gpus = format_count(sweep.num_workers_per_trial, "GPU")
            at_once = min(sweep.trials_at_once or 1, len(trials))
            notes.append(f"each trial runs on {gpus}, at most {at_once} at once")
        if competing_trials(self.plan, sweep):
            notes.append(asha_rule(sweep).text)
        return tuple(notes)

    @property
    def sentences(self) -> tuple[str, ...]:
        """All of it in words, but for the trials."""
        rows = price_rows(self.price, self.problems)
        return (*self.notes, *(f"{name}: {text}" for name, text in rows))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per trial: label, role, schedule, exact costs, state."""
        full = full_trial(self.plan).model
        return [
            {
                "name": state.trial.label,
                "role": state.trial.role,
                "method": state.trial.model.method,
                "schedule": str(state.trial.model.corrections),
                "state": state.name,
                "steps_done": state.steps_done,
                **exact_cost(state.trial.model, full),
            }
            for state in self.states
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the trials, the notes, the price, and what does not fit.

        Keys:
            name: the sweep's name, if it is known yet
            trials: one entry per known trial: `name`, `role`, `method`, `schedule` (as text),
                `state`, `steps_done`, exact costs
            notes: what is reused, and what is not known yet
            price: what is left to train: `num_trainings`, `num_tokens`, `num_teacher_tokens`,
                `flops`, `hours` (shortest and longest), `num_devices`, `uses_gpus`, `rate`,
                `memory` and `disk` (bytes by name), `free_disk`, `is_upper_bound`; `stop_seconds`
                and `num_saving`, how long a stop takes at most, and how many trainings then save
            problems: place to why the trainings do not fit there, or `null`
        """
        return {
            "name": self.plan.name,
            "trials": self.rows(),
            "notes": list(self.notes),
            "price": self.price.model_dump(mode="json"),
            "problems": self.problems,
        }

    def shown(self) -> Iterable[RenderableType]:
        """Return the trials, what is finished, and what the rest takes."""
        yield plan_table(self.plan, self.states)
        yield from (f"  {note}" for note in self.notes)
        yield two_column_table(None, [*price_rows(self.price, self.problems)])


class SweepResult(ReportResult):
    """A sweep that has ended, and its report."""

    name: str
    """Name of the sweep; `report` and `pick` find it by this."""
    trials: tuple[Trial, ...] = Field(exclude=True)
    """Finished trials, the teacher and the baselines among them, in the plan's order."""
    failures: dict[str, str]
    """Label to reason of the trials that failed; the same call tries them again."""
    stopped: dict[str, str]
    """Label to reason of the trials that a rule stopped early."""

    def raise_failures(self) -> None:
        """Raise `RunFailed` with the names of the trials that failed, if there are any."""
        raise_failures(self.failures)


def raise_failures(failures: Mapping[str, str]) -> None:
    """Raise `RunFailed` with the names of the trials that failed, if there are any."""
    if failures:
        raise RunFailed(
            f"{len(failures)} trials failed ({', '.join(failures)}); the same command tries them "
            "again"
        )


def sweep(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    teacher: Path | str | None = None,
    baselines: Mapping[str, Path] | None = None,
    models: Sequence[SweepModel] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Run the sweep that `settings.sweep.kind` describes, and write its report.

    `threshold` prunes a teacher by influence, and distills and evaluates each schedule; `search`
    continues with schedules that a sampler suggests; `iterations` pretrains methods and iteration
    counts from scratch. Finished trials are not run again.

    Args:
        settings: The whole tree.
        teacher: The full model: a checkpoint or run, by path or name, or `newest`. When unset, it
            is pretrained from the settings, with its baselines.
        baselines: Label to checkpoint of models that stand beside the front of a given teacher;
            when unset, the workspace's models that fit it.
        models: Models that an iterations sweep trains instead of those that the settings name.

    Raises:
        UserError: If something does not go together; nothing is trained then.
        Interrupted: After Ctrl-C; finished trials stay finished.
        RunFailed: If the teacher's training or every trial failed; single failures are in the
            result.
    """
    pretrains = teacher is None and settings.sweep.kind != "iterations"
    check_sweep(settings)
    check_devices(settings, pretrains=pretrains)
    context = open_context(workspace, progress)
    if teacher not in (None, NEWEST):
        teacher = local_model(teacher, context.workspace, progress)
    plan = plan_sweep(
        settings,
        workspace=context.workspace,
        teacher=teacher,
        baselines=baselines,
        models=models,
        name=name,
        progress=progress,
    )
    return run_sweep(plan, context)


@offline(DRY_RUN)
def plan_sweep(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    teacher: Path | str | None = None,
    baselines: Mapping[str, Path] | None = None,
    models: Sequence[SweepModel] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    fingerprints: Mapping[str, str] | None = None,
    influence: Mapping[str, InfluenceTable] | None = None,
) -> PlannedSweep:
    """Return what `sweep` does with the same arguments, as far as it is known.

    Args:
        fingerprints, influence: Hashes of lm-eval's tasks, and the influence of each teacher by its
            checkpoint, if a run has loaded and measured them; else what is stored counts.

    Raises:
        UserError: If the settings do not go together.
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
    if settings.sweep.teachers and (teacher is not None or baselines is not None):
        raise UserError(
            "sweep.teachers names teachers that the sweep trains itself, with their baselines; "
            "leave it out, or give neither a teacher nor baselines"
        )
    check_sweep(settings)
    space, progress = find_workspace(workspace), progress or Progress()
    asked: dict[str, Any] = {"settings": settings, "baselines": baselines}
    asked |= {"models": models, "name": name}
    said: list[str] = []
    unknown: list[Estimate] = []
    pretraining: TrainingPlan | None = None
    search: ScheduleSearch | None = None
    labels = teachers_by_label(settings) if kind != "iterations" else {}
    teachers: dict[str, Path] = {}
    new_token_bytes = 0

    # What is trained first: models, or a teacher whose students follow.
    if teacher is not None:
        asked["teacher"] = resolve_teacher(space, None if teacher == NEWEST else teacher)
        teachers[TEACHER] = asked["teacher"]
    else:
        check_sweep_tasks(settings, tasks_of_source(settings.data))
        if models is None:
            check_models(settings)
        tokens = find_prepared(settings.data, space.tokens)
        if tokens is None:
            said.append(UNPREPARED)
            new_token_bytes = expected_tokens(settings.data, None).new_bytes
        if kind == "iterations":
            name = name or (None if tokens else "the sweep")  # Names follow from the tokens.
            plan = plan_iterations(settings, space, tokens, models, name=name, hashes=fingerprints)
        else:
            pretraining = plan_models(teacher_and_baselines(settings), space, tokens)
            said += pretraining.damaged
            baselines = {**pretraining.finished}
            if labels.keys() <= baselines.keys():
                teachers = {label: baselines.pop(label) for label in labels}
            said.append(claims_answered(settings))

    # The students of teachers that are trained; else a bound of them.
    tables: dict[str, InfluenceTable] = {}
    for label, checkpoint in teachers.items():
        if influence and str(checkpoint) in influence:
            tables[label] = influence[str(checkpoint)]
            continue
        measurement = plan_influence(settings, workspace=space, model=checkpoint)
        if measurement.table:
            tables[label] = measurement.table
        for note in measurement.notes:
            progress.note(note)
    teachers_left = [load_config(path) for name, path in teachers.items() if name not in tables]
    if teachers:
        if len(tables) < len(teachers):  # The schedules follow from all of them.
            tables = {}
        options: dict[str, Any] = {"baselines": baselines, "name": name, "hashes": fingerprints}
        plan = plan_students(settings, space, teachers, tables, note=progress.note, **options)
        if not tables:
            models_of = {label: load_config(path) for label, path in teachers.items()}
            unknown, sentences = _bounds(settings, models_of, "'s influence is not measured")
            said += sentences
        elif kind == "search":
            search = schedule_search(settings, space, plan, teachers[TEACHER])
            plan = plan.model_copy(update={"trials": (*plan.trials, *search.suggested_trials())})
            unknown = [Estimate.of(job) for job in search.jobs_left()]
            said.append(search.text)
    elif pretraining:
        plan = _models_plan(pretraining, pretraining.jobs)
        models_of = {label: pretraining.jobs[label].model for label in labels}
        teachers_left = [*models_of.values()]
        unknown, sentences = _bounds(settings, models_of, " is not trained")
        said += sentences

    # How far it is.
    states = trial_states(plan, settings.sweep)
    trainings = [state.training for state in states if state.training]
    if pretraining and not teachers:
        trainings = []  # They are the models that are pretrained.
    elif pretraining and pretraining.left():
        left = [label for label in pretraining.jobs if label not in pretraining.finished]
        states += trial_states(_models_plan(pretraining, left), settings.sweep)
    suite = plan.trials[0].suite
    is_loaded = fingerprints is not None or suite.fingerprints or not suite.tasks
    if needs_lm_eval(settings.evaluation) and not is_loaded:
        said.append("the tasks of lm-eval are not loaded, so no trial can be found measured")
    planned = PlannedSweep(
        plan=plan,
        states=tuple(states),
        trainings=tuple(trainings),
        unknown=tuple(unknown),
        said=tuple(said),
        asked=asked,
        workspace=space,
        new_token_bytes=new_token_bytes,
        pretraining=pretraining,
        influence=next(iter(tables.values()), None),
        teachers_left=tuple(teachers_left),
        search=search,
    )
    planned.price  # noqa: B018  # raises if the workers cannot share a step
    return planned


def _bounds(
    settings: Settings, models: Mapping[str, ModelConfig], why: str
) -> tuple[list[Estimate], list[str]]:
    """Return a bound of the students of each teacher, under all seeds, and why it is one."""
    first_seed = settings.sweep.seeds[0] if settings.sweep.seeds else None
    unknown, sentences = list[Estimate](), []
    for label, variant in teachers_by_label(settings).items():
        if variant.seed in (None, first_seed):
            trainings, counts = unknown_students(settings, models[label])
            unknown += trainings
            name = f" {variant.name}" if settings.sweep.teachers else ""
            sentences.append(f"the teacher{name}{why}, so {counts}")
    return unknown, sentences


def _models_plan(pretraining: TrainingPlan, labels: Iterable[str]) -> SweepPlan:
    models = [SweepModel(label=label, settings=pretraining.models[label]) for label in labels]
    jobs = [pretraining.jobs[model.label] for model in models]
    suite = TrialSuite(tokens_folder=jobs[0].tokens_folder)
    return iterations_plan(models, jobs, suite=suite, name="the teacher and its baselines")


def run_sweep(plan: PlannedSweep, context: Context) -> SweepResult:
    """Make what the plan lacks, run its trials, and write the report; as `sweep`."""
    plan.check()
    if (found := _stored_results(plan, context.workspace)) is not None:
        context.progress.note("all trials are finished and found again")
        return _report_of(plan, found, context)
    from orchestrator.cluster.ray import ray_cluster
    from orchestrator.sweeping.run import run_plan  # Imports Ray, MLflow and lm-eval.

    settings, progress, workspace = plan.asked["settings"], context.progress, context.workspace
    pretrains, root = plan.pretraining is not None, workspace.root

    def again(**made: Any) -> PlannedSweep:
        # Without the progress display: what is to be noted was noted with the first plan.
        found = plan_sweep(workspace=workspace, **plan.asked, **made)
        found.check()
        return found

    context.use_loggers(settings.tracking.loggers)
    check = partial(check_devices, settings, pretrains=pretrains)
    with joined_cluster(settings.cluster, root, check, progress):
        check_sweep(settings, progress)
        if "teacher" not in plan.asked:
            tokens = prepare_tokens(settings.data, workspace, progress)
            if str(tokens) != plan.plan.tokens_folder:
                plan = again()
        tokens = Path(plan.plan.tokens_folder)
        check_sweep_tasks(settings, offered_tasks(open_data(tokens)))
        # Before pretraining: the held-out text may be too poor for the tasks.
        model = plan.plan.trials[0].model
        made: dict[str, Any] = {
            "fingerprints": load_tasks(settings.evaluation, tokens, model, progress)
        }
        start = partial(ray_cluster, settings.cluster, folder=root, say=progress.start)
        with start() if pretrains else nullcontext():
            progress.note(f"expected: {expected_time(plan.price)}")
            progress.expected = plan.price.seconds
            if plan.pretraining:
                run_trainings(plan.pretraining, context, kind=PRETRAIN_OF_SWEEP)
                plan = again()
                progress.expected = plan.price.seconds
            made["influence"] = {}
            on_device = trial_device(settings, root)
            for teacher in [t.checkpoint for t in plan.plan.trials if t.role == "teacher"]:
                planned = plan_influence(settings, workspace=workspace, model=Path(str(teacher)))
                table = run_influence(planned, context, on_device=on_device).table
                made["influence"][str(teacher)] = table
            plan = again(**made)
            progress.expected = plan.price.seconds
            outcome = run_plan(
                plan.plan,
                settings,
                workspace,
                placed=plan.placed,
                tracking=context.tracking,
                progress=progress,
                search=plan.search,
            )
            found = _results_of(plan, outcome, workspace)
            return _report_of(plan, found, context, outcome.failures)


def _stored_results(planned: PlannedSweep, workspace: Workspace) -> StoredSweep | None:
    """Return the results of a sweep that has ended and has nothing left; None if it has not.

    The tasks of lm-eval may have changed, which is known when they are loaded; and a logger that
    was not asked for before lacks the trainings.
    """
    settings, plan = planned.asked["settings"], planned.plan
    is_left = any(state.name in ("to measure", "to train") for state in planned.states)
    if is_left or planned.unknown or (planned.search and planned.search.num_left):
        return None
    if needs_lm_eval(settings.evaluation) or settings.tracking.loggers != (MLFLOW,):
        return None
    last = read_tail(workspace.sweeps / plan.name)[-1:]
    finished = {state.trial.key for state in planned.states if state.name == "finished"}
    with suppress(UserError):  # Else they are written again.
        found = load_sweep_results(workspace, plan.name)
        if last and last[0].get("name") == "finished" and found.key == plan.key:
            return found if {result.key for result in found.results} == finished else None
    return None


def _results_of(planned: PlannedSweep, outcome: SweepOutcome, workspace: Workspace) -> StoredSweep:
    """Return what a report needs of a sweep that was run."""
    settings = planned.asked["settings"]
    plan, finished = outcome.plan, {result.key for result in outcome.results}
    suite = plan.trials[0].suite
    chances = heldout_chances(Path(suite.suite_folder) if suite.suite_folder else None)
    chances = {n: text for n, text in chances.items() if not suite.tasks or n in suite.tasks}
    ends: dict[str, str] = {}
    for trial in plan.trials:
        ends[trial.label] = "trained and measured" if trial.job else "measured"
        if trial.label in outcome.failures:
            ends[trial.label] = f"failed: {outcome.failures[trial.label]}"
        elif trial.label in outcome.stopped:
            ends[trial.label] = outcome.stopped[trial.label]
        elif trial.key not in finished:
            ends[trial.label] = "not finished"
        elif trial.key in outcome.reused:
            ends[trial.label] = "reused: it was finished before"
    return StoredSweep(
        name=plan.name,
        key=plan.key,
        results=outcome.results,
        influence=planned.influence,
        facts={
            **({LEFT_OUT_TITLE: plan.left_out} if plan.left_out else {}),
            **({CHANCE_TITLE: chances} if chances else {}),
            "Trials": ends,
            SETTINGS_TITLE: flatten(settings),
            PROVENANCE_TITLE: {
                "sweep": plan.key,
                "kind": plan.kind,
                "teacher": portable_path(plan.teacher or "none", workspace.root),
                "tokens": portable_path(plan.tokens_folder, workspace.root),
                "schedules asked for": plan.num_requested,
                "trials": len(plan.trials),
                **environment(),
            },
        },
    )


def _report_of(
    planned: PlannedSweep,
    found: StoredSweep,
    context: Context,
    failures: Mapping[str, str] | None = None,
) -> SweepResult:
    """Write the report of a sweep that has ended."""
    from orchestrator.reporting.report import write_sweep_report  # Imports vl-convert.

    workspace, plan = context.workspace, planned.plan
    written = write_sweep_report(workspace, found, tracking=lambda: context.tracking)
    journal = Journal(workspace.sweeps / plan.name)
    journal.event("finished")  # Commands without a name take the newest sweep.
    journal.close()
    stops = early_stops(plan, planned.placed.sweep)
    return SweepResult.of(
        written,
        workspace,
        name=plan.name,
        trials=found.results,
        failures=dict(failures or {}),
        stopped={t.label: stops[t.key].text for t in plan.trials if t.key in stops},
    )
