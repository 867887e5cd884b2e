"""Plan the trials of a sweep, by reading only: which there are, and what they are measured on.

An iterations sweep pretrains models from scratch. A threshold sweep and a search distill students
of one teacher under schedules that its influence gives. How far each trial is, says `states.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.pruning import InfluenceTable
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import tokens_folder_of
from orchestrator.evaluation.heldout import python_passages
from orchestrator.evaluation.tasks import (
    HELDOUT,
    lm_eval_task_fingerprints,
    make_suite,
    tasks_beside,
)
from orchestrator.models.folder import load_config, text_files_key
from orchestrator.models.labels import group_of
from orchestrator.models.tokenizer import ModelTokenizer, check_template
from orchestrator.records.evaluation import Suite
from orchestrator.records.training import TrainingJob, job_parameters, shared_parameters
from orchestrator.records.trial import (
    Role,
    SweepTrials,
    Trial,
    role_beside,
    teacher_or_costliest,
)
from orchestrator.reporting.sections import Column, Table, TableRow
from orchestrator.settings import EvaluationSettings, SearchSettings, Settings, SweepSettings
from orchestrator.settings.evaluation import PYTHON_BITS
from orchestrator.settings.training import default_precision
from orchestrator.sweeping.models import (
    baseline_models,
    check_teacher,
    has_counts,
    settings_of,
    swept_variants,
    teachers_by_label,
)
from orchestrator.sweeping.states import TrialState
from orchestrator.sweeping.student_schedules import StudentSchedule, most_left_out
from orchestrator.sweeping.students import Students, checkpoint_trial, make_trial
from orchestrator.terminal.metrics import COST, METRICS
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes, format_count
from orchestrator.training.job import job_key, pretraining_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import last_recorded
from orchestrator.workspace.layout import PLAN_FILE, Workspace
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch


def plan_iterations(
    settings: Settings,
    workspace: Workspace,
    tokens: Path | None,
    models: Mapping[str, Settings] | None = None,
    *,
    named_baselines: Mapping[str, Path] | None = None,
    name: str | None = None,
    hashes: Mapping[str, str] | None = None,
) -> SweepTrials:
    """Plan a sweep of models trained from scratch on the same tokens.

    Args:
        models: Label -> settings, of which sections `model`, `training` and `cluster` count; those
            of the sweep's settings when unset. Labels that differ in `, seed N` at their end name
            the seeds of one model.
        named_baselines: Label -> checkpoint of the runs that the user wants beside them.
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
    return iterations_plan(labeled_jobs, suite, beside=named_trials, name=name)


