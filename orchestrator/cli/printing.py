"""Print what several commands show: a sweep's front, the plan of a sweep or training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.terminal.render import format_count, print_line

if TYPE_CHECKING:
    from orchestrator.cli.session import Session
    from orchestrator.pipelines.reports import ReportResult
    from orchestrator.pipelines.sweep_dry_runs import SweepDryRun
    from orchestrator.pipelines.sweeps import SweepResult
    from orchestrator.pipelines.training_dry_runs import TrainingDryRun


def print_report(console: Console, report: ReportResult, workspace: Path) -> None:
    """Print a front's table, what it says, and where to find more."""
    from orchestrator.reporting.front_tables import terminal_table

    console.print()
    console.print(terminal_table(report.front, width=console.width, title=report.title))
    for sentence in report.sentences:
        print_line(console, f"  {sentence}")
    console.print()
    # Where every model is refused, the reasons stand in the files of the report.
    if report.elastic:
        console.print(report.elastic.to_terminal())
        for note in report.elastic.notes:
            print_line(console, f"  {note}")
        console.print()
    if report.page:
        print_line(console, f"report: {report.page}")
    console.print(f"MLflow: iiet-orch ui --workspace {workspace}", soft_wrap=True, markup=False)


def print_sweep(session: Session, result: SweepResult, *, as_json: bool) -> None:
    """Print a sweep's front; then raise `RunFailed` if trials failed."""
    from orchestrator.pipelines.sweeps import raise_failures

    if as_json:
        session.print_json(result.to_json())
    else:
        print_report(session.console, result.report, session.workspace.root)
    raise_failures(result.failures)


def show_plan(session: Session, found: SweepDryRun, *, as_json: bool) -> None:
    """Print what a sweep would do, as a table or as JSON."""
    if as_json:
        session.print_json(found.to_json())
    else:
        print_plan(session.console, found)


def print_plan(console: Console, found: SweepDryRun) -> None:
    """Print what a sweep would do: its trials, what is finished, what the rest takes."""
    from orchestrator.reporting.price_table import two_column_table
    from orchestrator.sweeping.plan_table import plan_table

    console.print(plan_table(found.plan, found.states))
    for line in found.notes:
        print_line(console, f"  {line}")
    console.print(two_column_table(None, found.rows))


def print_training_plan(console: Console, found: TrainingDryRun) -> None:
    """Print what one training would do and take."""
    from orchestrator.reporting.price_table import two_column_table

    training = found.training
    workers = format_count(training.num_workers, "GPU" if training.on_gpus else "CPU worker")
    title = f"Plan: {training.config.method}, {workers}"
    console.print(two_column_table(title, found.rows))
