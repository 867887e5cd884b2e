"""Sweeps and searches: from settings, or from a teacher's checkpoint, to the front and its report.

A plan is made by reading only: the trials, how far each is, and what the rest takes. What is not
known yet, the students of a teacher that is not trained or measured, has a simple bound. A run
makes what the plan lacks (tokens, tasks, models, influence), plans again, and runs exactly these
trials. The same call resumes an interrupted sweep; for a finished one, it only writes the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
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
from orchestrator.pipelines.context import Context, in_one_call
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
from orchestrator.reporting import results
from orchestrator.reporting.command_tables import price_rows
from orchestrator.reporting.sections import two_column_table
from orchestrator.settings import Settings, flatten, to_yaml
from orchestrator.sweeping import plan as plans
from orchestrator.sweeping.models import (
    TEACHER,
    check_devices,
    check_models,
    check_named_baselines,
    check_sweep,
    claims_answered,
    named_baselines,
    teacher_and_baselines,
    teachers_by_label,
)
from orchestrator.sweeping.students import unknown_students
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.journal import Journal, read_tail
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

    from orchestrator.sweeping.run import SweepOutcome

NEWEST = "newest"
"""As a teacher: the workspace's newest IIET with corrections."""


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """What a sweep was asked for: a run plans the same again when it has made what was missing."""

    settings: Settings
    workspace: Workspace
    teacher: Path | None
    """A given teacher; without it, the sweep trains its models from scratch."""
    named_baselines: Mapping[str, Path]
    """Label -> checkpoint of the runs in `sweep.baseline_runs`."""
    models: Sequence[plans.SweepModel] | None
    name: str | None
    hashes: Mapping[str, str] | None = None
    """Those of lm-eval's tasks, if a run has loaded them; else what is stored counts."""
    influence: Mapping[Path, InfluenceTable] = field(default_factory=dict)
    """Checkpoint of a teacher -> its table, if a run has measured it; likewise."""