def iterations_plan(
    jobs: Mapping[str, TrainingJob],
    suite: Suite,
    *,
    beside: Sequence[Trial] = (),
    name: str | None = None,
) -> SweepTrials:
    """Plan a sweep that pretrains models; those of one job are one trial.

    Args:
        jobs: Label -> training of the model.
        beside: Trials of the baselines that the user names.
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
    return _named_plan("iterations", name, [*trials.values(), *beside], len(models))


def plan_pretrained(jobs: Mapping[str, TrainingJob]) -> SweepTrials:
    """Return the models that a sweep trains before its students, as trials of which nothing is
    measured: what is known of a sweep whose teacher is not trained."""
    suite = Suite(tokens_folder=next(iter(jobs.values())).tokens_folder)
    return iterations_plan(jobs, suite, name="the teacher and its baselines")


def pretraining_trial(label: str, job: TrainingJob, suite: Suite) -> Trial:
    """Return the trial that trains a model from scratch; one without corrections is a baseline."""
    role: Role = "trial" if has_counts(job.model.method) else role_beside(label)
    return make_trial(
        role, label, job_key(job), suite, model=job.model, folder=job.run_folder, job=job
    )


def baseline_trials(
    baselines: Mapping[str, Path], suite: Suite, workspace: Workspace
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
) -> SweepTrials:
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
    variants = teachers_by_label(settings)
    first_name = next(iter(variants.values())).name
    students_by_teacher: list[Students] = []
    for label, checkpoint in teachers.items():
        variant = variants[label]
        config = load_config(checkpoint)
        check_teacher(settings, config)
        tokens = tokens_folder_of(checkpoint, workspace)
        suite = plan_suite(
            settings.evaluation, tokens, config, hashes, teacher=checkpoint, workspace=workspace
        )
        if suite.prompts:
            check_template(ModelTokenizer(checkpoint), suite.prompts)

        # Baselines stand beside the only teacher, or beside the seeds of the first of several.
        teacher_baselines: Mapping[str, Path] = baselines or {}
        if settings.sweep.teachers and variant.name == first_name:
            teacher_baselines = _baselines_of_seed(settings, baselines or {}, variant.seed)
        elif settings.sweep.teachers:
            teacher_baselines = {}

        # Of all seeds of this teacher.
        tables = [
            table
            for other_label, table in influence.items()
            if variants[other_label].name == variant.name
        ]
        students_by_teacher.append(
            Students(
                settings,
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
        family = students_plan(*students_by_teacher, beside=named_trials)
        return search_plan(family, settings.search, name)
    return students_plan(*students_by_teacher, beside=named_trials, name=name)


def _baselines_of_seed(
    settings: Settings, baselines: Mapping[str, Path], seed: int | None
) -> dict[str, Path]:
    """Return the trained baselines of a seed, by their names without it."""
    return {
        model.name: baselines[model.label]
        for model in baseline_models(settings)
        if model.seed == seed and model.label in baselines
    }


def students_plan(
    *students: Students, beside: Sequence[Trial] = (), name: str | None = None
) -> SweepTrials:
    """Plan the trials of one teacher's students or of several; those of one key are one trial.

    Args:
        beside: Trials of the baselines that the user names.
        name: Made from the plan's key when unset.
    """
    sweep = students[0].settings.sweep
    trials = {trial.key: trial for of_teacher in students for trial in of_teacher.trials()}
    for trial in beside:  # A teacher stays one, and a trained baseline keeps its name.
        trials.setdefault(trial.key, trial)
    num_teachers = len({of_teacher.name for of_teacher in students})
    return _named_plan(
        "threshold",
        name,
        [*trials.values()],
        sweep.num_requested * num_teachers,
        teacher=students[0].teacher,
    )


def mean_influence(tables: Sequence[InfluenceTable]) -> InfluenceTable:
    """Return the mean of the influence of one model's seeds; all else is that of the first seed."""
    if len(tables) == 1:
        return tables[0]

    def mean(*rows: Sequence[float]) -> tuple[float, ...]:
        return tuple(map(fmean, zip(*rows, strict=True)))

    def mean_by_layer(*matrices: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        return tuple(mean(*rows) for rows in zip(*matrices, strict=True))

    return replace(
        tables[0],
        value_rows=mean_by_layer(*(table.value_rows for table in tables)),
        residual_rows=mean_by_layer(*(table.residual_rows for table in tables)),
        layer_values=mean(*(table.layer_values for table in tables)),
    )


def search_plan(
    family: SweepTrials, settings: SearchSettings, name: str | None = None
) -> SweepTrials:
    """Return the plan that a search starts with: the trials of a family of schedules.

    Its name is made from its key when unset. A longer search has the same key and continues.
    """
    key_settings = settings.model_dump(mode="json", exclude={"num_trials"})
    key = content_key("search", family.key, key_settings)
    changes = {"key": key, "kind": "search", "name": name or f"search-{key[:8]}"}
    return family.model_copy(update=changes)


def schedule_search(
    settings: Settings, workspace: Workspace, plan: SweepTrials, teacher: Path
) -> ScheduleSearch:
    """Return what suggests further trials for the plan of a search."""
    from orchestrator.sweeping.search import ScheduleSearch  # Imports optuna.

    students = Students(settings, workspace, teacher, plan.trials[0].suite)
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


def _named_plan(
    kind: str,
    name: str | None,
    trials: Sequence[Trial],
    num_requested: int,
    teacher: Path | None = None,
) -> SweepTrials:
    # Two measures of influence may lead to the same schedules by other thresholds.
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


# What is measured


def load_tasks(
    settings: EvaluationSettings, tokens: Path, config: ModelConfig, progress: Progress
) -> dict[str, str]:
    """Make the held-out items that are missing, load lm-eval's tasks, and return their hashes.

    Raises:
        UserError: If the text is too poor, a task is missing, or its answers are too long.
    """
    make_suite(settings, tokens, context_length=config.context_length, make_progress=progress)
    length = settings.tokens_at_once(config.context_length)
    return lm_eval_task_fingerprints(settings, context_length=length)


def plan_suite(
    settings: EvaluationSettings,
    tokens: Path,
    config: ModelConfig,
    hashes: Mapping[str, str] | None = None,
    *,
    teacher: Path | None = None,
    workspace: Workspace | None = None,
) -> Suite:
    """Return how trials are evaluated.

    Args:
        hashes: What `load_tasks` returns; when unset, those that the newest sweep found count.
        teacher: Checkpoint of the full model; an imported one reads text with its own tokenizer.
    """
    suite = make_suite(settings, tokens, context_length=config.context_length)
    changes: dict[str, Any] = {
        "tokens": open_data(tokens).fingerprint,
        "precision": settings.precision or default_precision(on_gpus=False),
        "fingerprints": dict(hashes) if hashes else None,
    }
    if settings.suite == HELDOUT and not settings.include_path:
        changes["tasks"] = ()  # Held-out tasks alone need no names: they are all of their folder.
    beside = tasks_beside(settings)
    if beside:
        changes["beside"] = beside
    if PYTHON_BITS in beside:
        changes["python_text"] = content_key(*python_passages(tokens))
    if teacher and (vocabulary := text_files_key(teacher)):
        changes |= {"vocabulary": vocabulary, "vocabulary_folder": str(teacher)}
    suite = suite.model_copy(update=changes)
    if hashes is None and workspace:
        return _with_known_fingerprints(suite, workspace)
    return suite


def _with_known_fingerprints(suite: Suite, workspace: Workspace) -> Suite:
    """Return a suite with the hashes that the newest sweep with the same tasks has found."""
    for folder in sorted(workspace.sweeps.glob("*/"), key=last_recorded, reverse=True):
        with suppress(UserError):  # A damaged plan knows none.
            if plan := SweepTrials.read(folder / PLAN_FILE):
                stored_suite = plan.trials[0].suite
                changes = {"fingerprints": stored_suite.fingerprints}
                suite_with_hashes = suite.model_copy(update=changes)
                if suite_with_hashes.key == stored_suite.key:
                    return suite_with_hashes
    return suite


# What a plan says of its trials


def exact_cost(config: ModelConfig, full: ModelConfig) -> dict[str, float]:
    """Return the cost of a model in all units that follow from shapes, and relative to `full`."""
    cost = inference_cost(config)
    full_cost = inference_cost(full)
    return {
        **{
            name.removeprefix(COST): getattr(cost, metric.counted_as)
            for name, metric in METRICS.items()
            if metric.counted_as
        },
        "relative_evaluations": cost.evaluations_per_token / full_cost.evaluations_per_token,
        "relative_flops": cost.decode_flops_per_token / full_cost.decode_flops_per_token,
    }


def full_trial(plan: SweepTrials) -> Trial:
    """Return the trial that the others are compared with; see `teacher_or_costliest`."""
    full = teacher_or_costliest(
        plan.trials,
        role=lambda trial: trial.role,
        cost=lambda trial: inference_cost(trial.model).evaluations_per_token,
    )
    assert full is not None, "a plan has trials"
    return full


def num_models(trials: Sequence[Trial]) -> int:
    """Return the number of schedules or models that a sweep is about; seeds count once.

    Baselines count where all models are trained from scratch.
    """
    counted = [t for t in trials if t.role == "trial" or (t.job and t.parent is None)]
    return len({t.schedule_text if t.parent else t.group or t.key for t in counted})


def plan_table(plan: SweepTrials, states: Sequence[TrialState]) -> Table:
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
            f"from step {state.steps_done:,}" if state.steps_done else state.status
            for state in states
        ],
    }
    shown = {column: cells for column, cells in columns.items() if any(cells)}
    rows = [TableRow(cells) for cells in zip(*shown.values(), strict=True)]
    return Table([*shown], rows, f"Plan of {plan.name}")


