"""Writes the report of a sweep, or of several on one front, and tracks that of one in MLflow.

Writing a report again replaces the old one and makes no second MLflow run. A front on other axes
gets its own folder, in the workspace and in MLflow, and changes nothing else of the sweep's run.
Of several sweeps, a result that they share counts once, for the first of them; if they were
measured on different tasks or texts, a note says that their qualities do not compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.records.tracked_run import TrackedRun
from orchestrator.reporting.confidence import with_confidence
from orchestrator.reporting.elastic_section import elastic_section
from orchestrator.reporting.front_axes import COSTS, FrontAxes
from orchestrator.reporting.mlflow_report import (
    ARTIFACT_FOLDER,
    SWEEP_TAG,
    report_changes,
    track_results,
)
from orchestrator.reporting.pareto import Front, evaluations, find_front, left_out_notes
from orchestrator.reporting.report import SweepReport, WrittenReport, write_report_files
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
from orchestrator.workspace.provenance import content_key

MAX_FOLDER_NAME_LENGTH = 80


def write_sweep_report(
    workspace: Workspace,
    *sweeps: StoredSweep | str,
    axes: FrontAxes | None = None,
    tracking: Tracking | None = None,
) -> WrittenReport:
    """Write the report of a sweep, or of several on one front.

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
    sweep, *others = {sweep.name: sweep for sweep in loaded}.values()
    if others:
        return _write_overlay(workspace, [sweep, *others], axes)
    if workspace.is_writable:
        sweep.store(workspace)
    front, notes = sweep_front(workspace, [sweep], axes)
    run = None
    started_ms, ended_ms = recorded_times(sweep.folder(workspace)) or (now_ms(), None)
    if tracking is not None:
        run = tracking.stored("sweep", sweep.key) or TrackedRun(
            key=sweep.key,
            kind="sweep",
            name=sweep.name,
            folder=str(sweep.folder(workspace)),
            journal=str(history_folder(sweep.folder(workspace), sweep.key)),
            tags={SWEEP_TAG: sweep.name},
            started_ms=started_ms,
        )
    if tracking is not None and run is not None and not axes.slug:
        tracking.publish(run)  # Before those nested in it, which would make it without its name.
        sweep, front = track_results(tracking, sweep, front)
        sweep.store(workspace)
    curves = dict(read_training_curves(sweep, front))
    if not axes.slug:
        curves |= read_history_curves(history_folder(sweep.folder(workspace), sweep.key))
    has_elastic = any(result.is_elastic for result in sweep.results)
    items = load_item_values(workspace, sweep.results) if has_elastic else {}
    report = SweepReport(
        name=sweep.name,
        front=front,
        influence=sweep.influence,
        curves=curves,
        facts=sweep.facts,
        notes=[*sweep.notes, *notes],
        elastic=elastic_section(front, items) if has_elastic else None,
    )
    written = _written(workspace, report, sweep.folder(workspace) / axes.slug)
    if tracking is None or run is None:
        return written
    if axes.slug:
        paths = [str(path) for path in written.files]
        changes: dict[str, Any] = {"files": {f"{ARTIFACT_FOLDER}/{axes.slug}": paths}}
    else:
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
    of `with_confidence`.
    """
    import pandas

    tables = [result_table(sweep.results) for sweep in sweeps]
    if len(sweeps) > 1:
        tables = [
            table.assign(sweep=sweep.name) for sweep, table in zip(sweeps, tables, strict=True)
        ]
    table = pandas.concat(tables)
    front = find_front(table[~table.index.duplicated()], axes)
    items = load_item_values(workspace, front.shown_seeds)
    notes = [*left_out_notes(front), *item_notes(front.shown_seeds, items)]
    return with_confidence(front, evaluations(front, items), kept_share=kept_share), notes


def _write_overlay(
    workspace: Workspace, sweeps: Sequence[StoredSweep], axes: FrontAxes
) -> WrittenReport:
    front, notes = sweep_front(workspace, sweeps, axes)
    common = list(dict.fromkeys(note for sweep in sweeps for note in sweep.notes))
    common += _suite_notes({sweep.name: _suite(sweep) for sweep in sweeps})
    if axes.cost == COSTS["ms"]:
        common.append(
            "Milliseconds were measured separately for each sweep: differences between sweeps "
            "include those of the machine and of its other load."
        )
    report = SweepReport(
        name=" + ".join(sweep.name for sweep in sweeps),
        front=front,
        curves={
            f"{title}: {sweep.name}": curves
            for sweep in sweeps
            for title, curves in read_training_curves(sweep, front).items()
        },
        facts=_facts(sweeps),
        notes=[*common, *notes],
    )
    name = "+".join(sweep.name for sweep in sweeps)
    if len(name) > MAX_FOLDER_NAME_LENGTH:
        name = f"{sweeps[0].name}+{len(sweeps) - 1}-{content_key(name)[:8]}"
    folder = workspace.overlays / (f"{name}-{axes.slug}" if axes.slug else name)
    return _written(workspace, report, folder)


def _written(workspace: Workspace, report: SweepReport, folder: Path) -> WrittenReport:
    files = write_report_files(report, folder) if workspace.is_writable else []
    return WrittenReport(report, folder, tuple(files))


def _facts(sweeps: Sequence[StoredSweep]) -> Mapping[str, Mapping[str, Any]]:
    # Facts that all sweeps share come once, the others for each sweep.
    facts: dict[str, Mapping[str, Any]] = {}
    for title in dict.fromkeys(title for sweep in sweeps for title in sweep.facts):
        lists = [sweep.facts.get(title, {}) for sweep in sweeps]
        shared = {
            name: value
            for name, value in lists[0].items()
            if all(name in other and other[name] == value for other in lists)
        }
        for sweep, values in zip(sweeps, lists, strict=True):
            own = {name: value for name, value in values.items() if name not in shared}
            if own:
                facts[f"{title}: {sweep.name}"] = own
        if shared:
            facts[f"{title}: the same in all"] = shared
    return facts


def _suite_notes(suites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if len({content_key(suite) for suite in suites.values()}) == 1:
        return []
    names = dict.fromkeys(name for suite in suites.values() for name in suite)
    different = [
        f"{name} " + " / ".join(str(suite.get(name, "unknown")) for suite in suites.values())
        for name in names
        if len({content_key(suite.get(name)) for suite in suites.values()}) > 1
    ]
    return [
        f"{' and '.join(suites)} were not measured on the same tasks and texts "
        f"({'; '.join(different)}): qualities of different sweeps do not compare."
    ]


def _suite(sweep: StoredSweep) -> dict[str, Any]:
    """Return what a sweep was measured on, without what does not change the results."""
    suite = sweep.results[0].suite.model_dump(mode="json")
    return {k: v for k, v in suite.items() if not k.endswith("_folder") and k != "batch_size"}
