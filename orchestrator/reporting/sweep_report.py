"""Report of one sweep: files in the sweep's folder, and the same in MLflow.

Writing a report again replaces the old one and makes no second MLflow run. A front on other axes
gets its own folder, in the workspace and in MLflow, and changes nothing else of the sweep's run.
"""

from __future__ import annotations

from orchestrator.records.tracked_run import TrackedRun
from orchestrator.reporting.confidence import with_confidence
from orchestrator.reporting.elastic_section import elastic_section
from orchestrator.reporting.front_axes import FrontAxes
from orchestrator.reporting.mlflow_report import (
    ARTIFACT_FOLDER,
    SWEEP_TAG,
    report_changes,
    track_results,
)
from orchestrator.reporting.pareto import Front, evaluations, find_front, left_out_notes
from orchestrator.reporting.report_content import SweepReport
from orchestrator.reporting.report_files import WrittenReport, write_report_files
from orchestrator.reporting.results import (
    StoredSweep,
    item_notes,
    load_item_values,
    load_sweep_results,
    result_table,
)
from orchestrator.reporting.statistics import KEPT_SHARE
from orchestrator.reporting.training_curves import (
    history_folder,
    read_history_curves,
    read_training_curves,
)
from orchestrator.tracking import Tracking
from orchestrator.workspace.journal import now_ms, recorded_times
from orchestrator.workspace.layout import Workspace


def write_sweep_report(
    workspace: Workspace,
    sweep: StoredSweep | str,
    *,
    axes: FrontAxes | None = None,
    tracking: Tracking | None = None,
) -> WrittenReport:
    """Write the report of a sweep, and track it in MLflow unless `tracking` is None.

    Args:
        workspace: Holds the sweep.
        sweep: Its results, or its name to use the stored ones.
        axes: Cost and quality; NFE and accuracy by default.
        tracking: MLflow.

    Raises:
        UserError: If there is no such sweep, or it has no result yet.
    """
    axes = axes or FrontAxes()
    if isinstance(sweep, str):
        sweep = load_sweep_results(workspace, sweep)
    if workspace.is_writable:
        sweep.store(workspace)
    front, notes = sweep_front(workspace, sweep, axes)
    if tracking is not None and not axes.slug:
        sweep, front = track_results(tracking, sweep, front)
        sweep.store(workspace)
    curves = dict(read_training_curves(sweep, front))
    if not axes.slug:
        curves |= read_history_curves(history_folder(sweep.folder(workspace), sweep.key))
    report = SweepReport(
        name=sweep.name,
        front=front,
        influence=sweep.influence,
        curves=curves,
        facts=sweep.facts,
        notes=[*sweep.notes, *notes],
        elastic=elastic_section(front, load_item_values(workspace, sweep.results)),
    )
    folder = sweep.folder(workspace) / axes.slug
    files = write_report_files(report, folder) if workspace.is_writable else []
    if tracking is None:
        return WrittenReport(report, folder, tuple(files))
    started_ms, ended_ms = recorded_times(sweep.folder(workspace)) or (now_ms(), None)
    run = tracking.stored("sweep", sweep.key) or TrackedRun(
        key=sweep.key,
        kind="sweep",
        name=sweep.name,
        folder=str(sweep.folder(workspace)),
        journal=str(history_folder(sweep.folder(workspace), sweep.key)),
        tags={SWEEP_TAG: sweep.name},
        started_ms=started_ms,
    )
    if axes.slug:
        changes = {"files": {f"{ARTIFACT_FOLDER}/{axes.slug}": [str(path) for path in files]}}
    else:
        changes = report_changes(report.stored_at(folder), files)
    run = run.changed(**changes, status="FINISHED", ended_ms=run.ended_ms or ended_ms)
    tracking.publish(run)
    return WrittenReport(report, folder, tuple(files), tracking.run_id(run))


def sweep_front(
    workspace: Workspace, sweep: StoredSweep, axes: FrontAxes, *, kept_share: float = KEPT_SHARE
) -> tuple[Front, list[str]]:
    """Return the front of a sweep's results with the confidence of each place, and its notes.

    The notes are sentences on models that are not shown or have no confidence. `kept_share` is that
    of `with_confidence`.
    """
    front = find_front(result_table(sweep.results), axes)
    items = load_item_values(workspace, front.shown_seeds)
    notes = [*left_out_notes(front), *item_notes(front.shown_seeds, items)]
    return with_confidence(front, evaluations(front, items), kept_share=kept_share), notes
