"""Run a sweep: from its plan to the front and its report.

The stages are those of `stages.py`; each is planned as soon as the previous one has ended. The same
call resumes an interrupted sweep; for a finished sweep it only writes the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from iiet.iiad.pruning import InfluenceTable
from orchestrator.cluster.task import joined_cluster, part_runner
from orchestrator.cluster.work import sweep_executor
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import prepare as prepare_tokens
from orchestrator.evaluation.heldout import heldout_chances, offered_tasks
from orchestrator.evaluation.tasks import check_sweep_tasks, needs_lm_eval
from orchestrator.models.folder import weights_key
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.influence import run_influence
from orchestrator.pipelines.models import imported_model
from orchestrator.pipelines.training import run_trainings
from orchestrator.records.status import STARTED_EVENT
from orchestrator.records.tracked_run import PRETRAIN_OF_SWEEP
from orchestrator.records.trial import SOURCE_CONTINUED, Trial
from orchestrator.reporting import results
from orchestrator.reporting.sweep_report import ReportResult
from orchestrator.settings import SETTINGS_NAME, Settings, flatten, to_yaml
from orchestrator.sweeping.models import check_devices, check_sweep
from orchestrator.sweeping.plan import SweepPlan
from orchestrator.sweeping.stages import (
    models_by_role,
    plan_from_tokens,
    plan_measurements,
    plan_pretraining,
    plan_sweep,
    plan_trials,
)
from orchestrator.sweeping.states import early_stops
from orchestrator.sweeping.suite import load_tasks
from orchestrator.sweeping.trials import check_sweep_folder
from orchestrator.terminal.progress import Progress
from orchestrator.training.source import with_source
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import write_text
from orchestrator.workspace.journal import read_tail, record_event
from orchestrator.workspace.layout import PLAN_FILE, SWEEP_LOCK_NAME, Workspace, portable_path
from orchestrator.workspace.locks import refuse_second
from orchestrator.workspace.provenance import content_key, environment

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.sweeping.states import RunningSweep


class SweepResult(ReportResult):
    """A sweep that has ended, and its report."""

    name: str
    """Name of the sweep, for `report` and `pick`."""
    failures: dict[str, str]
    """Label to reason of the trials that failed; the same call tries them again."""
    stopped: dict[str, str]
    """Label to reason of the trials that a rule stopped early."""
    next_steps: tuple[str, ...] = Field(default=(), exclude=True)
    """Lines on what the user may do next."""

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Finished trials in the plan's order, including teacher and baselines."""
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


def run_sweep(plan: SweepPlan, context: Context) -> SweepResult:
    """Run the sweep that `settings.sweep.kind` describes, and write its report.

    Raises:
        Interrupted: After Ctrl-C; finished trials stay finished.
        RunFailed: If the teacher's training or every trial failed; single failures are in the
            result.
    """
    plan.check()
    stored = _stored_results(plan)
    if stored is not None:
        context.progress.note("all trials are finished and found again")
        return _report_of(plan, stored, context)
    from orchestrator.cluster.ray import ray_cluster
    from orchestrator.sweeping.run import run_trials  # Imports Ray, MLflow and lm-eval.

    workspace = plan.workspace
    progress = context.progress
    plan = _with_imported_source(plan, progress)
    settings = plan.settings
    pretrains = bool(plan.pretraining)
    first_folder = _first_folder(plan)
    check = partial(check_devices, settings, pretrains=pretrains)
    with (
        _locked_folder(first_folder),
        joined_cluster(settings.cluster, workspace.root, check, progress),
    ):
        # The data, and the tasks before any training: the text may be too poor for them.
        plan = _with_data(plan, progress)
        tokens = Path(plan.trials.tokens_folder)
        check_sweep_tasks(settings, offered_tasks(open_data(tokens)))
        first = plan.trials.trials[0]
        hashes = load_tasks(settings.evaluation, tokens, first.model, progress)
        has_all_trials = plan.is_complete and first.suite.fingerprints == (hashes or None)

        # From here on `list` says how the sweep is continued if it is interrupted.
        if not plan.is_complete and not (first_folder / PLAN_FILE).exists():
            _record_start(plan, first_folder)

        start_ray = partial(
            ray_cluster, settings.cluster, folder=workspace.root, say=progress.start
        )
        with start_ray() if pretrains else nullcontext():
            plan, failed_controls = train_models(plan, tokens, context)
            teachers, baselines = models_by_role(plan, plan.pretrained)
            tables = measure_influence(plan, teachers, context)
            if not has_all_trials:
                plan = plan_trials(plan, teachers, baselines, tables, hashes)
                plan.check()

            folder = workspace.sweeps / plan.trials.name
            with nullcontext() if folder == first_folder else _locked_folder(folder):
                check_sweep_folder(plan.trials, workspace)
                if first_folder != folder and not (first_folder / PLAN_FILE).exists():
                    shutil.rmtree(first_folder, ignore_errors=True)
                run = run_trials(
                    plan.trials,
                    plan.settings,
                    workspace,
                    placed=plan.placed,
                    tracking=context.tracking,
                    progress=progress,
                    search=plan.search,
                )
                sweep_results = _results_of(plan, run, teachers, tables)
                return _report_of(plan, sweep_results, context, failed_controls | run.failures)


