"""Report of several sweeps on one front, in a folder of its own.

A result that several sweeps share counts once, for the first of them. If the sweeps were measured
on different tasks or texts, a note says that their qualities do not compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas

from orchestrator.reporting.confidence import with_confidence
from orchestrator.reporting.front_axes import COSTS, FrontAxes
from orchestrator.reporting.pareto import evaluations, find_front, left_out_notes
from orchestrator.reporting.report_content import SweepReport
from orchestrator.reporting.report_files import WrittenReport, write_report_files
from orchestrator.reporting.results import (
    StoredSweep,
    item_notes,
    load_item_values,
    load_sweep_results,
    result_table,
)
from orchestrator.reporting.training_curves import read_training_curves
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.provenance import content_key

MAX_FOLDER_NAME_LENGTH = 80


def write_overlay_report(
    workspace: Workspace, names: Sequence[str], *, axes: FrontAxes | None = None
) -> WrittenReport:
    """Write the report of several sweeps on one front, of NFE and accuracy by default.

    Raises:
        UserError: If there is no such sweep, or one has no result yet.
    """
    axes = axes or FrontAxes()
    sweeps = [load_sweep_results(workspace, name) for name in dict.fromkeys(names)]
    tables = [result_table(sweep.results).assign(sweep=sweep.name) for sweep in sweeps]
    table = pandas.concat(tables)
    front = find_front(table[~table.index.duplicated()], axes)
    items = load_item_values(workspace, front.shown_seeds)
    front = with_confidence(front, evaluations(front, items))
    report = SweepReport(
        name=" + ".join(sweep.name for sweep in sweeps),
        front=front,
        curves={
            f"{title}: {sweep.name}": curves
            for sweep in sweeps
            for title, curves in read_training_curves(sweep, front).items()
        },
        facts=_facts(sweeps),
        notes=[
            *_notes(sweeps, axes),
            *left_out_notes(front),
            *item_notes(front.shown_seeds, items),
        ],
    )
    folder = workspace.overlays / _folder_name(sweeps, axes)
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


def _notes(sweeps: Sequence[StoredSweep], axes: FrontAxes) -> list[str]:
    notes = list(dict.fromkeys(note for sweep in sweeps for note in sweep.notes))
    notes += _suite_notes({sweep.name: _suite(sweep) for sweep in sweeps})
    if axes.cost == COSTS["ms"] and len(sweeps) > 1:
        notes.append(
            "Milliseconds were measured separately for each sweep: differences between sweeps "
            "include those of the machine and of its other load."
        )
    return notes


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


def _folder_name(sweeps: Sequence[StoredSweep], axes: FrontAxes) -> str:
    name = "+".join(sweep.name for sweep in sweeps)
    if len(name) > MAX_FOLDER_NAME_LENGTH:
        name = f"{sweeps[0].name}+{len(sweeps) - 1}-{content_key(name)[:8]}"
    return f"{name}-{axes.slug}" if axes.slug else name
