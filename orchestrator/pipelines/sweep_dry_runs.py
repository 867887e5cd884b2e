"""Dry runs of sweeps: the trials, what is finished, and what the rest takes.

Nothing is started, downloaded, tokenized, measured or written. What is not known yet has an upper
bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iiet.config import ModelConfig
from orchestrator.data.preparation import expected_tokens, find_prepared
from orchestrator.evaluation.task_selection import (
    check_sweep_tasks,
    needs_lm_eval,
    tasks_of_source,
)
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.influence import stored_influence
from orchestrator.pipelines.sweep_plans import (
    SweepModel,
    check_arguments,
    plan_iterations,
    plan_students,
    plan_teacher,
    schedule_search,
    teacher_checkpoint,
)
from orchestrator.pipelines.training_dry_runs import UNPREPARED
from orchestrator.planning.fit import check_fit, find_problems
from orchestrator.planning.planned_training import PlannedTraining
from orchestrator.planning.price import PlannedWork, Price, pretraining_group, trial_group
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import TrialSuite
from orchestrator.reporting.price_table import price_rows
from orchestrator.settings import Settings
from orchestrator.sweeping.asha import asha_trials
from orchestrator.sweeping.checks import check_devices, check_models, check_sweep
from orchestrator.sweeping.distilled_baselines import costliest_distilled_baselines
from orchestrator.sweeping.elastic_plans import costliest_elastic, elastic_savings
from orchestrator.sweeping.model_plans import (
    TEACHER,
    ScratchModel,
    iterations_plan,
    max_num_students,
)
from orchestrator.sweeping.plan_table import plan_sentences
from orchestrator.sweeping.student_plans import costliest_students
from orchestrator.sweeping.trial_states import (
    TrialState,
    requested_noun,
    trial_states,
)
from orchestrator.sweeping.trials import (
    exact_cost,
    full_config,
)
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.training.checkpoint import load_config
from orchestrator.training.job import finished_outcome
from orchestrator.training.model_lookup import tokens_folder_of
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.read_only import read_only

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True)
class SweepDryRun:
    """What a sweep would do, and what that takes."""

    plan: SweepPlan
    """Its trials, as far as they are known."""
    states: tuple[TrialState, ...]
    """How far each trial is."""
    notes: tuple[str, ...]
    """What is reused, and what is not known yet."""
    price: Price
    """Tokens, FLOPs, hours, memory and disk of what is left."""
    problems: Mapping[str, str | None]
    """Place -> why the trainings do not fit there; None if they do. The first is this machine."""

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The price in words, as name and text."""
        return list(price_rows(self.price, self.problems))

    @property
    def sentences(self) -> tuple[str, ...]:
        """All of it in words."""
        return (*self.notes, *(f"{name}: {text}" for name, text in self.rows))

    def to_pandas(self) -> pandas.DataFrame:
        """Return `trial_rows` as a table."""
        import pandas

        return pandas.DataFrame(self.trial_rows())

    def to_json(self) -> dict[str, Any]:
        """Return the trials, the notes, the price, and what does not fit, as JSON values."""
        return {
            "name": self.plan.name,
            "trials": self.trial_rows(),
            "notes": list(self.notes),
            "price": self.price.model_dump(mode="json"),
            "problems": dict(self.problems),
        }

    def shown(self) -> Any:
        """Return trials, notes and price."""
        from orchestrator.reporting.price_table import two_column_table
        from orchestrator.sweeping.plan_table import plan_table

        yield plan_table(self.plan, self.states)
        yield from (f"  {line}" for line in self.notes)
        yield two_column_table(None, self.rows)

    def raise_failures(self) -> None:
        """Nothing that can be printed has failed."""

    def trial_rows(self) -> list[dict[str, Any]]:
        """Return one row per trial: label, role, schedule, exact costs, state."""
        full = full_config(self.plan)
        rows = []
        for state in self.states:
            config = state.trial.model
            row = {"name": state.trial.label, "role": state.trial.role, "method": config.method}
            row |= {"schedule": str(config.corrections), "state": state.name}
            rows.append(
                {**row, "steps_done": state.steps_done, **exact_cost(config, full).numbers()}
            )
        return rows


