"""Plan a sweep, by reading only: its trials, what they are measured on, and what is not known yet.

An iterations sweep pretrains models from scratch. A threshold sweep and a search distill students
of one teacher under schedules that its influence gives: the threshold's nested family, or the
knapsack's best schedule at each cost; those of given thresholds or budgets, or a number of them
spread evenly over cost. Without a measured influence, there is an upper bound of what they take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from iiet.config import ModelConfig
from iiet.influence import InfluenceTable
from iiet.methods import METHODS
from iiet.pruning import (
    Cost,
    FamilyMember,
    knapsack,
    num_evaluations,
    schedule_family,
    spread_over_cost,
)
from iiet.schedule import IterationSchedule
from orchestrator.data.mixture import open_data
from orchestrator.data.model_tokens import tokens_folder_of
from orchestrator.evaluation.selection import (
    lm_eval_task_fingerprints,
    needs_heldout,
    select_tasks,
    user_task_folders,
)
from orchestrator.evaluation.tasks import HELDOUT
from orchestrator.models.folder import load_config, text_files_key, weights_key
from orchestrator.models.tokenizer import ModelTokenizer, check_template
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import SweepPlan, Trial, TrialSuite
from orchestrator.settings import EvaluationSettings, SearchSettings, Settings, SweepSettings
from orchestrator.settings.training import default_precision
from orchestrator.sweeping.baselines import (
    baselines_upper_bound,
    distilled_baseline_trials,
    find_baselines,
)
from orchestrator.sweeping.models import schedule_cost, settings_of, swept_variants
from orchestrator.sweeping.trials import (
    checkpoint_trial,
    elastic_trials,
    elastic_upper_bound,
    evaluation_key,
    num_models,
    student_estimates,
    student_trial,
    without_elastic,
)
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.training.job import job_key, pretraining_job
from orchestrator.training.shared_steps import share_first_stages
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import last_recorded
from orchestrator.workspace.layout import PLAN_FILE, Workspace
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch


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
    name: str | None = None,
    hashes: Mapping[str, str] | None = None,
) -> SweepPlan:
    """Plan a sweep of models trained from scratch on the same tokens; arguments as `plan_sweep`."""
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
        config, sweeps = jobs[0].model, workspace.sweeps
        suite = plan_suite(settings.evaluation, tokens, config, hashes, sweeps=sweeps)
    return iterations_plan(models, jobs, suite=suite, name=name)


def iterations_plan(
    models: Sequence[SweepModel],
    jobs: Sequence[TrainingJob],
    *,
    suite: TrialSuite,
    name: str | None = None,
) -> SweepPlan:
    """Plan a sweep that pretrains several models from scratch.

    Models with the same job are one trial. The name is made from the plan's key when unset.

    Args:
        jobs: The training of each model, in the folder of a pretraining run of its settings.
    """
    trials = {}
    for model, job in zip(models, share_first_stages(jobs), strict=True):
        is_baseline = not METHODS[job.model.method].has_corrections
        trial = Trial(
            key=evaluation_key(job_key(job), suite),
            role="baseline" if is_baseline else "trial",
            label=model.label,
            model=job.model,
            folder=job.run_folder,
            job=job,
            suite=suite,
            seed=job.recipe.seed if model.group else None,
            group=model.group,
        )
        trials[trial.key] = trial
    seeds = {job.recipe.seed for model, job in zip(models, jobs, strict=True) if model.group}
    num_requested = len(models) // (len(seeds) or 1)
    return make_plan("iterations", name, [*trials.values()], suite, num_requested, teacher=None)


def plan_students(
    settings: Settings,
    workspace: Workspace,
    teacher: Path,
    influence: InfluenceTable | None,
    *,
    note: Callable[[str], None] = lambda _: None,
    baselines: Mapping[str, Path] | None = None,
    name: str | None = None,
    hashes: Mapping[str, str] | None = None,
) -> SweepPlan:
    """Plan a threshold sweep or a search: the trials that are known before any has run.

    Args:
        teacher: Checkpoint of the full model.
        influence: Its table; without it the plan has no students.
        baselines: Label to checkpoint; when unset, the workspace's models without corrections that
            have the teacher's shape and tokens; `sweep.num_layers` allows other depths.
        hashes: Of lm-eval's tasks, if they are loaded.
        note: Called with a sentence for each run that cannot be a baseline.
    """
    full = load_config(teacher)
    left_out: dict[str, str] = {}
    if baselines is None:
        known = find_baselines(workspace, teacher, settings.sweep.num_layers)
        baselines, left_out = known.found, known.left_out
        for run, reason in left_out.items():
            note(f"run {run}: {reason}")
    tokens = tokens_folder_of(teacher, workspace)
    suite = plan_suite(
        settings.evaluation, tokens, full, hashes, teacher=teacher, sweeps=workspace.sweeps
    )
    if suite.prompts:
        check_template(ModelTokenizer(teacher), suite.prompts)
    cost = schedule_cost(settings.sweep.budget_unit, full)
    is_search = settings.sweep.kind == "search"
    members = choose_members(influence, settings.sweep, cost=cost) if influence else ()
    elastic: list[Trial] = []
    if settings.sweep.elastic:
        if influence:
            elastic = elastic_trials(
                settings, workspace, teacher=teacher, members=members, suite=suite
            )
        settings = without_elastic(settings)
    beside = [
        checkpoint_trial("baseline", label, folder, load_config(folder), suite, workspace)
        for label, folder in baselines.items()
    ]
    if influence:
        beside += distilled_baseline_trials(
            settings, workspace, teacher=teacher, members=members, influence=influence, suite=suite
        )
    plan = threshold_plan(
        settings,
        workspace,
        teacher=teacher,
        members=members,
        suite=suite,
        elastic=elastic,
        baselines=beside,
        left_out=left_out,
        name=None if is_search else name,
    )
    return search_plan(plan, settings.search, name) if is_search else plan


def threshold_plan(
    settings: Settings,
    workspace: Workspace,
    *,
    teacher: Path,
    members: Sequence[FamilyMember],
    suite: TrialSuite,
    elastic: Sequence[Trial] = (),
    baselines: Sequence[Trial] = (),
    left_out: Mapping[str, str] | None = None,
    name: str | None = None,
) -> SweepPlan:
    """Plan the teacher, elastic weights, students under the chosen schedules, and the baselines.

    Elastic weights take the students' place, unless the two are compared. Students that are pruned
    but not trained have no seeds: each schedule is one trial.

    Args:
        settings: Sections `sweep` and `distillation`.
        workspace: Where trials are stored.
        teacher: Checkpoint of the full model.
        members: The schedules, costliest first; see `choose_members`.
        suite: What is measured.
        elastic: The trials of elastic weights; see `elastic_trials`.
        baselines: Models that stand beside the front.
        left_out: Name of a run that cannot be a baseline -> reason.
        name: Name of the sweep; made from its key when unset.
    """
    full = load_config(teacher)
    trials = [checkpoint_trial("teacher", "teacher", teacher, full, suite, workspace)]
    trials += elastic
    sweep, is_trained = settings.sweep, settings.distillation.control != "pruned"
    for seed in (is_trained and sweep.seeds) or (None,):
        for member in members if not elastic or sweep.compare else ():
            config = replace(full, schedule=member.schedule)
            trials.append(
                student_trial(settings, workspace, teacher, config, member, suite, seed=seed)
            )
    trials += baselines
    num_requested = len(sweep.thresholds) or len(sweep.budgets) or sweep.num_schedules
    plan = make_plan("threshold", name, trials, suite, num_requested, teacher=teacher)
    return plan.model_copy(update={"left_out": dict(left_out or {})})


def search_plan(family: SweepPlan, settings: SearchSettings, name: str | None = None) -> SweepPlan:
    """Return the plan that a search starts with: the trials of a family of schedules.

    Its name is made from its key when unset. A longer search has the same key and continues.
    """
    asked = settings.model_dump(mode="json", exclude={"num_trials"})
    key = content_key("search", family.key, asked)
    name = name or f"search-{key[:8]}"
    return family.model_copy(update={"key": key, "kind": "search", "name": name})


def students_upper_bound(settings: Settings, teacher: ModelConfig) -> tuple[list[Estimate], str]:
    """Return the trainings of a teacher's students at most, and a sentence that counts them.

    Their schedules are unknown, so each student makes all of the teacher's corrections.
    """
    sweep, distillation = settings.sweep, settings.distillation
    is_pruned, num_seeds = distillation.control == "pruned", max(1, len(sweep.seeds))
    number = len(sweep.thresholds) or len(sweep.budgets) or sweep.num_schedules
    number = min(number, 1 + sum(teacher.corrections))
    if sweep.kind == "search":
        number = min(number + settings.search.num_trials, teacher.corrections.num_within)
    baselines = student_estimates(settings, teacher, baselines_upper_bound(settings, teacher))
    trainings, counts = [], format_count(number if is_pruned else number * num_seeds, "student")
    if not is_pruned and (sweep.compare or not sweep.elastic):
        student = teacher, distillation.training
        trainings = student_estimates(settings, teacher, [student] * number)
    if sweep.elastic:
        elastic = elastic_upper_bound(settings, teacher)
        trainings = student_estimates(settings, teacher, [elastic]) + trainings
        beside = f", and {counts}" if sweep.compare else ""
        counts = f"{format_count(num_seeds, 'elastic training')}{beside}"
    more = f" and {format_count(len(baselines), 'distilled baseline')}" if baselines else ""
    trainings += baselines
    priced = "they are priced as if each made all of the teacher's corrections"
    return trainings, (
        f"its students' schedules are not known yet: at most {counts}{more}; "
        f"{priced if trainings else 'none of them is trained'}"
    )


def schedule_search(
    settings: Settings, workspace: Workspace, plan: SweepPlan, teacher: Path
) -> ScheduleSearch:
    """Return what suggests further trials for the plan of a search."""
    from orchestrator.sweeping.search import ScheduleSearch, finished_schedules  # Imports optuna.

    full, suite = load_config(teacher), plan.trials[0].suite

    def make_trial(schedule: IterationSchedule) -> Trial:
        member = FamilyMember(schedule, math.nan, math.nan)
        config = replace(full, schedule=schedule)
        return student_trial(settings, workspace, teacher, config, member, suite)

    return ScheduleSearch(
        plan,
        full.corrections,
        settings.search,
        make_trial,
        folder=workspace.sweeps / plan.name,
        others=finished_schedules(workspace, weights_key(teacher)),
    )


def load_tasks(
    settings: EvaluationSettings, tokens: Path, config: ModelConfig, progress: Progress
) -> dict[str, str]:
    """Make the held-out items that are missing, load lm-eval's tasks, and return their hashes.

    Raises:
        UserError: If the held-out text is too poor, a task does not exist, or its answers are too
            long for the models.
    """
    length, folder = config.context_length, tokens if needs_heldout(settings) else None
    select_tasks(settings, folder, context_length=length, make=progress)
    return lm_eval_task_fingerprints(settings, context_length=length)


def plan_suite(
    settings: EvaluationSettings,
    tokens: Path,
    config: ModelConfig,
    hashes: Mapping[str, str] | None = None,
    *,
    teacher: Path | None = None,
    sweeps: Path | None = None,
) -> TrialSuite:
    """Return how trials are evaluated.

    Args:
        hashes: What `load_tasks` returns: held-out tasks are named by their content, others may
            change under their names.
        teacher: Checkpoint of the full model; an imported one reads text with its own tokenizer.
        sweeps: Folder of sweeps; hashes that are not known are those that the newest sweep found.
    """
    folder = tokens if needs_heldout(settings) else None
    asked = select_tasks(settings, folder, context_length=config.context_length)
    # Held-out tasks alone need no names: they are all tasks of their folder.
    is_heldout_alone = settings.suite == HELDOUT and not settings.include_path
    suite = TrialSuite(
        tokens=open_data(tokens).fingerprint,
        tokens_folder=str(tokens),
        tasks=() if is_heldout_alone else tuple(asked.names),
        suite=asked.heldout.name if asked.heldout else "",
        suite_folder=str(asked.heldout or ""),
        include_folder="".join(map(str, user_task_folders(settings))),
        batch_size=settings.batch_size,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        prompts=settings.prompts,
        precision=settings.precision or default_precision(on_gpus=False),
        fingerprints=dict(hashes) if hashes else None,
        **(text_of_teacher(teacher) if teacher else {}),
    )
    stored = sorted(sweeps.glob("*/"), key=last_recorded, reverse=True) if sweeps else []
    for folder in stored if hashes is None else ():
        with suppress(UserError):
            if plan := SweepPlan.read(folder / PLAN_FILE):
                known = plan.trials[0].suite
                found = suite.model_copy(update={"fingerprints": known.fingerprints})
                if found.key == known.key:
                    return found
    return suite


def text_of_teacher(teacher: Path) -> dict[str, str]:
    """Return the fields of a suite that read text as an imported teacher does; none for others."""
    key = text_files_key(teacher)
    return {"vocabulary": key, "vocabulary_folder": str(teacher)} if key else {}


def make_plan(
    kind: str,
    name: str | None,
    trials: Sequence[Trial],
    suite: TrialSuite,
    num_requested: int,
    *,
    teacher: Path | None,
) -> SweepPlan:
    """Return the plan of these trials, named by their keys where the user gave no name."""
    # Two measures of influence may lead to the same schedules by other thresholds.
    shown = [[t.key, t.threshold_above, t.threshold_up_to] for t in trials]
    key = content_key("sweep", kind, shown)
    return SweepPlan(
        key=key,
        name=name or f"{kind}-{key[:8]}",
        kind=kind,
        tokens_folder=suite.tokens_folder,
        teacher=str(teacher) if teacher else None,
        num_requested=num_requested,
        trials=tuple(trials),
        num_distinct=num_models(trials),
    )


def choose_members(
    influence: InfluenceTable,
    sweep: SweepSettings,
    *,
    cost: Cost = num_evaluations,
) -> tuple[FamilyMember, ...]:
    """Return the schedules of a threshold sweep, costliest first, each once.

    Args:
        influence: The teacher's table.
        sweep: Thresholds, budgets or a number of schedules; and the selection.
        cost: Unit of the budgets, and the scale over which schedules are spread.

    Returns:
        Members with the thresholds that give them; those of a knapsack have none (NaN).

    Raises:
        UserError: If a budget is less than the cheapest schedule costs.
    """
    family = schedule_family(influence)
    if sweep.thresholds:
        wanted = {
            member.schedule
            for threshold in sweep.thresholds
            for member in family
            if member.threshold_above < threshold <= member.threshold_up_to
        }
    elif sweep.budgets:
        try:
            wanted = {family.within(most, of=cost) for most in sweep.budgets}
        except ValueError as error:
            raise UserError(f"sweep.budgets, in {sweep.budget_unit}: {error}") from None
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