def plan_sentences(
    plan: SweepTrials, sweep: SweepSettings, states: Sequence[TrialState]
) -> list[str]:
    """Say what was merged, and what is reused."""
    # What the plan is about.
    if plan.kind == "iterations":
        requested = "model"
        distinct = ""
    else:
        nouns = {"thresholds": "threshold", "budgets": "budget", "num_schedules": "schedule"}
        requested = nouns[sweep.schedule_choice]
        distinct = " schedule" if plan.num_distinct == 1 else " schedules"
    contents = (
        f"{format_count(plan.num_requested, requested)} asked for, "
        f"{plan.num_distinct:,} distinct{distinct}"
    )
    if num_seeds := len({trial.seed for trial in plan.trials if trial.seed is not None}):
        contents += f", each under {format_count(num_seeds, 'seed')}"
    if num_suggested := num_models(plan.trials) - plan.num_distinct:
        contents += f"; {num_suggested:,} more that the search suggested"

    # How far it is.
    numbers = Counter(state.status for state in states)
    verb = "is" if len(states) == 1 else "are"
    trials = format_count(len(states), "trial")
    progress = f"{numbers['finished']:,} of {trials} {verb} finished and reused"
    if num_stopped := numbers["stopped early"]:
        progress += f", {num_stopped:,} stopped early and left so"
    if num_begun := sum(bool(state.steps_done) for state in states):
        progress += f", {num_begun:,} partly trained"
    sentences = [contents, progress] if plan.num_distinct else [progress]
    if any(trial.threshold_text for trial in plan.trials):
        sentences.append("thresholds: a correction whose influence is below is left out")
    return sentences


def sweep_parameters(plan: SweepTrials, settings: Settings) -> dict[str, str]:
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
        choice = sweep.schedule_choice
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
            return ", ".join(f"{key}: {text(part)}" for key, part in value.items())
        return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

    jobs = [t.job for t in plan.trials if t.job]
    shared = shared_parameters([job_parameters(job) for job in jobs])
    return {
        **{n: str(v) for n, v in shared.items() if n != "schedule" and not n.startswith("r_")},
        **{name: text(value) for name, value in params.items() if value not in (None, (), {})},
    }
