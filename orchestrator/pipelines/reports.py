"""What a procedure prints at its end: a front with what it says, or a plan with its price."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.pipelines.context import Desk
from orchestrator.planning.fit import request_of
from orchestrator.planning.trial_gpus import assign_trial_gpus
from orchestrator.reporting.front_axes import FrontAxes
from orchestrator.reporting.front_tables import terminal_table
from orchestrator.reporting.overlay_report import write_overlay_report
from orchestrator.reporting.report_files import WrittenReport
from orchestrator.reporting.sweep_report import write_sweep_report
from orchestrator.reporting.sweep_results import load_sweep_results, newest_sweep
from orchestrator.settings import Settings
from orchestrator.sweeping.plan_table import plan_sentences, plan_table
from orchestrator.sweeping.price import price_of, requested_noun, trial_states
from orchestrator.sweeping.stopping import stopping_of
from orchestrator.sweeping.trials import SweepPlan
from orchestrator.terminal.formatting import format_count
from orchestrator.terminal.layout import print_line
from orchestrator.training.job import TrainingJob


def report_and_show(desk: Desk, names: Sequence[str], axes: FrontAxes | None = None) -> None:
    """Write the report of one sweep, or of several on one front, again and show it.

    Args:
        desk: Workspace, tracking and terminal.
        names: The sweeps; the newest one when empty.
        axes: Which cost against which quality; evaluations against accuracy when unset.

    Raises:
        UserError: If there is no such sweep, or none at all.
    """
    names = list(dict.fromkeys(names)) or [newest_sweep(desk.workspace)]
    if len(names) > 1:
        show_report(write_overlay_report(desk.workspace, names, axes=axes), desk)
    else:
        # Before MLflow's store is opened, which takes seconds: the name may be wrong.
        sweep = load_sweep_results(desk.workspace, names[0])
        written = write_sweep_report(desk.workspace, sweep, axes=axes, tracking=desk.tracking)
        show_report(written, desk)


def show_report(written: WrittenReport, desk: Desk) -> None:
    """Print a front's table, what it says, and where to look next."""
    console = desk.console
    table = terminal_table(written.report.front, width=console.width, title=written.report.title)
    console.print()
    console.print(table)
    for sentence in written.report.sentences:
        print_line(console, f"  {sentence}")
    console.print()
    if written.page:
        print_line(console, f"report: {written.page}")
    console.print(
        f"MLflow: iiet-orch ui --workspace {desk.workspace.root}", soft_wrap=True, markup=False
    )


def show_plan(plan: SweepPlan, settings: Settings, desk: Desk) -> None:
    """Print what a sweep would do: its trials, what is finished, what the rest costs."""
    states = trial_states(plan, settings.sweep)
    price = price_of(plan, states, settings, desk.workspace.teachers)
    lines = plan_sentences(plan, requested_noun(plan, settings.sweep), states, price)
    if settings.trials_use_gpus:
        jobs = [s.trial.job for s in states if s.name == "to train" and s.trial.job]
        requests = [request_of(TrainingJob.from_dict(job)) for job in jobs]
        sweep = assign_trial_gpus(settings, requests).sweep
        gpus, at_once = sweep.gpus_per_trial or 0, sweep.trials_at_once
        most = f", at most {at_once} at once" if at_once else ""
        lines.append(f"each trial runs on {format_count(gpus, 'GPU')}{most}")
    rule = stopping_of(plan, settings.sweep).rule
    desk.console.print(plan_table(plan, states))
    for line in [*lines, rule.text] if rule else lines:
        print_line(desk.console, f"  {line}")
