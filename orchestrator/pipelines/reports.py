"""Reports of one or several sweeps, from stored results.

Everything is read from the folders of finished sweeps; only times are measured again, on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.pipelines.context import Context, open_context
from orchestrator.records.trial import SweepTrials
from orchestrator.reporting.front import parse_axes, reason_against_accuracy
from orchestrator.reporting.results import StoredSweep, load_sweep_results, newest_sweep
from orchestrator.reporting.sweep_report import ReportResult
from orchestrator.settings import SETTINGS_NAME, read_settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import PLAN_FILE, Workspace


def report(
    *,
    workspace: Workspace | Path | str | None = None,
    sweeps: Sequence[str] = (),
    cost: str | None = None,
    quality: str | None = None,
    time_again: bool = False,
    progress: Progress | None = None,
) -> ReportResult:
    """Write the report of one sweep, or of several sweeps on one front, from stored results.

    In a read-only workspace, no file is written.

    Args:
        sweeps: Names of sweeps; the newest one when empty.
        cost: Cost axis: `nfe` (the default), `flops`, `ms` or `kv`.
        quality: Quality axis: `accuracy`, `bits`, `perplexity` or `loss`. The default is
            `accuracy`, or `bits` if accuracy cannot tell the models apart.
        time_again: Measure the time per token of the sweep's models once more, and store it.

    Raises:
        UserError: If there is no such sweep, or a cost or quality has another name; or if the times
            of these sweeps cannot be measured here.
    """
    from orchestrator.reporting.report import write_sweep_report  # Imports vl-convert.

    parse_axes(cost, quality)  # A wrong name comes before anything is read.
    context = open_context(workspace, progress)
    space = context.workspace
    names = dict.fromkeys(sweeps or [newest_sweep(space)])
    stored_sweeps = [load_sweep_results(space, name) for name in names]
    if time_again:
        stored_sweeps = [_timed_again(stored_sweeps, context)]
    trials = [trial for sweep in stored_sweeps for trial in sweep.results]
    axes = parse_axes(cost, quality, against_accuracy=reason_against_accuracy(space, trials))
    is_shown = space.is_writable and len(stored_sweeps) == 1
    tracking = (lambda: context.tracking) if is_shown else None
    return write_sweep_report(space, *stored_sweeps, axes=axes, tracking=tracking)


def _timed_again(sweeps: Sequence[StoredSweep], context: Context) -> StoredSweep:
    """Measure the times per token of a sweep again, on the devices of its trials."""
    from orchestrator.reporting.costs import with_costs  # Imports PyTorch.

    space = context.workspace
    if len(sweeps) > 1:
        raise UserError(f"--time-again measures one sweep; got {len(sweeps)}")
    [sweep] = sweeps
    if not space.is_writable:
        raise UserError(f"--time-again: {space.root} cannot be written, so no time could be stored")
    folder = sweep.folder(space)
    plan = SweepTrials.read(folder / PLAN_FILE)
    if plan is None:
        raise UserError(f"--time-again: {sweep.name} has lost its {PLAN_FILE}; repeat the sweep")
    settings = read_settings(folder / SETTINGS_NAME)
    results = with_costs(sweep.results, plan, folder, settings, context.progress, again=True)
    return sweep.model_copy(update={"results": tuple(results)})