def _first_folder(plan: SweepPlan) -> Path:
    """Return the folder of a sweep before it runs.

    Its name may follow from its trials. While they are not known, it follows from the call.
    """
    if plan.is_complete:
        name = plan.trials.name
    else:
        call_key = content_key(to_yaml(plan.settings), str(plan.teacher))
        name = plan.name or f"{plan.settings.sweep.kind}-{call_key[:8]}"
    return plan.workspace.sweeps / name


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a sweep's folder, which is deleted if nothing was written into it.

    Raises:
        UserError: If another command runs this sweep.
    """
    lock = folder / SWEEP_LOCK_NAME
    with refuse_second(lock, f"the sweep {folder.name}"):
        try:
            yield
        finally:
            if folder.is_dir() and [*folder.iterdir()] == [lock]:  # The call was a mistake.
                lock.unlink()
                folder.rmdir()
                with suppress(OSError):  # It holds other sweeps.
                    folder.parent.rmdir()


def _with_imported_source(plan: SweepPlan, progress: Progress) -> SweepPlan:
    """Import the source that a teacher starts from, if it is no checkpoint yet, and plan anew."""
    if plan.source is None or plan.source.is_checkpoint:
        return plan
    name = plan.settings.training.source
    imported = imported_model(name, plan.workspace, progress, also_folders=True)
    settings = with_source(plan.settings, imported)
    plan = plan_sweep(settings, workspace=plan.workspace, name=plan.name)
    plan.check()
    return plan


def _with_data(plan: SweepPlan, progress: Progress) -> SweepPlan:
    """Prepare the data if it is not; what follows from it is planned then."""
    settings = plan.settings
    check_sweep(settings, progress)
    if plan.teacher is not None:
        return plan
    tokens = prepare_tokens(
        settings.data, plan.workspace, progress, open_runner=part_runner(settings.cluster)
    )
    if str(tokens) != plan.trials.tokens_folder:
        plan = plan_from_tokens(plan, tokens)
        plan.check()
    return plan


def _record_start(plan: SweepPlan, folder: Path) -> None:
    """Write how a sweep was called into the folder that it has until its trials are known."""
    settings = plan.settings
    write_text(folder / SETTINGS_NAME, to_yaml(settings))
    options = {"--name": plan.name} if plan.name else {}
    if settings.sweep.kind == "search":
        options["--search"] = str(settings.search.num_trials)
    teacher = str(plan.teacher or "")
    record_event(folder, STARTED_EVENT, teacher=teacher, options=options)


def train_models(
    plan: SweepPlan, tokens: Path, context: Context
) -> tuple[SweepPlan, dict[str, str]]:
    """Train the models before the trials: source model, teachers, baselines and controls.

    Returns:
        The plan with the trained models, and label -> reason of the controls that failed.

    Raises:
        RunFailed: If a training failed, except a control's.
    """
    failed_controls: dict[str, str] = {}
    number = 0
    # Controls may diverge; after a failed one, no further control is trained.
    while number < len(plan.pretraining) and not failed_controls:
        stage = plan.pretraining[number]
        failure: RunFailed | None = None
        try:
            run_trainings(stage, context, kind=PRETRAIN_OF_SWEEP)
        except RunFailed as error:
            # The sweep continues without a control that diverges at the higher rate.
            if plan.retrofit is None or not plan.retrofit.are_controls(stage.jobs):
                raise
            failure = error
        # What follows from these models can be planned now.
        plan = plan_pretraining(plan.changed(gaps=[]), tokens)
        plan.check()
        if failure is not None:
            failed_controls = _failed_controls(plan, stage.jobs.keys(), failure, context.progress)
        number += 1
    return plan, failed_controls


def _failed_controls(
    plan: SweepPlan, labels: Set[str], failure: RunFailed, progress: Progress
) -> dict[str, str]:
    """Note which controls failed or diverged.

    Returns:
        Label -> reason of the controls that failed, without those that diverged.
    """
    assert plan.retrofit is not None
    diverged = plan.retrofit.diverged & labels
    for label in sorted(diverged):
        progress.note(
            f"{label}: diverged, so it is not used; its rate follows from "
            "training.learning_rate and is not tried again"
        )
    failed = labels - plan.pretrained.keys() - diverged
    if failed:
        progress.note(f"controls failed, the sweep goes on without them: {failure}")
    return dict.fromkeys(sorted(failed), str(failure))


def measure_influence(
    plan: SweepPlan, teachers: Mapping[str, Path], context: Context
) -> dict[str, InfluenceTable]:
    """Measure the influence of the teachers' corrections and layers.

    Args:
        teachers: Label -> checkpoint.

    Returns:
        Label -> table.
    """
    measurements = plan.influence or plan_measurements(plan, teachers)
    executor = sweep_executor(plan.settings, plan.workspace.root)
    return {
        label: run_influence(measurement, context, executor=executor).table
        for label, measurement in measurements.items()
    }


def sweep(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    teacher: Path | str | None = None,
    models: Mapping[str, Settings] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Run the sweep that `settings.sweep.kind` describes, and write its report.

    Arguments are those of `plan_sweep`, errors also those of `run_sweep`; a teacher
    may be `hub:OWNER/NAME`, too.
    """
    plan = plan_sweep(
        settings,
        workspace=workspace,
        teacher=imported_model(teacher, workspace, progress),
        models=models,
        name=name,
        progress=progress,
    )
    plan.check()  # Before the workspace is made.
    return run_sweep(plan, open_context(workspace, progress))