class PlannedSweep(Result):
    """What a sweep does, and what that takes."""

    asked: SweepRequest
    plan: SweepPlan
    """Its trials, as far as they are known."""
    said: list[str]
    """What is not prepared, trained, measured or known yet."""
    pretraining: TrainingPlan | None = None
    """The teacher and its baselines, if the sweep trains them itself."""
    unknown: list[Estimate] = Field(default=[])
    """A bound of the trainings that are not known yet."""
    search: Any = None
    """What suggests further trials, if the sweep is a search."""

    @cached_property
    def states(self) -> list[plans.TrialState]:
        """How far each trial is, and each model that is pretrained first."""
        states = plans.trial_states(self.plan, self.asked.settings.sweep)
        if self.pretraining and self.plan.teacher:  # Else these models are the plan's trials.
            done = self.pretraining.finished
            if left := [label for label in self.pretraining.jobs if label not in done]:
                first = _pretraining_plan(self.pretraining, left)
                states += plans.trial_states(first, self.asked.settings.sweep)
        return states

    @cached_property
    def _left(self) -> tuple[list[Estimate], list[Estimate], Settings]:
        """The trainings before the trials; those of the trials, on their devices; the settings
        with the GPUs of the trials."""
        first = self.pretraining
        before = {job.run_folder for job in first.jobs.values()} if first else set()
        trials = [s.training for s in self.states if s.training and s.trial.folder not in before]
        placed = assign_trial_gpus(self.asked.settings, [*trials, *self.unknown])
        return (
            first.left if first else [],
            on_trial_devices([*trials, *self.unknown], placed),
            placed,
        )

    @property
    def placed(self) -> Settings:
        """The settings, with the GPUs of the trials."""
        return self._left[2]

    @cached_property
    def price(self) -> Price:
        """Tokens, FLOPs, hours, memory and disk of what is left."""
        before, trials, settings = self._left
        unprepared = not self.plan.tokens_folder
        return price_of(
            [*before, *trials],
            self.asked.workspace.root,
            new_token_bytes=expected_tokens(settings.data, None).new_bytes if unprepared else 0,
            is_upper_bound=bool(self.unknown),
        )

    @cached_property
    def problems(self) -> dict[str, str | None]:
        """Place -> why the trainings do not fit there; None if they do. First this machine."""
        before, trials, settings = self._left
        root, address = self.asked.workspace.root, settings.cluster.ray_address
        check = partial(check_devices, settings, pretrains=bool(before))
        return find_problems([*before, *trials], self.price.disk, root, address, check)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is reused, and what is not known yet."""
        sweep, trials, suite = self.placed.sweep, self._left[1], self.plan.trials[0].suite
        notes = [*plans.plan_sentences(self.plan, sweep, self.states), *self.said]
        if needs_lm_eval(self.placed.evaluation) and suite.tasks and not suite.fingerprints:
            notes.append("the tasks of lm-eval are not loaded, so no trial can be found measured")
        if sweep.gpus_per_trial and trials:
            gpus = format_count(sweep.num_workers_per_trial, "GPU")
            at_once = min(sweep.trials_at_once or 1, len(trials))
            notes.append(f"each trial runs on {gpus}, at most {at_once} at once")
        if plans.competing_trials(self.plan, sweep):
            notes.append(plans.asha_rule(sweep).text)
        return tuple(notes)

    @property
    def sentences(self) -> tuple[str, ...]:
        """All of it in words, but for the trials."""
        rows = price_rows(self.price, self.problems)
        return (*self.notes, *(f"{name}: {text}" for name, text in rows))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per trial: label, role, schedule, exact costs, state."""
        full = plans.full_trial(self.plan).model
        return [
            {
                "name": state.trial.label,
                "role": state.trial.role,
                "method": state.trial.model.method,
                "schedule": state.trial.schedule_text,
                "state": state.name,
                "steps_done": state.steps_done,
                **plans.exact_cost(state.trial.model, full),
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
        yield plans.plan_table(self.plan, self.states)
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
    models: Sequence[plans.SweepModel] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> PlannedSweep:
    """Return what a sweep does, as far as it is known.

    `threshold` prunes a teacher by influence, and distills and evaluates each schedule; `search`
    continues with schedules that a sampler suggests; `iterations` pretrains methods and iteration
    counts from scratch. Finished trials are not run again.

    Args:
        settings: The whole tree.
        teacher: The full model: a checkpoint or run, by path or name, or `newest`. When unset, it
            is pretrained from the settings, with its baselines.
        models: Models that an iterations sweep trains instead of those that the settings name.

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
    check_sweep(settings)
    space, given, progress = find_workspace(workspace), None, progress or Progress()
    if teacher is not None:
        named = None if str(teacher) == NEWEST else teacher
        given = resolve_teacher(space, named, progress.note)
    asked = SweepRequest(
        settings=settings,
        workspace=space,
        teacher=given,
        named_baselines=named_baselines(settings, space, given),
        models=models,
        name=name,
    )
    found = _planned(asked)
    found.price  # noqa: B018  # raises if the workers cannot share a step
    return found


def _planned(asked: SweepRequest) -> PlannedSweep:
    settings, space = asked.settings, asked.workspace
    if asked.teacher:
        return _plan_students(asked, {TEACHER: asked.teacher}, {})

    # Models are trained from scratch: all of the sweep, or those before its students.
    check_sweep_tasks(settings, tasks_of_source(settings.data))
    if asked.models is None:
        check_models(settings)
    tokens = find_prepared(settings.data, space.tokens)
    said = [] if tokens else [UNPREPARED]
    if settings.sweep.kind == "iterations":
        name = asked.name or (None if tokens else "the sweep")  # It follows from the tokens.
        plan = plans.plan_iterations(
            settings,
            space,
            tokens,
            asked.models,
            named_baselines=asked.named_baselines,
            name=name,
            hashes=asked.hashes,
        )
        if tokens:
            own_models = [trial.model for trial in plan.trials if trial.job]
            check_named_baselines(asked.named_baselines, tokens, own_models)
        return PlannedSweep(asked=asked, plan=plan, said=said)
    first = plan_models(teacher_and_baselines(settings), space, tokens)
    said += [*first.damaged, claims_answered(settings)]
    if tokens:  # Before anything is trained.
        own_models = [job.model for job in first.jobs.values()]
        check_named_baselines(asked.named_baselines, tokens, own_models)
    labels, finished = teachers_by_label(settings), first.finished
    if labels.keys() <= finished.keys():
        teachers = {label: finished.pop(label) for label in labels}
        found = _plan_students(asked, teachers, finished)
        return found.model_copy(update={"pretraining": first, "said": [*said, *found.said]})
    models = {label: first.jobs[label].model for label in labels}
    unknown, sentences = _bounds(settings, models, " is not trained")
    return PlannedSweep(
        asked=asked,
        plan=_pretraining_plan(first, first.jobs),
        said=[*said, *sentences],
        pretraining=first,
        unknown=unknown,
    )


def _plan_students(
    asked: SweepRequest,
    teachers: Mapping[str, Path],
    baselines: Mapping[str, Path],
) -> PlannedSweep:
    """Plan the students of trained teachers; a bound of them if influence is not measured."""
    settings, space, tables = asked.settings, asked.workspace, dict[str, InfluenceTable]()
    for label, checkpoint in teachers.items():
        table = asked.influence.get(checkpoint)
        if table is None:
            measurement = plan_influence(settings, workspace=space, model=checkpoint)
            table = measurement.table
        if table:
            tables[label] = table
    models = {label: load_config(path) for label, path in teachers.items()}
    is_measured = teachers.keys() == tables.keys()
    plan = plans.plan_students(
        settings,
        space,
        teachers,
        tables if is_measured else {},  # The schedules follow from all of them.
        baselines=baselines,
        named_baselines=asked.named_baselines,
        name=asked.name,
        hashes=asked.hashes,
    )
    check_named_baselines(asked.named_baselines, Path(plan.tokens_folder), models.values())
    unknown, said, search = list[Estimate](), list[str](), None
    if not is_measured:
        unknown, said = _bounds(settings, models, "'s influence is not measured")
    elif settings.sweep.kind == "search":
        search = plans.schedule_search(settings, space, plan, teachers[TEACHER])
        trials = (*plan.trials, *search.suggested_trials())
        plan = plan.model_copy(update={"trials": trials})
        unknown, said = [*map(Estimate.of, search.jobs_left())], [search.text]
    return PlannedSweep(asked=asked, plan=plan, said=said, unknown=unknown, search=search)


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


def _pretraining_plan(pretraining: TrainingPlan, labels: Iterable[str]) -> SweepPlan:
    models = [plans.SweepModel(label=label, settings=pretraining.models[label]) for label in labels]
    jobs = [pretraining.jobs[model.label] for model in models]
    suite = TrialSuite(tokens_folder=jobs[0].tokens_folder)
    return plans.iterations_plan(models, jobs, suite=suite, name="the teacher and its baselines")


def run_sweep(plan: PlannedSweep, context: Context) -> SweepResult:
    """Run the sweep that `settings.sweep.kind` describes, and write its report."""
    plan.check()
    if (found := _stored_results(plan, context.workspace)) is not None:
        context.progress.note("all trials are finished and found again")
        return _report_of(plan, found, context)
    from orchestrator.cluster.ray import ray_cluster
    from orchestrator.sweeping.run import run_plan  # Imports Ray, MLflow and lm-eval.

    asked, progress, workspace = plan.asked, context.progress, context.workspace
    settings, pretrains, root = asked.settings, plan.pretraining is not None, workspace.root

    def again() -> PlannedSweep:
        with offline(DRY_RUN):
            found = _planned(asked)
        found.check()
        return found

    check = partial(check_devices, settings, pretrains=pretrains)
    # The sweep's folder has its name only when the influence is measured. The same call a second
    # time is refused at once.
    call_key = content_key(to_yaml(settings), str(asked.teacher), asked.name)
    call_lock = workspace.logs / f".sweep-{call_key}.lock"  # A call that is a mistake deletes it.
    with (
        refuse_second(call_lock, "this sweep"),
        joined_cluster(settings.cluster, root, check, progress),
    ):
        check_sweep(settings, progress)
        if not asked.teacher:
            tokens = prepare_tokens(settings.data, workspace, progress)
            if str(tokens) != plan.plan.tokens_folder:
                plan = again()
        tokens = Path(plan.plan.tokens_folder)
        check_sweep_tasks(settings, offered_tasks(open_data(tokens)))
        # Before pretraining: the held-out text may be too poor for the tasks.
        model = plan.plan.trials[0].model
        hashes = plans.load_tasks(settings.evaluation, tokens, model, progress)
        start = partial(ray_cluster, settings.cluster, folder=root, say=progress.start)
        with start() if pretrains else nullcontext():
            if plan.pretraining:
                run_trainings(plan.pretraining, context, kind=PRETRAIN_OF_SWEEP)
                plan = again()
            tables: dict[Path, InfluenceTable] = {}
            on_device = trial_device(settings, root)
            for trial in plan.plan.trials:
                if trial.role == "teacher":
                    teacher = Path(str(trial.checkpoint))
                    measured = plan_influence(settings, workspace=workspace, model=teacher)
                    tables[teacher] = run_influence(measured, context, on_device=on_device).table
            asked = replace(asked, hashes=hashes, influence=tables)
            plan = again()
            lock = workspace.sweeps / plan.plan.name / SWEEP_LOCK_NAME
            with refuse_second(lock, f"the sweep {plan.plan.name}"):
                outcome = run_plan(
                    plan.plan,
                    settings,
                    workspace,
                    placed=plan.placed,
                    tracking=context.tracking,
                    progress=progress,
                    search=plan.search,
                )
                found = _results_of(plan, outcome)
                return _report_of(plan, found, context, outcome.failures)


sweep = in_one_call(plan_sweep, run_sweep, teacher=local_model)


def _stored_results(planned: PlannedSweep, workspace: Workspace) -> results.StoredSweep | None:
    """Return the results of a sweep that has ended and has nothing left; None if it has not.

    The tasks of lm-eval may have changed, which is known when they are loaded.
    """
    settings, plan = planned.asked.settings, planned.plan
    is_left = any(state.name in ("to measure", "to train") for state in planned.states)
    if is_left or planned.unknown or (planned.search and planned.search.num_left):
        return None
    if needs_lm_eval(settings.evaluation):
        return None
    last = read_tail(workspace.sweeps / plan.name)[-1:]
    finished = {state.trial.key for state in planned.states if state.name == "finished"}
    with suppress(UserError):  # Else they are written again.
        found = results.load_sweep_results(workspace, plan.name)
        if last and last[0].get("name") == "finished" and found.key == plan.key:
            return found if {result.key for result in found.results} == finished else None
    return None


def _results_of(planned: PlannedSweep, outcome: SweepOutcome) -> results.StoredSweep:
    """Return what a report needs of a sweep that was run."""
    plan, finished = outcome.plan, {result.key for result in outcome.results}
    suite, root = plan.trials[0].suite, planned.asked.workspace.root
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
    return results.StoredSweep(
        name=plan.name,
        key=plan.key,
        results=outcome.results,
        influence=next(iter(planned.asked.influence.values()), None),
        facts={
            **({results.CHANCE_TITLE: chances} if chances else {}),
            "Trials": ends,
            results.SETTINGS_TITLE: flatten(planned.asked.settings),
            results.PROVENANCE_TITLE: {
                "sweep": plan.key,
                "kind": plan.kind,
                "teacher": portable_path(plan.teacher or "none", root),
                "tokens": portable_path(plan.tokens_folder, root),
                "schedules asked for": plan.num_requested,
                "trials": len(plan.trials),
                **environment(),
            },
        },
    )


def _report_of(
    planned: PlannedSweep,
    found: results.StoredSweep,
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
    stops = plans.early_stops(plan, planned.placed.sweep)
    return SweepResult.of(
        written,
        workspace,
        name=plan.name,
        trials=found.results,
        failures=dict(failures or {}),
        stopped={t.label: stops[t.key].text for t in plan.trials if t.key in stops},
    )
