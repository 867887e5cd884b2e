"""Commands that show what was found."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.app import app
from orchestrator.cli.options import VerboseOption, WorkspaceOption
from orchestrator.cli.session import open_desk


@app.command("report", rich_help_panel="Results")
def show_report(
    sweeps: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SWEEP",
            help="Names of sweeps; the newest when left out, several on one front.",
        ),
    ] = None,
    cost: Annotated[
        str | None, typer.Option(help="Cost on the front: evaluations, flops, ms, kv.")
    ] = None,
    quality: Annotated[
        str | None, typer.Option(help="Quality on it: accuracy, bits, perplexity, loss.")
    ] = None,
    workspace: WorkspaceOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Write and show the front of a sweep, or of several: table, pictures, one HTML page."""
    with open_desk(workspace, "report", verbose=verbose) as desk:
        from orchestrator.pipelines.reports import report_and_show
        from orchestrator.reporting.front_axes import parse_axes

        report_and_show(desk, sweeps or [], parse_axes(cost, quality))


@app.command(rich_help_panel="Results")
def ui(
    workspace: WorkspaceOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open MLflow on 127.0.0.1 and print links that land on the runs and fronts."""
    from orchestrator.pipelines.ui import serve
    from orchestrator.workspace.folders import open_workspace

    serve(open_workspace(workspace), port=port)


@app.command(rich_help_panel="Results")
def sync(workspace: WorkspaceOption = None, verbose: VerboseOption = False) -> None:
    """Tell MLflow what it missed while it did not answer."""
    with open_desk(workspace, "sync", verbose=verbose) as desk:
        desk.console.print(f"{desk.tracking.sync()} records delivered")
