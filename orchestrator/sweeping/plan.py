"""Plan a sweep, by reading only: its trials, what they are measured on, and how far each is.

An iterations sweep pretrains models from scratch. A threshold sweep and a search distill students
of one teacher under schedules that its influence gives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from iiet.config import ModelConfig
from iiet.cost import InferenceCost, inference_cost
from iiet.pruning import FamilyMember, InfluenceTable
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import tokens_folder_of
from orchestrator.evaluation.tasks import (
    HELDOUT,
    lm_eval_task_fingerprints,
    select_tasks,
    user_task_folders,
)
from orchestrator.models.folder import load_config, text_files_key
from orchestrator.models.tokenizer import ModelTokenizer, check_template
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import TrainingJob, job_parameters, shared_parameters
from orchestrator.records.trial import (
    AshaRule,
    EarlyStop,
    SweepPlan,
    Trial,
    TrialSuite,
    teacher_or_costliest,
)
from orchestrator.reporting.sections import Column, Table, TableRow
from orchestrator.settings import EvaluationSettings, SearchSettings, Settings, SweepSettings
from orchestrator.settings.training import default_precision
from orchestrator.sweeping.models import (
    baseline_models,
    check_teacher,
    has_counts,
    settings_of,
    swept_variants,
    teachers_by_label,
)
from orchestrator.sweeping.students import Students, checkpoint_trial, make_trial
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes, format_count
from orchestrator.training.job import finished_outcome, job_key, pretraining_job
from orchestrator.training.shared_steps import share_first_stages
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import last_recorded
from orchestrator.workspace.layout import PLAN_FILE, STOPPED_NAME, Workspace
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch

SCHEDULE_CHOICES = ("num_schedules", "thresholds", "budgets")
"""Settings of which one decides how many students there are; a later one wins."""


@dataclass(frozen=True, kw_only=True)
class SweepModel:
    """A model that an iterations sweep trains from scratch."""

    label: str
    """What tables and pictures call it."""
    settings: Settings
    """Sections `model`, `training` and `cluster` count."""
    group: str | None = None
    """Label without the seed; models of one group are seeds of one model."""


def plan_iterations(
    settings: Settings,
    workspace: Workspace,
    tokens: Path | None,
    models: Sequence[SweepModel] | None = None,
    *,
    named_baselines: Mapping[str, Path] | None = None,
    name: str | None = None,
    hashes: Mapping[str, str] | None = None,
) -> SweepPlan:
    """Plan a sweep of models trained from scratch on the same tokens.

    Args:
        models: Those of the settings when unset.
        named_baselines: Label -> checkpoint of the runs that the user wants beside them.
        hashes: Of lm-eval's tasks, if they are loaded.
    """
    if models is None:
        models = [
            SweepModel(
                label=variant.label,
                settings=settings_of(settings, variant),
                group=None if variant.seed is None else variant.group,
            )
            for variant in swept_variants(settings)
        ]
    jobs = [pretraining_job(model.settings, workspace, tokens) for model in models]
    suite = TrialSuite(tokens_folder="")
    if tokens is not None:
        suite = plan_suite(settings.evaluation, tokens, jobs[0].model, hashes, workspace=workspace)
    beside = baseline_trials(named_baselines or {}, suite, workspace)
    return iterations_plan(models, jobs, suite=suite, beside=beside, name=name)


def iterations_plan(
    models: Sequence[SweepModel],
    jobs: Sequence[TrainingJob],
    *,
    suite: TrialSuite,
    beside: Sequence[Trial] = (),
    name: str | None = None,
) -> SweepPlan:
    """Plan a sweep that pretrains models, each by its job; those of one job are one trial.

    Args:
        beside: Trials of the baselines that the user names.
    """
    trials = {}
    for model, job in zip(models, share_first_stages(jobs), strict=True):
        is_swept = has_counts(job.model.method)
        role: Literal["baseline", "trial"] = "trial" if is_swept else "baseline"
        trial = make_trial(
            role, model.label, job_key(job), suite, model=job.model, folder=job.run_folder, job=job
        )
        seed = job.recipe.seed if model.group else None
        changes = {"seed": seed, "group": model.group}
        trials[trial.key] = trial.model_copy(update=changes)
    seeds = {job.recipe.seed for model, job in zip(models, jobs, strict=True) if model.group}
    num_requested = len(models) // (len(seeds) or 1)
    return _named_plan("iterations", name, [*trials.values(), *beside], num_requested)


def baseline_trials(
    baselines: Mapping[str, Path], suite: TrialSuite, workspace: Workspace
) -> list[Trial]:
    """Return the trials that measure the baselines that the user names."""
    return [
        checkpoint_trial("baseline", label, checkpoint, load_config(checkpoint), suite, workspace)
        for label, checkpoint in baselines.items()
    ]


def plan_students(
    settings: Settings,
    workspace: Workspace,
    teachers: Mapping[str, Path],
    influence: Mapping[str, InfluenceTable],
    *,
    baselines: Mapping[str, Path] | None = None,
    named_baselines: Mapping[str, Path] | None = None,
    name: str | None = None,
    hashes: Mapping[str, str] | None = None,
) -> SweepPlan:
    """Plan a threshold sweep or a search: the trials that are known before any has run.

    The seeds of a teacher have the same schedules, those of their mean influence.

    Args:
        teachers: Label of `teachers_by_label` -> checkpoint.
        influence: Label -> table; without them the plan has no students.
        baselines: Label -> checkpoint of those that the sweep has trained. A baseline of several
            teachers is listed once for each seed.
        named_baselines: Label -> checkpoint of the runs that the user wants beside them.
        hashes: Of lm-eval's tasks, if they are loaded.
    """
    sweep, models, parts = settings.sweep, teachers_by_label(settings), list[Students]()
    trained_baselines = baselines or {}
    for label, teacher in teachers.items():
        full = load_config(teacher)
        model = models[label]
        beside = trained_baselines
        own_name = ""
        check_teacher(sweep, full)
        suite = plan_suite(
            settings.evaluation,
            tokens_folder_of(teacher, workspace),
            full,
            hashes,
            teacher=teacher,
            workspace=workspace,
        )
        if suite.prompts:
            check_template(ModelTokenizer(teacher), suite.prompts)
        tables = [influence[one] for one in influence if models[one].name == model.name]
        if sweep.teachers:
            own_name, beside = model.name, {}
            if own_name == next(iter(models.values())).name:
                beside = {
                    baseline.name: trained_baselines[baseline.label]
                    for baseline in baseline_models(settings)
                    if baseline.seed == model.seed and baseline.label in trained_baselines
                }
        table = mean_influence(tables) if tables else None
        where = settings, workspace, teacher, suite
        parts.append(Students(*where, table, beside, name=own_name, seed=model.seed))
    plan = students_plan(
        *parts,
        beside=baseline_trials(named_baselines or {}, parts[0].suite, workspace),
        name=None if sweep.kind == "search" else name,
    )
    return search_plan(plan, settings.search, name) if sweep.kind == "search" else plan


def students_plan(
    *students: Students, beside: Sequence[Trial] = (), name: str | None = None
) -> SweepPlan:
    """Plan the trials of one teacher's students or of several; those of one key are one trial.

    Args:
        beside: Trials of the baselines that the user names.
        name: Made from the plan's key when unset.
    """
    first, sweep = students[0], students[0].settings.sweep
    trials = {trial.key: trial for each in students for trial in each.trials()}
    for trial in beside:  # A teacher stays one, and a trained baseline keeps its name.
        trials.setdefault(trial.key, trial)
    number = len(sweep.thresholds) or len(sweep.budgets) or sweep.num_schedules
    number *= len({each.name for each in students})
    return _named_plan("threshold", name, [*trials.values()], number, teacher=first.teacher)


def mean_influence(tables: Sequence[InfluenceTable]) -> InfluenceTable:
    """Return the mean of what was measured of one model's seeds; errors are those of the first."""

    def mean(*rows: Sequence[float]) -> tuple[float, ...]:
        return tuple(map(fmean, zip(*rows, strict=True)))

    if len(tables) == 1:
        return tables[0]
    values, residuals = (
        tuple(mean(*rows) for rows in zip(*each, strict=True))
        for each in ([t.value_rows for t in tables], [t.residual_rows for t in tables])
    )
    layers = mean(*(table.layer_values for table in tables))
    return replace(tables[0], value_rows=values, residual_rows=residuals, layer_values=layers)


