"""Write the report of a sweep, or of several on one front, and show it in the sweep's MLflow run.

Writing a report again replaces the old one and makes no second MLflow run. A front on other axes
gets its own folder, in the workspace and in MLflow, and changes nothing else of the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orchestrator.records.metrics import DECODE_MS, NUM_PARAMETERS, TRAINING_TOKENS
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.reporting.claims import find_claims
from orchestrator.reporting.front import (
    Front,
    FrontAxes,
    parse_axes,
    reason_against_accuracy,
    sweep_front,
)
from orchestrator.reporting.mlflow_report import (
    mlflow_run_of_sweep,
    mlflow_runs_of_results,
    report_changes,
)
from orchestrator.reporting.results import (
    SETTINGS_TITLE,
    StoredSweep,
    load_sweep_results,
    read_training_curves,
    suite_notes,
)
from orchestrator.reporting.sweep_report import ReportResult, sentences_of, sweeps_text
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
) -> ReportResult:
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
    by_name: dict[str, StoredSweep] = {}
    for sweep in sweeps:
        results = load_sweep_results(workspace, sweep) if isinstance(sweep, str) else sweep
        by_name[results.name] = results
    stored_sweeps = tuple(by_name.values())
    if axes is None:
        trials = [trial for sweep in stored_sweeps for trial in sweep.results]
        axes = parse_axes(against_accuracy=reason_against_accuracy(workspace, trials))
    front, notes = sweep_front(workspace, stored_sweeps, axes)
    if len(stored_sweeps) > 1:
        report = _report_of_several(workspace, stored_sweeps, front, notes)
        return report.written() if workspace.is_writable else report

    [sweep] = stored_sweeps
    folder = sweep.folder(workspace)
    if workspace.is_writable:
        sweep.store(workspace)
    run = mlflow_run_of_sweep(
        TrackedRun.stored(workspace, "sweep", sweep.key), sweep.name, sweep.key, folder
    )
    if tracking and not axes.slug:
        runs = mlflow_runs_of_results(sweep, front)
        is_known = all(known_run.is_stored(workspace) for known_run in (run, *runs))
        if not is_known or any(trial.run_id is None for trial in sweep.results):
            mlflow = tracking()
            mlflow.publish(run, *runs)
            trials_with_runs = [
                trial.model_copy(update={"run_id": mlflow.run_id(trial_run)})
                for trial, trial_run in zip(sweep.results, runs, strict=True)
            ]
            sweep = sweep.model_copy(update={"results": tuple(trials_with_runs)})
            front = front.with_runs(trials_with_runs)
            sweep.store(workspace)

    times = recorded_times(folder)
    notes = [*sweep.notes, *notes]
    report = ReportResult(
        title=_title(sweep, front, times),
        sentences=sentences_of(front, notes),
        notes=tuple(notes),
        folder=folder / axes.slug,
        workspace=workspace.root,
        sweeps=(sweep,),
        front=front,
        curves=read_training_curves(sweep, front.placed),
        claims=tuple(find_claims(front)),
    )
    files_before = {path: path.read_bytes() for path in report.folder.glob("*.*") if path.is_file()}
    if workspace.is_writable:
        report = report.written()
    if tracking:
        ended_ms = times[1] if times else None
        run = run.changed(
            **report_changes(report, run.started_ms),
            status="FINISHED",
            ended_ms=run.ended_ms or ended_ms,
        )
        are_same = all(files_before.get(path) == path.read_bytes() for path in report.files)
        if not (are_same and run.is_stored(workspace)):
            tracking().publish(run)
            tracking().wait()
    return report


def _report_of_several(
    workspace: Workspace, sweeps: Sequence[StoredSweep], front: Front, front_notes: Sequence[str]
) -> ReportResult:
    """Return the report of several sweeps, which is not written yet."""
    notes = list(dict.fromkeys(note for sweep in sweeps for note in sweep.notes))
    notes += suite_notes(sweeps)
    if front.axes.cost == DECODE_MS:
        notes.append(MS_NOTE)
    folder_name = "+".join(sweep.name for sweep in sweeps)
    if len(folder_name) > MAX_FOLDER_NAME_LENGTH:
        folder_name = f"{sweeps[0].name}+{len(sweeps) - 1}-{content_key(folder_name)[:8]}"
    if front.axes.slug:
        folder_name += f"-{front.axes.slug}"
    notes += front_notes
    return ReportResult(
        title=sweeps_text(sweeps),
        sentences=sentences_of(front, notes),
        notes=tuple(notes),
        folder=workspace.overlays / folder_name,
        workspace=workspace.root,
        sweeps=tuple(sweeps),
        front=front,
        curves={
            f"{title}: {sweep.name}": curves
            for sweep in sweeps
            for title, curves in read_training_curves(sweep, front.placed).items()
        },
        claims=tuple(find_claims(front)),
    )


def _title(sweep: StoredSweep, front: Front, times: tuple[int, int | None] | None) -> str:
    """Return name, data, model, tokens and date of a sweep, as far as they are known."""
    settings = sweep.facts.get(SETTINGS_TITLE, {})
    data = ""
    for setting in ("data.depth.tasks", "data.hub_name", "data.files", "data.source"):
        value = str(settings.get(setting) or "()")
        if value != "()":
            data = value
            break
    if not data:
        return sweeps_text([sweep])
    parts = [re.sub(r"[()']|,\)$", "", data).rstrip(",")]
    if front.full is not None:
        full = front.full.trial
        parts.append(f"{full.method} {full.schedule_text}".strip())
        for name, noun in ((NUM_PARAMETERS, "parameters"), (TRAINING_TOKENS, "tokens")):
            if number := front.full.number(name):
                parts.append(f"{format_parameters(number)} {noun}")
    if times:
        ended = datetime.fromtimestamp((times[1] or times[0]) / 1000, UTC)
        parts.append(f"{ended.day} {ended:%B %Y}")
    return f"{sweeps_text([sweep])}: {', '.join(filter(None, parts))}"
