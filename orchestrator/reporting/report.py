"""Writes the report of a sweep, or of several on one front, and shows it in the sweep's MLflow run.

Writing a report again replaces the old one and makes no second MLflow run. A front on other axes
gets its own folder, in the workspace and in MLflow, and changes nothing else of the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orchestrator.records.tracked_run import TrackedRun
from orchestrator.reporting.claims import Claim, find_claims
from orchestrator.reporting.depths import depth_section
from orchestrator.reporting.front import (
    COSTS,
    Front,
    FrontAxes,
    known,
    parse_axes,
    reason_against_accuracy,
    sweep_front,
)
from orchestrator.reporting.mlflow_report import report_changes, sweep_run, trial_runs
from orchestrator.reporting.results import (
    SETTINGS_TITLE,
    StoredSweep,
    load_sweep_results,
    read_training_curves,
    suite_notes,
)
from orchestrator.reporting.sweep_report import SweepReport
from orchestrator.terminal.render import format_parameters
from orchestrator.workspace.journal import recorded_times
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from orchestrator.tracking.tracker import Tracking  # It imports MLflow.

MS_NOTE = (
    "Milliseconds were measured separately for each sweep: differences between sweeps include "
    "those of the machine and of its other load."
)
MAX_FOLDER_NAME_LENGTH = 80


def write_sweep_report(
    workspace: Workspace,
    *sweeps: StoredSweep | str,
    axes: FrontAxes | None = None,
    tracking: Callable[[], Tracking] | None = None,
) -> SweepReport:
    """Write the report of a sweep, or of several on one front.

    Of several sweeps, a result that they share counts once, for the first of them. If they were
    measured on different tasks or texts, a note says that their qualities do not compare. Their
    report has a folder of its own, and no run in MLflow.

    Args:
        workspace: Holds the sweeps.
        sweeps: Their results, or their names to use the stored ones.
        axes: Cost and quality; by default NFE and the default quality of these models.
        tracking: Opens MLflow, which shows the report of one sweep; it is opened only if there is
            something that was not shown before. None to show nothing.

    Raises:
        UserError: If there is no such sweep, or one has no result yet.
    """
    loaded = (load_sweep_results(workspace, s) if isinstance(s, str) else s for s in sweeps)
    found = list({sweep.name: sweep for sweep in loaded}.values())
    if axes is None:
        trials = [trial for sweep in found for trial in sweep.results]
        axes = parse_axes(against_accuracy=reason_against_accuracy(workspace, trials))
    front, notes = sweep_front(workspace, found, axes)
    if len(found) > 1:
        report = _several_sweeps(workspace, found, front, notes)
        return report.written(report.folder) if workspace.is_writable else report

    [sweep] = found
    place = sweep.folder(workspace)
    if workspace.is_writable:
        sweep.store(workspace)
    run = sweep_run(TrackedRun.stored(workspace, "sweep", sweep.key), sweep.name, sweep.key, place)
    if tracking and not axes.slug:
        runs = trial_runs(sweep, front)
        is_known = all(each.is_stored(workspace) for each in (run, *runs))
        if not is_known or any(result.run_id is None for result in sweep.results):
            mlflow = tracking()
            mlflow.publish(run, *runs)
            tracked = [
                result.model_copy(update={"run_id": mlflow.run_id(own)})
                for result, own in zip(sweep.results, runs, strict=True)
            ]
            sweep = sweep.model_copy(update={"results": tuple(tracked)})
            front = front.with_runs(tracked)
            sweep.store(workspace)

    times = recorded_times(place)
    report = SweepReport(
        name=sweep.name,
        about=_about(sweep, front, times),
        front=front,
        influence=sweep.influence,
        curves=read_training_curves(sweep, front.rows),
        facts=sweep.facts,
        depths=depth_section(front) if sweep.is_of_depths else None,
        notes=[*sweep.notes, *notes],
        claims=_measured_claims(front),
        folder=place / axes.slug,
    )
    before = {path: path.read_bytes() for path in report.folder.glob("*.*") if path.is_file()}
    if workspace.is_writable:
        report = report.written(report.folder)
    if tracking:
        ended_ms = times[1] if times else None
        run = run.changed(
            **report_changes(report, run.started_ms),
            status="FINISHED",
            ended_ms=run.ended_ms or ended_ms,
        )
        are_same = all(before.get(path) == path.read_bytes() for path in report.files)
        if not (are_same and run.is_stored(workspace)):
            tracking().publish(run)
            tracking().wait()
    return report


def _several_sweeps(
    workspace: Workspace, sweeps: Sequence[StoredSweep], front: Front, notes: Sequence[str]
) -> SweepReport:
    common = list(dict.fromkeys(note for each in sweeps for note in each.notes))
    common += suite_notes(sweeps)
    if front.axes.cost == COSTS["ms"]:
        common.append(MS_NOTE)
    names = [sweep.name for sweep in sweeps]
    folder = "+".join(names)
    if len(folder) > MAX_FOLDER_NAME_LENGTH:
        folder = f"{names[0]}+{len(names) - 1}-{content_key(folder)[:8]}"
    slug = front.axes.slug
    return SweepReport(
        name=" + ".join(names),
        front=front,
        curves={
            f"{title}: {sweep.name}": curves
            for sweep in sweeps
            for title, curves in read_training_curves(sweep, front.rows).items()
        },
        facts={f"{title}: {s.name}": facts for s in sweeps for title, facts in s.facts.items()},
        notes=[*common, *notes],
        claims=_measured_claims(front),
        folder=workspace.overlays / (f"{folder}-{slug}" if slug else folder),
    )


def _about(sweep: StoredSweep, front: Front, times: tuple[int, int | None] | None) -> str:
    """Return data, model, tokens and date of a sweep, as far as they are known."""
    settings, full = sweep.facts.get(SETTINGS_TITLE, {}), front.full
    names = ("data.depth.tasks", "data.hub_name", "data.files", "data.source")
    data = next((text for name in names if (text := str(settings.get(name) or "()")) != "()"), "")
    parts = [re.sub(r"[()']|,\)$", "", data).rstrip(",")]
    if full is not None:
        trial = full["trial"]
        parts.append(f"{trial.method} {trial.schedule_text}".strip())
        for number, noun in (("cost/num_parameters", "parameters"), ("train/tokens", "tokens")):
            if value := known(trial.numbers, number):
                parts.append(f"{format_parameters(value)} {noun}")
    if times:
        ended = datetime.fromtimestamp((times[1] or times[0]) / 1000, UTC)
        parts.append(f"{ended.day} {ended:%B %Y}")
    return ", ".join(filter(None, parts)) if data else ""


def _measured_claims(front: Front) -> list[Claim]:
    claims = find_claims(front)
    return claims if any(claim.is_measured for claim in claims) else []