def search_plan(family: SweepPlan, settings: SearchSettings, name: str | None = None) -> SweepPlan:
    """Return the plan that a search starts with: the trials of a family of schedules.

    Its name is made from its key when unset. A longer search has the same key and continues.
    """
    asked = settings.model_dump(mode="json", exclude={"num_trials"})
    key = content_key("search", family.key, asked)
    name = name or f"search-{key[:8]}"
    return family.model_copy(update={"key": key, "kind": "search", "name": name})


def schedule_search(
    settings: Settings, workspace: Workspace, plan: SweepPlan, teacher: Path
) -> ScheduleSearch:
    """Return what suggests further trials for the plan of a search."""
    from orchestrator.sweeping.search import ScheduleSearch  # Imports optuna.

    students = Students(settings, workspace, teacher, plan.trials[0].suite)
    return ScheduleSearch(
        plan,
        students.full.corrections,
        settings.search,
        lambda schedule: students.student(FamilyMember(schedule, math.nan, math.nan)),
        folder=workspace.sweeps / plan.name,
    )


def _named_plan(
    kind: str,
    name: str | None,
    trials: Sequence[Trial],
    num_requested: int,
    teacher: Path | None = None,
) -> SweepPlan:
    # Two measures of influence may lead to the same schedules by other thresholds.
    shown = [[t.key, t.threshold_above, t.threshold_up_to] for t in trials]
    key = content_key("sweep", kind, shown)
    return SweepPlan(
        key=key,
        name=name or f"{kind}-{key[:8]}",
        kind=kind,
        tokens_folder=trials[0].suite.tokens_folder,
        teacher=str(teacher) if teacher else None,
        num_requested=num_requested,
        trials=tuple(trials),
        num_distinct=num_models(trials),
    )