@dataclass(kw_only=True)
class _Draft:
    """What is known of a sweep before it runs."""

    plan: SweepPlan
    states: list[TrialState]
    pretraining: Sequence[TrialState] = ()
    """Those of them that the run itself trains, on the devices of section `cluster`."""
    unknown: Sequence[PlannedTraining] = ()
    """Trainings of trials whose schedules are not known yet."""
    notes: list[str] = field(default_factory=list)
    new_token_bytes: int = 0

    def work(self, settings: Settings, workspace: Workspace) -> PlannedWork:
        """Return what is trained: by the run itself, and in trials."""
        own = [state.training for state in self.pretraining if state.training]
        others = (state for state in self.states if state not in self.pretraining)
        trials = [state.training for state in others if state.training]
        return PlannedWork(
            groups=(
                pretraining_group(own, settings.cluster),
                trial_group([*trials, *self.unknown], settings, workspace.teachers),
            ),
            folder=workspace.root,
            new_token_bytes=self.new_token_bytes,
            is_upper_bound=bool(self.unknown),
            address=settings.cluster.ray_address,
        )


@read_only()
def plan_sweep(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    teacher: Path | str | None = None,
    models: Sequence[SweepModel] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> SweepDryRun:
    """Return what `sweep` would do with the same arguments, as far as it is known.

    If the teacher or its influence is missing, its students' schedules are unknown. Their largest
    number is then priced as if each made all corrections.

    Args:
        settings, teacher, models: As in `sweep`.

    Raises:
        UserError: If the settings do not go together.
    """
    context = open_context(workspace, progress)
    check_arguments(settings, teacher, models)
    check_sweep(settings)
    if teacher is None:
        draft = _draft_from_settings(settings, context, models, name)
    else:
        checkpoint = teacher_checkpoint(context, teacher)
        draft = _draft_of_students(settings, context, checkpoint, name)
    plan, work = draft.plan, draft.work(settings, context.workspace)
    pretraining, trials = work.groups
    pretrains = bool(pretraining.trainings)
    notes = plan_sentences(plan, requested_noun(plan, settings.sweep), draft.states) + draft.notes
    if settings.trials_use_gpus and trials.trainings:
        gpus = format_count(trials.trainings[0].num_workers, "GPU")
        notes.append(f"each trial runs on {gpus}, at most {trials.at_once} at once")
    if asha := asha_trials(plan, settings.sweep):
        notes.append(next(iter(asha.values())).rule.text)
    return SweepDryRun(
        plan=plan,
        states=tuple(draft.states),
        notes=tuple(notes),
        price=work.price(),
        problems=find_problems(work, partial(check_devices, settings, pretrains=pretrains)),
    )


@read_only()
def check_sweep_fits(
    settings: Settings, workspace: Workspace, models: Sequence[SweepModel] | None = None
) -> None:
    """Refuse a sweep from settings whose trainings do not fit together, before text is read.

    Raises:
        UserError: If they do not fit; says what would.
    """
    check_fit(_draft_from_settings(settings, Context(workspace), models).work(settings, workspace))


def _draft_from_settings(
    settings: Settings,
    context: Context,
    models: Sequence[SweepModel] | None,
    name: str | None = None,
) -> _Draft:
    """Return what is known of a sweep that makes its tokens, and trains its teacher or models."""
    check_sweep_tasks(settings, tasks_of_source(settings.data))
    tokens = find_prepared(settings.data, context.workspace.tokens)
    if settings.sweep.kind == "iterations":
        if models is None:
            check_models(settings)
        name = name or (None if tokens else "the sweep")  # Names follow from the tokens.
        plan = plan_iterations(settings, context, tokens, models, name=name, make=False)
        draft = _draft_of_plan(plan, settings)
    else:
        jobs = plan_teacher(settings, context.workspace, tokens)
        damaged: list[str] = []
        outcomes = {label: finished_outcome(job, damaged.append) for label, job in jobs.items()}
        done = {n: Path(str(o.checkpoint)) for n, o in outcomes.items() if o}
        if teacher := done.pop(TEACHER, None):
            draft = _draft_of_students(settings, context, teacher, name, baselines=done)
            if missing := {n: jobs[n] for n, outcome in outcomes.items() if not outcome}:
                draft.pretraining = _draft_of_pretraining(missing, settings).states
                draft.states += draft.pretraining
        else:
            draft = _draft_of_pretraining(jobs, settings)
            _add_unknown_students(
                draft, settings, jobs[TEACHER].model, "the teacher is not trained"
            )
        draft.notes += damaged
    if tokens is None:
        draft.notes.insert(0, UNPREPARED)
        draft.new_token_bytes = expected_tokens(settings.data, None).new_bytes
    return draft


def _draft_of_students(
    settings: Settings,
    context: Context,
    teacher: Path,
    name: str | None,
    *,
    baselines: Mapping[str, Path] | None = None,
) -> _Draft:
    """Return what is known of a sweep whose teacher is trained."""
    tokens, full = tokens_folder_of(teacher, context.workspace), load_config(teacher)
    influence = stored_influence(teacher, settings.influence, tokens, context.progress)
    plan = plan_students(
        settings, context, teacher, influence, baselines=baselines, name=name, make=False
    )
    if influence is None:
        draft = _draft_of_plan(plan, settings)
        _add_unknown_students(draft, settings, full, "the teacher's influence is not measured")
        return draft
    if settings.sweep.kind == "search":
        return _draft_of_search(plan, settings, context.workspace, teacher)
    draft = _draft_of_plan(plan, settings)
    if elastic := [trial for trial in plan.trials if trial.is_elastic]:
        draft.notes.append(elastic_savings(settings, elastic, context.workspace.teachers))
    return draft


def _draft_of_plan(plan: SweepPlan, settings: Settings) -> _Draft:
    draft = _Draft(plan=plan, states=trial_states(plan, settings.sweep))
    is_lm_eval = needs_lm_eval(settings.evaluation)
    if is_lm_eval and plan.tokens_folder and not plan.trials[0].suite.fingerprints:
        draft.notes.append("the tasks of lm-eval are not loaded, so no trial can be found measured")
    return draft


def _draft_of_pretraining(jobs: Mapping[str, TrainingJob], settings: Settings) -> _Draft:
    models = [ScratchModel(label=label, job=job) for label, job in jobs.items()]
    suite = TrialSuite(tokens_folder=models[0].job.tokens_folder)
    plan = iterations_plan(models, suite=suite, name="the teacher and its baselines")
    states = trial_states(plan, settings.sweep)
    return _Draft(plan=plan, states=states, pretraining=states)


def _draft_of_search(
    plan: SweepPlan, settings: Settings, workspace: Workspace, teacher: Path
) -> _Draft:
    """Return what a search has suggested so far, and what it may still suggest."""
    search = schedule_search(settings, workspace, plan, teacher)
    trials = (*plan.trials, *search.known_trials())
    draft = _draft_of_plan(plan.model_copy(update={"trials": trials}), settings)
    draft.unknown = costliest_students(settings, load_config(teacher), search.num_left)
    draft.notes.append(
        f"the search tries at most {search.num_wanted:,} more of {search.num_schedules:,} "
        f"schedules; which ones follows from the results, {search.num_left:,} are not known yet "
        "and priced as if each made all of the teacher's corrections"
        if search.num_wanted
        else "the search has nothing to try beside the family"
    )
    return draft


def _add_unknown_students(
    draft: _Draft, settings: Settings, teacher: ModelConfig, reason: str
) -> None:
    number, sweep = max_num_students(settings, teacher), settings.sweep
    students = costliest_students(settings, teacher, number)
    elastic = costliest_elastic(settings, teacher) if sweep.elastic else []
    if sweep.elastic and not sweep.compare:
        students = []
    baselines = costliest_distilled_baselines(settings, teacher)
    draft.unknown = [*elastic, *students, *baselines]
    priced = (
        "they are priced as if each made all of the teacher's corrections"
        if draft.unknown
        else "none of them is trained"
    )
    counts = format_count(number, "student")
    if elastic:
        of_each = f", and {counts}" if sweep.compare else ""
        counts = f"{format_count(len(elastic), 'elastic training')}{of_each}"
    more = f" and {format_count(len(baselines), 'distilled baseline')}" if baselines else ""
    draft.notes.append(
        f"{reason}, so its students' schedules are not known yet: at most {counts}{more}; {priced}"
    )
