"""Run a sweep: from settings, or from a teacher's checkpoint, to the front and its report.

The same call resumes an interrupted sweep; for a finished one, it only writes the report again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas

from iiet.influence import InfluenceTable
from orchestrator.cluster.launch import joined_cluster, trial_device
from orchestrator.cluster.start import ray_cluster
from orchestrator.data.preparation import prepare as prepare_tokens
from orchestrator.data.sources import open_data
from orchestrator.evaluation.heldout import heldout_chances, offered_tasks
from orchestrator.evaluation.task_selection import check_sweep_tasks
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.influence import read_or_measure_influence
from orchestrator.pipelines.pretraining import pretrain_models
from orchestrator.pipelines.reports import ReportResult, report_result
from orchestrator.pipelines.sweep_dry_runs import check_sweep_fits
from orchestrator.pipelines.sweep_plans import (
    SweepModel,
    check_arguments,
    plan_iterations,
    plan_students,
    plan_suite,
    plan_teacher,
    schedule_search,
    teacher_checkpoint,
)
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.trial import Trial
from orchestrator.reporting.sweep_report import write_sweep_report
from orchestrator.reporting.sweep_results import CHANCE_TITLE, LEFT_OUT_TITLE, StoredSweep
from orchestrator.settings import Settings, flatten
from orchestrator.sweeping.checks import check_devices, check_on_nodes, check_sweep
from orchestrator.sweeping.execution import SweepOutcome, run_sweep
from orchestrator.sweeping.model_plans import TEACHER, teacher_and_baselines
from orchestrator.terminal.progress import Progress
from orchestrator.training.model_lookup import tokens_folder_of
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import Workspace, portable_path
from orchestrator.workspace.provenance import environment

if TYPE_CHECKING:
    from orchestrator.sweeping.search import ScheduleSearch


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A sweep that has ended."""

    name: str
    """Name of the sweep; `report` and `pick` find it by this."""
    trials: tuple[Trial, ...]
    """Finished trials, the teacher and the baselines among them, in the plan's order."""
    failures: Mapping[str, str]
    """Label to reason of the trials that failed; the same call tries them again."""
    stopped: Mapping[str, str]
    """Label to reason of the trials that a rule stopped early."""
    report: ReportResult
    """The front, and the files of its report."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row per trial: cost, quality, place on the front, checkpoint."""
        return self.report.to_pandas()

    def to_json(self) -> dict[str, Any]:
        """Return name, failed and stopped trials, and the values of the report."""
        states = {"failures": dict(self.failures), "stopped": dict(self.stopped)}
        return {"name": self.name, **states, **self.report.to_json()}

    def shown(self) -> Any:
        """Return what the report shows."""
        return self.report.shown()

    def raise_failures(self) -> None:
        """Raise `RunFailed` if trials failed."""
        raise_failures(self.failures)


