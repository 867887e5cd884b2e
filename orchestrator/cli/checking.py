"""The command that checks this machine."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console

from orchestrator.cli.app import app
from orchestrator.cli.json_output import JsonOption, print_json
from orchestrator.cli.options import WorkspaceOption
from orchestrator.terminal.render import print_line


@app.command(rich_help_panel="Workspace")
def doctor(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """Check this machine and the workspace; name a remedy for what is broken.

    Exits with 1 if something is broken. Nothing is written or started.

    Example: iiet-orch doctor
    """
    from orchestrator.pipelines.doctor import examine
    from orchestrator.workspace.layout import locate_workspace

    console = Console(highlight=False)
    found: list[dict[str, Any]] = []
    for finding in examine(locate_workspace(workspace)):
        found.append(finding.to_json())
        for part in () if as_json else finding.shown():
            print_line(console, part)
    if as_json:
        print_json({"findings": found})
    if any(finding["state"] == "broken" for finding in found):
        raise typer.Exit(1)
