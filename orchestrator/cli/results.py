"""Commands that show results."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from orchestrator.cli.app import app
from orchestrator.cli.json_output import JsonOption
from orchestrator.cli.options import (
    CostOption,
    QualityOption,
    SweepsArgument,
    VerboseOption,
    WorkspaceOption,
)
from orchestrator.cli.printing import show
from orchestrator.cli.session import open_session


@app.command("report", rich_help_panel="Results")
def show_report(
    sweeps: SweepsArgument = None,
    cost: CostOption = None,
    quality: QualityOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = None,
) -> None:
    """Write and show the front of one or several sweeps: table, pictures, one HTML page.

    Example: iiet-orch report --cost flops
    """
    with open_session(
        workspace, "report", verbose=verbose, as_json=as_json, must_write=False
    ) as session:
        from orchestrator.pipelines.sweeps import report

        result = report(sweeps=sweeps or [], cost=cost, quality=quality, **session.common)
        show(session, result, as_json=as_json)


@app.command(rich_help_panel="Results")
def ui(
    workspace: WorkspaceOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Start MLflow on 127.0.0.1 and print links to the runs and fronts.

    Example: iiet-orch ui --port 5001
    """
    from orchestrator.pipelines.ui import serve
    from orchestrator.workspace.folders import open_workspace

    serve(open_workspace(workspace), port=port)


@app.command(rich_help_panel="Results")
def sync(
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = None,
) -> None:
    """Publish the workspace in MLflow again: what it missed, all trainings and all measurements.

    Example: iiet-orch sync --workspace my-workspace
    """
    with open_session(workspace, "sync", verbose=verbose, as_json=as_json) as session:
        from orchestrator.pipelines import syncing

        result = syncing.sync(**session.common)
        if as_json:
            session.print_json(asdict(result))
        else:
            session.console.print(f"{result.num_delivered} records delivered")