# What is measured


def load_tasks(
    settings: EvaluationSettings, tokens: Path, config: ModelConfig, progress: Progress
) -> dict[str, str]:
    """Make the held-out items that are missing, load lm-eval's tasks, and return their hashes.

    Raises:
        UserError: If the text is too poor, a task is missing, or its answers are too long.
    """
    length = settings.tokens_at_once(config.context_length)
    select_tasks(settings, tokens, context_length=length, make=progress)
    return lm_eval_task_fingerprints(settings, context_length=length)


def plan_suite(
    settings: EvaluationSettings,
    tokens: Path,
    config: ModelConfig,
    hashes: Mapping[str, str] | None = None,
    *,
    teacher: Path | None = None,
    workspace: Workspace | None = None,
) -> TrialSuite:
    """Return how trials are evaluated.

    Args:
        hashes: What `load_tasks` returns; when unset, those that the newest sweep found count.
        teacher: Checkpoint of the full model; an imported one reads text with its own tokenizer.
    """
    length = settings.tokens_at_once(config.context_length)
    asked = select_tasks(settings, tokens, context_length=length)
    # Held-out tasks alone need no names: they are all tasks of their folder.
    is_heldout_alone = settings.suite == HELDOUT and not settings.include_path
    vocabulary = text_files_key(teacher) if teacher else None
    suite = TrialSuite(
        tokens=open_data(tokens).fingerprint,
        tokens_folder=str(tokens),
        tasks=() if is_heldout_alone else tuple(asked.names),
        suite=asked.heldout.name if asked.heldout else "",
        suite_folder=str(asked.heldout or ""),
        include_folder="".join(map(str, user_task_folders(settings))),
        batch_size=settings.batch_size,
        limit=settings.limit,
        sequence_length=None if length == config.context_length else length,
        num_fewshot=settings.num_fewshot,
        prompts=settings.prompts,
        precision=settings.precision or default_precision(on_gpus=False),
        fingerprints=dict(hashes) if hashes else None,
        vocabulary=vocabulary or None,
        vocabulary_folder=str(teacher) if vocabulary else None,
    )
    if hashes is None and workspace:
        for sweep in sorted(workspace.sweeps.glob("*/"), key=last_recorded, reverse=True):
            with suppress(UserError):
                if plan := SweepPlan.read(sweep / PLAN_FILE):
                    known = plan.trials[0].suite
                    found = suite.model_copy(update={"fingerprints": known.fingerprints})
                    if found.key == known.key:
                        return found
    return suite


