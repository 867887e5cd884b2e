"""The report of a sweep: its front as files beside the plan, and the same in MLflow.

In: the results of a sweep, given or as they were stored. Out: `results.json` and the files of
`analysis.report` in the sweep's folder; in MLflow a parent run with the front as picture, page,
table and numbers, a note that shows picture and table on the run's first page, each result as a
nested run with its paired errors, and a saved chart view of cost against quality. Written again it
replaces all of that and makes no second run. A front on other axes gets a folder of its own, here
and there, and leaves the sweep's run as it is otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.reporting.confidence import with_confidence
from orchestrator.reporting.front_axes import FrontAxes
from orchestrator.reporting.mlflow_report import (
    ARTIFACT_FOLDER,
    track_front,
    track_results,
)
from orchestrator.reporting.pareto import KEPT_SHARE, Front, find_front
from orchestrator.reporting.report_files import SweepReport, WrittenReport, write_report_files
from orchestrator.reporting.seed_averages import average_seeds
from orchestrator.reporting.sweep_results import (
    SweepResults,
    item_notes,
    load_item_values,
    load_sweep_results,
)
from orchestrator.reporting.training_curves import (
    history_folder,
    read_history_curves,
    read_training_curves,
)
from orchestrator.tracking import Tracking
from orchestrator.workspace.folders import Workspace


def write_sweep_report(
    workspace: Workspace,
    sweep: SweepResults | str,
    *,
    axes: FrontAxes | None = None,
    tracking: Tracking | None = None,
) -> WrittenReport:
    """Write the report of a sweep, and track it.

    Args:
        workspace: Holds the sweep.
        sweep: Its results, or its name, for those that are stored.
        axes: Which cost against which quality; evaluations against accuracy when unset.
        tracking: Where to track it; nowhere when unset.

    Raises:
        UserError: If there is no such sweep, or it has no result yet.
    """
    axes = axes or FrontAxes()
    if isinstance(sweep, str):
        sweep = load_sweep_results(workspace, sweep)
    sweep.store(workspace)
    items = load_item_values(workspace, sweep.results)
    front = sweep_front(sweep, items, axes)
    run = None
    if tracking is not None:
        run = tracking.run(sweep.key, name=sweep.name, kind="sweep")
        if not axes.slug:
            sweep, front = track_results(tracking, run, sweep, front)
            sweep.store(workspace)
    history = read_history_curves(history_folder(sweep.folder(workspace), sweep.key))
    report = SweepReport(
        name=sweep.name,
        front=front,
        influence=sweep.influence,
        curves={**read_training_curves(sweep, front), **({} if axes.slug else history)},
        facts=sweep.facts,
        notes=[*sweep.notes, *item_notes(sweep.results, items)],
    )
    folder = sweep.folder(workspace) / axes.slug
    files = write_report_files(report, folder)
    view = None
    if tracking is not None and run is not None:
        if axes.slug:
            for path in files:
                run.log_artifact(path, f"{ARTIFACT_FOLDER}/{axes.slug}")
            run.finish()
        else:
            view = track_front(tracking, run, report, files)
    run_id = run.run_id if run is not None else None
    return WrittenReport(report, folder, tuple(files), run_id, view)


def sweep_front(
    sweep: SweepResults,
    items: Mapping[str, EvaluationResult],
    axes: FrontAxes,
    *,
    kept_share: float = KEPT_SHARE,
) -> Front:
    """Place a sweep's results, and say how sure each place is.

    Args:
        sweep: The results.
        items: What they were measured by, as far as it is stored; see `load_item_values`.
        axes: Cost and quality.
        kept_share: The share of the full model's quality that confidences relate to.
    """
    joined = average_seeds(sweep.results)
    front = find_front(joined.results, axes)
    return with_confidence(front, joined.evaluations(items), kept_share=kept_share)
