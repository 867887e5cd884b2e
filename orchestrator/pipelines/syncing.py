"""Publish a workspace in MLflow: what the store missed, then all its work from disk.

Runs are found by their keys, and what they hold is not sent again, so this may be repeated. In an
empty store it makes the runs of the workspace anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.result import Result
from orchestrator.pipelines.training import checkpoint_tags
from orchestrator.records.measurement import Measurement
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.training import TrainingJob
from orchestrator.reporting.results import load_sweep_results
from orchestrator.reporting.sweep_report import write_sweep_report
from orchestrator.reporting.training_curves import history_folder
from orchestrator.settings import SETTINGS_NAME, read_settings
from orchestrator.sweeping.live_sweep import LiveSweep, open_sweep_run
from orchestrator.sweeping.trial_run import is_trial_locked
from orchestrator.sweeping.trial_states import recorded_end
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.training.job import finished_outcome
from orchestrator.training.monitor import end_training_run, open_training_run, training_run_name
from orchestrator.training.run_lock import is_run_locked
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json
from orchestrator.workspace.journal import recorded_times
from orchestrator.workspace.layout import JOB_NAME, PLAN_FILE, RESULTS_FILE, Workspace


class SyncResult(Result):
    """What MLflow has received."""

    num_delivered: int
    """Records that it had missed."""
    trainings: tuple[str, ...]
    """Folders of pretrainings that were published."""
    sweeps: tuple[str, ...]
    """Names of sweeps that were published, with their trials."""
    students: tuple[str, ...]
    """Folders of students that no sweep plans; `distill` made them."""
    measurements: tuple[str, ...]
    """Evaluations, benchmarks and influence tables that were published."""

    def shown(self) -> Iterator[str]:
        """Return how much was delivered."""
        yield f"{self.num_delivered} records delivered"


def sync(*, workspace: Workspace | Path | str, progress: Progress | None = None) -> SyncResult:
    """Deliver what MLflow missed, and publish all trainings, sweeps and measurements.

    What runs at the moment is left to the process that waits for it. A damaged folder is noted and
    left out.

    Raises:
        UserError: If MLflow does not know the store's address, or a local store is damaged.
    """
    context = open_context(workspace, progress)
    place, tracking, progress = context.workspace, context.tracking, context.progress
    num_delivered = tracking.sync()

    def publish(files: Iterable[Path], publish_one: Callable[[Path], bool]) -> tuple[str, ...]:
        """Publish what these files describe, and return the names of what was published."""
        names, waiting = [], sorted(files)
        progress.start("sync", len(waiting))
        for number, path in enumerate(waiting):
            if tracking.is_store_down:
                break
            name = path.stem if path.parent == place.measurements else path.parent.name
            progress.advance(number, name)
            try:
                if publish_one(path):
                    names.append(name)
            except UserError as error:
                progress.note(f"{name} is not published: {error}")
        return tuple(names)

    trainings = publish(
        place.runs.glob(f"*/{JOB_NAME}"), partial(_publish_training, context, "pretrain")
    )
    planned: set[str] = set()
    """Names of trials; the others were made by `distill`."""
    sweeps = publish(place.sweeps.glob(f"*/{PLAN_FILE}"), partial(_publish_sweep, context, planned))
    others = [job for job in place.trials.glob(f"*/{JOB_NAME}") if job.parent.name not in planned]
    students = publish(others, partial(_publish_training, context, "distill"))
    measured = publish(place.measurements.glob("*.json"), partial(_publish_measurement, context))
    tracking.wait()
    progress.finish(
        f"{format_count(len(trainings), 'pretraining')}, {format_count(len(sweeps), 'sweep')}, "
        f"{format_count(len(students), 'student')} of `distill` and "
        f"{format_count(len(measured), 'measurement')}"
    )
    return SyncResult(
        num_delivered=num_delivered,
        trainings=trainings,
        sweeps=sweeps,
        students=students,
        measurements=measured,
    )


def _publish_training(context: Context, kind: str, path: Path) -> bool:
    folder, settings = path.parent, path.with_name(SETTINGS_NAME)
    if is_run_locked(folder) or (kind == "pretrain" and not settings.is_file()):
        return False
    job = TrainingJob.parse((read_json(path) or {}).get("job", {}), path)
    job = job.model_copy(update={"run_folder": str(folder)})
    outcome = finished_outcome(job)
    label = folder.name if kind == "pretrain" else str(job.model.corrections)
    run = open_training_run(context.tracking, job, kind, training_run_name(label, job))
    if settings.is_file():
        run.log_text(settings.read_text(encoding="utf-8"), SETTINGS_NAME)
    if outcome and kind == "pretrain":
        run.set_tags(checkpoint_tags(job, outcome))
    end = ("FINISHED", "") if outcome else recorded_end(folder) or ("KILLED", "")
    end_training_run(run, job, *end, wait=False)
    return True


def _publish_measurement(context: Context, path: Path) -> bool:
    measured = Measurement.read(path)
    if measured is not None:
        context.tracking.log_measurement(measured, wait=False)
    return measured is not None


def _publish_sweep(context: Context, planned: set[str], path: Path) -> bool:
    """Publish a sweep, and add the folders of its trials to those that a sweep has planned."""
    workspace, tracking, folder = context.workspace, context.tracking, path.parent
    plan = SweepPlan.read(path)
    if plan is None:
        return False
    planned |= {Path(trial.folder).name for trial in plan.trials}
    if any(map(is_trial_locked, plan.trials)):
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