def sweep(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
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
    context = open_context(workspace, progress, loggers=settings.tracking.loggers)
    check_arguments(settings, teacher, models)
    pretrains = teacher is None and settings.sweep.kind != "iterations"
    check_devices(settings, pretrains=pretrains)
    check = partial(check_on_nodes, settings, pretrains=pretrains)
    with joined_cluster(settings.cluster, context.workspace.root, check, context.progress):
        check_sweep(settings, context.progress)
        if teacher is not None:
            checkpoint = teacher_checkpoint(context, teacher)
            return _sweep_students(settings, context, checkpoint, baselines, name)
        check_sweep_fits(settings, context.workspace, models)
        tokens = prepare_tokens(settings.data, context.workspace, context.progress)
        if settings.sweep.kind == "iterations":
            plan = plan_iterations(settings, context, tokens, models, name=name)
            return _run(plan, settings, context)
        return _sweep_with_teacher(settings, context, tokens, name)


def raise_failures(failures: Mapping[str, str]) -> None:
    """Raise `RunFailed` with the names of the trials that failed, if there are any."""
    if failures:
        raise RunFailed(
            f"{len(failures)} trials failed ({', '.join(failures)}); the same command tries them "
            "again"
        )


def _sweep_with_teacher(
    settings: Settings, context: Context, tokens: Path, name: str | None
) -> SweepResult:
    teacher = plan_teacher(settings, context.workspace, tokens)[TEACHER]
    # Fail before pretraining if the held-out text is too poor for the tasks, or an answer too long.
    plan_suite(settings.evaluation, tokens, teacher.model, Progress())
    with ray_cluster(settings.cluster, folder=context.workspace.root, say=context.progress.start):
        trained = pretrain_models(teacher_and_baselines(settings), context, tokens)
        checkpoints = {label: result.checkpoint for label, result in trained.items()}
        return _sweep_students(settings, context, checkpoints.pop(TEACHER), checkpoints, name)


def _sweep_students(
    settings: Settings,
    context: Context,
    teacher: Path,
    baselines: Mapping[str, Path] | None,
    name: str | None,
) -> SweepResult:
    tokens = tokens_folder_of(teacher, context.workspace)
    check_sweep_tasks(settings, offered_tasks(open_data(tokens)))
    device = trial_device(settings, context.workspace.root)
    influence = read_or_measure_influence(
        teacher, settings.influence, tokens, context, on_device=device
    )
    plan = plan_students(settings, context, teacher, influence, baselines=baselines, name=name)
    search = None
    if settings.sweep.kind == "search":
        search = schedule_search(settings, context.workspace, plan, teacher)
        plan = plan.model_copy(update={"trials": (*plan.trials, *search.known_trials())})
    return _run(plan, settings, context, influence, search)


def _run(
    plan: SweepPlan,
    settings: Settings,
    context: Context,
    influence: InfluenceTable | None = None,
    search: ScheduleSearch | None = None,
) -> SweepResult:
    """Run a plan, with the trials that a search suggests, and write its report."""
    outcome = run_sweep(
        plan,
        settings,
        context.workspace,
        tracking=context.tracking,
        progress=context.progress,
        search=search,
    )
    plan = outcome.plan
    found = StoredSweep(
        name=plan.name,
        key=plan.key,
        results=outcome.results,
        influence=influence,
        facts={
            **({LEFT_OUT_TITLE: plan.left_out} if plan.left_out else {}),
            **({CHANCE_TITLE: chances} if (chances := _chances(plan)) else {}),
            "Trials": _states(plan, outcome),
            "Settings": flatten(settings),
            "Provenance": {
                "sweep": plan.key,
                "kind": plan.kind,
                "teacher": portable_path(plan.teacher or "none", context.workspace.root),
                "tokens": portable_path(plan.tokens_folder, context.workspace.root),
                "schedules asked for": plan.num_requested,
                "trials": len(plan.trials),
                **environment(),
            },
        },
    )
    written = write_sweep_report(context.workspace, found, tracking=context.tracking)
    journal = Journal(outcome.folder)
    journal.event("finished")  # Commands without a name take the newest sweep.
    journal.close()
    return SweepResult(
        name=plan.name,
        trials=outcome.results,
        failures=outcome.failures,
        stopped=outcome.stopped,
        report=report_result(written),
    )


def _chances(plan: SweepPlan) -> dict[str, str]:
    """Return the accuracy of a guess for each depth task that the trials answer."""
    suite = plan.trials[0].suite
    known = heldout_chances(Path(suite.suite_folder)) if suite.suite_folder else {}
    return {name: text for name, text in known.items() if not suite.tasks or name in suite.tasks}


def _states(plan: SweepPlan, outcome: SweepOutcome) -> dict[str, str]:
    """Return label -> whether a trial was run, was finished before, was stopped or failed."""
    finished = {result.key for result in outcome.results}

    def state(trial: Trial) -> str:
        if trial.label in outcome.failures:
            return f"failed: {outcome.failures[trial.label]}"
        if trial.label in outcome.stopped:
            return outcome.stopped[trial.label]
        if trial.key not in finished:
            return "not finished"
        if trial.key in outcome.reused:
            return "reused: it was finished before"
        return "trained and measured" if trial.job else "measured"

    return {trial.label: state(trial) for trial in plan.trials}