# What a plan says of its trials


def exact_cost(config: ModelConfig, full: ModelConfig) -> dict[str, float]:
    """Return the cost of a model in all units that follow from shapes, and relative to `full`."""
    cost, most = inference_cost(config), inference_cost(full)
    return {
        **cost_numbers(cost),
        "relative_evaluations": cost.evaluations_per_token / most.evaluations_per_token,
        "relative_flops": cost.decode_flops_per_token / most.decode_flops_per_token,
    }


def cost_numbers(cost: InferenceCost) -> dict[str, float]:
    """Return the numbers of a cost that are tracked, by name."""
    return {
        "evaluations": cost.evaluations_per_token,
        "flops_per_token": cost.decode_flops_per_token,
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


def num_models(trials: Sequence[Trial]) -> int:
    """Return the number of schedules or models that a sweep is about; seeds count once.

    Baselines count where all models are trained from scratch.
    """
    own = [t for t in trials if t.role == "trial" or (t.job and t.parent is None)]
    return len({t.schedule if t.parent else t.group or t.key for t in own})


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
    """Return key -> reason of the trials without a result that were stopped early: by this rule,
    for a competitor that is in the plan."""
    found: dict[str, EarlyStop] = {}
    for trials in competing_trials(plan, sweep):
        labels = {trial.label for trial in trials}
        for trial in (one for one in trials if not one.result_path.exists()):
            stop = EarlyStop.read(Path(trial.folder) / STOPPED_NAME)
            if stop and stop.rule == asha_rule(sweep) and stop.competitor in labels - {trial.label}:
                found[trial.key] = stop
    return found


@dataclass(frozen=True, kw_only=True)
class TrialState:
    """How far a trial is."""

    trial: Trial
    name: Literal["finished", "stopped early", "to measure", "to train"]
    """Its state, or what is done next."""
    training: Estimate | None = None
    """Its training, if that is not finished."""

    @property
    def steps_done(self) -> int:
        """Training steps that it resumes after."""
        return self.training.steps_done if self.training else 0


def trial_states(plan: SweepPlan, sweep: SweepSettings) -> list[TrialState]:
    """Return how far each trial of a plan is."""
    stops, states = early_stops(plan, sweep), []
    for trial in plan.trials:
        if trial.result():
            states.append(TrialState(trial=trial, name="finished"))
        elif trial.key in stops:
            states.append(TrialState(trial=trial, name="stopped early"))
        elif trial.job is None or finished_outcome(trial.job):
            states.append(TrialState(trial=trial, name="to measure"))
        else:
            training = Estimate.of(trial.job)
            states.append(TrialState(trial=trial, name="to train", training=training))
    return states


def plan_table(plan: SweepPlan, states: Sequence[TrialState]) -> Table:
    """Return a table of a plan's trials and their states; narrow terminals show fewer columns.

    Learning rates and numbers of layers are shown if they differ.
    """
    trials = [state.trial for state in states]  # A plan may lack those that the run pretrains.
    full_flops = inference_cost(full_trial(plan).model).decode_flops_per_token
    costs = [inference_cost(trial.model) for trial in trials]
    rates = [f"{trial.job.recipe.learning_rate:g}" if trial.job else "" for trial in trials]
    layers = [str(trial.model.num_layers) for trial in trials]
    columns = {
        Column("model", is_text=True): [trial.label for trial in trials],
        Column("thresholds", 3, is_text=True): [trial.threshold_text for trial in trials],
        Column("rate", 2): rates if len({*rates} - {""}) > 1 else [],
        Column("layers", 1): layers if len({*layers}) > 1 else [],
        Column("NFE"): [str(cost.evaluations_per_token) for cost in costs],
        Column("FLOPs", 4): [f"{cost.decode_flops_per_token / full_flops:.0%}" for cost in costs],
        Column("KV/token", 5): [format_bytes(cost.kv_bytes_per_token) for cost in costs],
        Column("state", is_text=True): [
            f"from step {state.steps_done:,}" if state.steps_done else state.name
            for state in states
        ],
    }
    shown = {column: cells for column, cells in columns.items() if any(cells)}
    rows = [TableRow(cells) for cells in zip(*shown.values(), strict=True)]
    return Table([*shown], rows, f"Plan of {plan.name}")


def plan_sentences(
    plan: SweepPlan, sweep: SweepSettings, states: Sequence[TrialState]
) -> list[str]:
    """Say what was merged, and what is reused."""
    asked = "model"
    if plan.kind != "iterations":
        asked = "threshold" if sweep.thresholds else "budget" if sweep.budgets else "schedule"
    made = "" if asked == "model" else " schedule" if plan.num_distinct == 1 else " schedules"
    first = (
        f"{format_count(plan.num_requested, asked)} asked for, {plan.num_distinct:,} distinct{made}"
    )
    if num_seeds := len({trial.seed for trial in plan.trials if trial.seed is not None}):
        first += f", each under {format_count(num_seeds, 'seed')}"
    if num_more := num_models(plan.trials) - plan.num_distinct:
        first += f"; {num_more:,} more that the search suggested"

    names = Counter(state.name for state in states)
    are = "is" if len(states) == 1 else "are"
    found = (
        f"{names['finished']:,} of {format_count(len(states), 'trial')} {are} finished and reused"
    )
    if num_stopped := names["stopped early"]:
        found += f", {num_stopped:,} stopped early and left so"
    if num_begun := sum(bool(state.steps_done) for state in states):
        found += f", {num_begun:,} partly trained"
    return [first, found] if plan.num_distinct else [found]


def sweep_parameters(plan: SweepPlan, settings: Settings) -> dict[str, str]:
    """Return the parameters that apply to this kind of sweep, and those that its trainings share.

    A setting that is off, or an empty list, is left out.
    """
    sweep = settings.sweep
    params: dict[str, Any] = {"kind": plan.kind, "num_trials": len(plan.trials)}
    if plan.kind == "iterations":
        names = ["methods", "iterations", "num_layers"]
        names += [name for name in type(sweep).model_fields if sweep.asha and "asha" in name]
        params |= {name: getattr(sweep, name) for name in names}
    else:
        choice = [name for name in SCHEDULE_CHOICES if getattr(sweep, name)][-1]
        params |= {
            "teacher": plan.teacher,
            "influence_metric": settings.influence.metric,
            choice: getattr(sweep, choice),
            "selection": sweep.selection,
            "control": settings.distillation.control,
            "elastic": sweep.elastic or None,
        }
        if choice == "budgets" or sweep.budget_unit != "evaluations":
            params["budget_unit"] = sweep.budget_unit
    if plan.kind == "search":
        params |= {f"search.{name}": value for name, value in settings.search}
    params["seeds"] = sweep.seeds
    params["baseline_runs"] = sweep.baseline_runs

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key}: {text(each)}" for key, each in value.items())
        return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

    jobs = [t.job for t in plan.trials if t.job]
    shared = shared_parameters([job_parameters(job) for job in jobs])
    return {
        **{n: str(v) for n, v in shared.items() if n != "schedule" and not n.startswith("r_")},
        **{name: text(value) for name, value in params.items() if value not in (None, (), {})},
    }
