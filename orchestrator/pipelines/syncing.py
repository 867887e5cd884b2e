"""Publish a workspace in MLflow: what the store missed, and all pretrainings and sweeps from disk.

Runs are found by their keys, and what they hold is not sent again, so this may be repeated. In an
empty store it makes the runs of the workspace anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.pretraining import checkpoint_tags
from orchestrator.records.training import TrainingJob
from orchestrator.reporting.sweep_report import write_sweep_report
from orchestrator.reporting.sweep_results import load_sweep_results
from orchestrator.reporting.training_curves import history_folder
from orchestrator.settings import SETTINGS_NAME, read_settings
from orchestrator.sweeping.live_sweep import LiveSweep, open_sweep_run
from orchestrator.sweeping.trial_run import is_trial_locked
from orchestrator.sweeping.trial_states import StoredPlan, recorded_end
from orchestrator.terminal.progress import Progress
from orchestrator.training.job import finished_outcome
from orchestrator.training.monitor import end_training_run, open_training_run
from orchestrator.training.run_lock import is_run_locked
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json_object
from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.journal import recorded_times
from orchestrator.workspace.names import JOB_NAME, PLAN_FILE, RESULTS_FILE


@dataclass(frozen=True, kw_only=True)
class SyncResult:
    """What MLflow has received."""

    num_delivered: int
    """Records that it had missed."""
    trainings: tuple[str, ...]
    """Folders of pretrainings that were published."""
    sweeps: tuple[str, ...]
    """Names of sweeps that were published, with their trials."""


def sync(*, workspace: Workspace | Path | str, progress: Progress | None = None) -> SyncResult:
    """Deliver what MLflow missed, and publish every pretraining and sweep of the workspace.

    What runs at the moment is left to the process that waits for it. A damaged folder is noted and
    left out.

    Raises:
        UserError: If MLflow does not know the store's address, or a local store is damaged.
    """
    context = open_context(workspace, progress)
    num_delivered = context.tracking.sync()
    runs, sweeps = context.workspace.runs, context.workspace.sweeps
    trainings = _publish(sorted(runs.glob(f"*/{JOB_NAME}")), _publish_training, context)
    published = _publish(sorted(sweeps.glob(f"*/{PLAN_FILE}")), _publish_sweep, context)
    context.tracking.wait()
    context.progress.finish(f"{len(trainings)} pretrainings and {len(published)} sweeps")
    return SyncResult(num_delivered=num_delivered, trainings=trainings, sweeps=published)


def _publish(
    files: list[Path], publish: Callable[[Path, Context], bool], context: Context
) -> tuple[str, ...]:
    """Publish the folders of these files, and return the names of those that were published."""
    names = []
    context.progress.start("sync", len(files))
    for number, path in enumerate(files):
        if context.tracking.is_store_down:
            break
        context.progress.advance(number, path.parent.name)
        try:
            if publish(path, context):
                names.append(path.parent.name)
        except UserError as error:
            context.progress.note(f"{path.parent.name} is not published: {error}")
    return tuple(names)


def _publish_training(path: Path, context: Context) -> bool:
    folder, settings = path.parent, path.with_name(SETTINGS_NAME)
    if is_run_locked(folder) or not settings.is_file():
        return False
    job = TrainingJob.parse((read_json_object(path) or {}).get("job", {}), path)
    job = job.model_copy(update={"run_folder": str(folder)})
    outcome = finished_outcome(job)
    run = open_training_run(context.tracking, job, "pretrain", folder.name)
    run.log_text(settings.read_text(encoding="utf-8"), SETTINGS_NAME)
    if outcome:
        run.set_tags(checkpoint_tags(job, outcome))
    end = ("FINISHED", "") if outcome else recorded_end(folder) or ("KILLED", "")
    end_training_run(run, job, *end, wait=False)
    return True


def _publish_sweep(path: Path, context: Context) -> bool:
    workspace, tracking, folder = context.workspace, context.tracking, path.parent
    plan = StoredPlan.read(path)
    if plan is None or any(map(is_trial_locked, plan.trials)):
        return False
    started_ms, ended_ms = recorded_times(folder) or (None, None)
    settings = read_settings(folder / SETTINGS_NAME)
    run = open_sweep_run(plan, settings, tracking, started_ms=started_ms)
    history = history_folder(folder, plan.key)
    run.log_journal(history)
    live = LiveSweep(plan, run, tracking, history, num_trials=len(plan.trials))
    results = {trial.key: result for trial in plan.trials if (result := trial.result())}
    for trial in plan.trials:
        if trial.key not in results and (end := recorded_end(Path(trial.folder))):
            live.log_end(trial, *end)
    has_results = (folder / RESULTS_FILE).is_file()
    found = load_sweep_results(workspace, folder.name) if has_results else None
    if found and found.key == plan.key:
        write_sweep_report(workspace, found, tracking=tracking)
    else:
        live.log_results(list(results.values()))
        run.finish("KILLED", ended_ms=ended_ms, wait=False)
    return True
