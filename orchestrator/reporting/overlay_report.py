"""Several sweeps on one front: all their results against each other, each sweep told apart.

In: the stored results of two or more sweeps. Out: the files of a report in a folder of its own. A
result that several sweeps share counts once, as the first one's. Sweeps that were measured on
different tasks or texts are shown together with a note that says so: their costs compare, their
qualities do not, and differences are taken over the items that all models answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.trial import TrialResult
from orchestrator.reporting.confidence import with_confidence
from orchestrator.reporting.front_axes import COSTS, FrontAxes
from orchestrator.reporting.pareto import find_front
from orchestrator.reporting.report_files import SweepReport, WrittenReport, write_report_files
from orchestrator.reporting.seed_averages import average_seeds
from orchestrator.reporting.sweep_results import (
    SweepResults,
    item_notes,
    load_item_values,
    load_sweep_results,
)
from orchestrator.reporting.training_curves import read_training_curves
from orchestrator.workspace.files import damage_as_user_error, read_json_object
from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.provenance import content_key

LONGEST_FOLDER_NAME = 80


def write_overlay_report(
    workspace: Workspace, names: Sequence[str], *, axes: FrontAxes | None = None
) -> WrittenReport:
    """Write the report of several sweeps on one front.

    Args:
        workspace: Holds the sweeps.
        names: The sweeps; the first one's name wins where they share a result.
        axes: Which cost against which quality; evaluations against accuracy when unset.

    Raises:
        UserError: If there is no such sweep, or one has no result yet.
    """
    axes = axes or FrontAxes()
    sweeps = [load_sweep_results(workspace, name) for name in dict.fromkeys(names)]
    results: dict[str, TrialResult] = {}
    sweep_of: dict[str, str] = {}
    runs: dict[str, Sequence[EvaluationResult]] = {}
    items: dict[str, EvaluationResult] = {}
    for sweep in sweeps:
        joined = average_seeds(sweep.results)
        for result in joined.results:
            results.setdefault(result.key, result)
            sweep_of.setdefault(result.key, sweep.name)
        items |= load_item_values(workspace, sweep.results)
        runs |= joined.evaluations(items)
    front = find_front(list(results.values()), axes, sweep_of=sweep_of)
    front = with_confidence(front, runs)
    curves = {
        f"{title}: {sweep.name}": found
        for sweep in sweeps
        for title, found in read_training_curves(sweep, front).items()
    }
    every = {result.key: result for sweep in sweeps for result in sweep.results}.values()
    report = SweepReport(
        name=" + ".join(sweep.name for sweep in sweeps),
        front=front,
        curves=curves,
        facts=_facts(sweeps),
        notes=[*_notes(workspace, sweeps, axes), *item_notes(every, items)],
    )
    folder = workspace.overlays / _folder_name(sweeps, axes)
    return WrittenReport(report, folder, tuple(write_report_files(report, folder)))


def _facts(sweeps: Sequence[SweepResults]) -> Mapping[str, Mapping[str, Any]]:
    """Return what is the same in all sweeps once, and what differs for each."""
    titles = dict.fromkeys(title for sweep in sweeps for title in sweep.facts)
    facts: dict[str, Mapping[str, Any]] = {}
    for title in titles:
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


def _notes(workspace: Workspace, sweeps: Sequence[SweepResults], axes: FrontAxes) -> list[str]:
    """Say what keeps the sweeps from being compared."""
    notes = list(dict.fromkeys(note for sweep in sweeps for note in sweep.notes))
    notes += _about_tasks({sweep.name: _suite(workspace, sweep) for sweep in sweeps})
    if axes.cost == COSTS["ms"] and len(sweeps) > 1:
        notes.append(
            "Milliseconds were measured sweep by sweep: what else the machine did at that time, or "
            "another machine, is part of the difference between sweeps."
        )
    return notes


def _about_tasks(suites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say whether the sweeps were measured on the same tasks and texts."""
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


def _suite(workspace: Workspace, sweep: SweepResults) -> dict[str, Any]:
    """Return what a sweep's plan says it measures, without what only costs time."""
    path = sweep.folder(workspace) / "plan.json"
    plan = read_json_object(path) or {}
    with damage_as_user_error(path):
        trials = plan.get("trials", [])
        suite: dict[str, Any] = dict(next((trial.get("suite", {}) for trial in trials), {}))
    return {
        name: value
        for name, value in suite.items()
        if not name.endswith("_folder") and name != "batch_size"
    }


def _folder_name(sweeps: Sequence[SweepResults], axes: FrontAxes) -> str:
    name = "+".join(sweep.name for sweep in sweeps)
    if len(name) > LONGEST_FOLDER_NAME:
        name = f"{sweeps[0].name}+{len(sweeps) - 1}-{content_key(name)[:8]}"
    return f"{name}-{axes.slug}" if axes.slug else name