def _stored_results(plan: SweepPlan) -> results.StoredSweep | None:
    """Return the stored results of a completed sweep; None if it is not complete.

    Whether lm-eval's tasks have changed is known only after loading them.
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
    with suppress(UserError):  # Damaged results are written again.
        stored = results.load_sweep_results(plan.workspace, plan.trials.name)
        has_same_results = {result.key for result in stored.results} == finished
        if stored.key == plan.trials.key and has_same_results:
            # Bounds of retention may have changed since the measurement.
            return stored.model_copy(update={"retention": _retention_of(plan)})
    return None


def _results_of(
    plan: SweepPlan,
    run: RunningSweep,
    teachers: Mapping[str, Path],
    tables: Mapping[str, InfluenceTable],
) -> results.StoredSweep:
    """Return the results of a sweep for its report.

    Args:
        teachers: Label -> checkpoint.
        tables: Label of a teacher -> its influence.
    """
    influence_teacher = ""
    if len(tables) > 1:
        influence_teacher = weights_key(teachers[next(iter(tables))])
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
        influence=next(iter(tables.values()), None),
        influence_teacher=influence_teacher,
        retention=_retention_of(plan),
        facts=facts,
    )


def _retention_of(plan: SweepPlan) -> dict[str, float]:
    """Return task -> the most that models of a sweep may lose against the source model."""
    return plan.settings.evaluation.retention or {}


def _end_of(trial: Trial, run: RunningSweep) -> str:
    """Return as text how a trial of a sweep ended."""
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
