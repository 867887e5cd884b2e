"""Writes the report of a sweep, or of several on one front, and tracks that of one in MLflow.

Writing a report again replaces the old one and makes no second MLflow run. A front on other axes
gets its own folder, in the workspace and in MLflow, and changes nothing else of the sweep's run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.records.tracked_run import TrackedRun
from orchestrator.reporting.elastic_section import elastic_section
from orchestrator.reporting.front import (
    COSTS,
    Front,
    FrontAxes,
    evaluations,
    find_front,
    left_out_notes,
    with_confidence,
)
from orchestrator.reporting.mlflow_report import report_changes, sweep_run, track_results
from orchestrator.reporting.report import SweepReport, WrittenReport
from orchestrator.reporting.results import (
    StoredSweep,
    item_notes,
    load_item_values,
    load_sweep_results,
    result_table,
)
from orchestrator.reporting.statistics import KEPT_SHARE
from orchestrator.reporting.training_curves import (
    Curve,
    history_folder,
    read_history_curves,
    read_training_curves,
)
from orchestrator.tracking import Tracking
from orchestrator.workspace.journal import now_ms, recorded_times
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.provenance import content_key

MAX_FOLDER_NAME_LENGTH = 80


def write_sweep_report(
    workspace: Workspace,
    *sweeps: StoredSweep | str,
    axes: FrontAxes | None = None,
    tracking: Tracking | None = None,
) -> WrittenReport:
    """Write the report of a sweep, or of several on one front.

    Of several sweeps, a result that they share counts once, for the first of them. If they were
    measured on different tasks or texts, a note says that their qualities do not compare.

    Args:
        workspace: Holds the sweeps.
        sweeps: Their results, or their names to use the stored ones.
        axes: Cost and quality; NFE and accuracy by default.
        tracking: MLflow, where the report of one sweep is tracked; None to track nothing.

    Raises:
        UserError: If there is no such sweep, or one has no result yet.
    """
    axes = axes or FrontAxes()
    loaded = (
        load_sweep_results(workspace, sweep) if isinstance(sweep, str) else sweep
        for sweep in sweeps
    )
    found = list({sweep.name: sweep for sweep in loaded}.values())
    is_single, sweep = len(found) == 1, found[0]
    front, notes = sweep_front(workspace, found, axes)
    run: TrackedRun | None = None
    if is_single and workspace.is_writable:
        sweep.store(workspace)
    if is_single and tracking is not None:
        run = sweep_run(tracking, sweep, workspace)
        if not axes.slug:
            tracking.publish(run)  # Before its trials, which would make it without its name.
            sweep, front = track_results(tracking, sweep, front)
            sweep.store(workspace)
            found = [sweep]

    common = list(dict.fromkeys(note for each in found for note in each.notes))
    common += _suite_notes(found)
    if not is_single and axes.cost == COSTS["ms"]:
        common.append(
            "Milliseconds were measured separately for each sweep: differences between sweeps "
            "include those of the machine and of its other load."
        )
    curves: dict[str, Sequence[Curve]] = {}
    facts: dict[str, Mapping[str, Any]] = {}
    for each in found:
        about = "" if is_single else f": {each.name}"
        charts = read_training_curves(each, front)
        curves |= {title + about: lines for title, lines in charts.items()}
        facts |= {title + about: values for title, values in each.facts.items()}
    elastic = None
    if is_single:
        if not axes.slug:
            curves |= read_history_curves(history_folder(sweep.folder(workspace), sweep.key))
        if any(result.is_elastic for result in sweep.results):
            elastic = elastic_section(front, load_item_values(workspace, sweep.results))
    report = SweepReport(
        name=" + ".join(each.name for each in found),
        front=front,
        influence=sweep.influence if is_single else None,
        curves=curves,
        facts=facts,
        notes=[*common, *notes],
        elastic=elastic,
    )
    folder = sweep.folder(workspace) / axes.slug
    if not is_single:
        name = "+".join(each.name for each in found)
        if len(name) > MAX_FOLDER_NAME_LENGTH:
            name = f"{sweep.name}+{len(found) - 1}-{content_key(name)[:8]}"
        folder = workspace.overlays / (f"{name}-{axes.slug}" if axes.slug else name)
    files = report.write_files(folder) if workspace.is_writable else []
    written = WrittenReport(report, folder, tuple(files))
    if tracking is None or run is None:
        return written
    _, ended_ms = recorded_times(sweep.folder(workspace)) or (now_ms(), None)
    changes = report_changes(report, written.files)
    run = run.changed(**changes, status="FINISHED", ended_ms=run.ended_ms or ended_ms)
    tracking.publish(run)
    return replace(written, run_id=tracking.run_id(run))


def sweep_front(
    workspace: Workspace,
    sweeps: Sequence[StoredSweep],
    axes: FrontAxes,
    *,
    kept_share: float = KEPT_SHARE,
) -> tuple[Front, list[str]]:
    """Return the front of the results with the confidence of each place, and its notes.

    The notes are sentences on models that are not shown or have no confidence. `kept_share` is that
    of `with_confidence`. Models of several sweeps that share a name are named with their sweep.
    """
    import pandas

    table = pandas.concat([result_table(s.results).assign(sweep=s.name) for s in sweeps])
    table = table[~table.index.duplicated()]
    if len(sweeps) == 1:
        table = table.drop(columns="sweep")
    else:
        is_shared = table["label"].duplicated(keep=False)
        table.loc[is_shared, "label"] += " (" + table["sweep"] + ")"
    front = find_front(table, axes)
    items = load_item_values(workspace, front.shown_seeds)
    notes = [*left_out_notes(front), *item_notes(front.shown_seeds, items)]
    return with_confidence(front, evaluations(table, items), kept_share=kept_share), notes


def _suite_notes(sweeps: Sequence[StoredSweep]) -> list[str]:
    """Return the sentence on sweeps that were not measured alike; none if they were."""
    # Folders and the size of a batch change no result.
    suites = []
    for sweep in sweeps:
        suite = sweep.results[0].suite.model_dump(mode="json")
        unlike = [n for n in suite if n.endswith("_folder") or n == "batch_size"]
        suites.append({name: suite[name] for name in suite if name not in unlike})
    names = dict.fromkeys(name for suite in suites for name in suite)
    values = {name: [str(suite.get(name)) for suite in suites] for name in names}
    parts = [f"{name} {' / '.join(v)}" for name, v in values.items() if len(set(v)) > 1]
    if not parts:
        return []
    return [
        f"{' and '.join(sweep.name for sweep in sweeps)} were not measured on the same tasks and "
        f"texts ({'; '.join(parts)}): qualities of different sweeps do not compare."
    ]
