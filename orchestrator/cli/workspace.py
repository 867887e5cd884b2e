"""Commands that show what a workspace holds and what runs in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from orchestrator.cli.app import app
from orchestrator.cli.json_output import JsonOption, print_json
from orchestrator.cli.options import WorkspaceOption
from orchestrator.terminal.render import print_line
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Kind, RemovableKind

if TYPE_CHECKING:
    from orchestrator.pipelines.result import Result
    from orchestrator.workspace.layout import Workspace


@app.command("list", rich_help_panel="Workspace")
def list_workspace(
    kind: Annotated[
        Kind | None,
        typer.Argument(
            metavar="KIND",
            help="runs, checkpoints, trials, sweeps or models (default: all but checkpoints).",
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """List runs, trials, sweeps, exported models and checkpoints, the newest first.

    Example: iiet-orch list runs --json
    """
    from orchestrator.pipelines import upkeep

    space = existing_workspace(workspace)
    _print(upkeep.list_workspace(space, kind, with_checkpoints=as_json, note=_warn), as_json)


@app.command(rich_help_panel="Workspace")
def status(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """Show what runs in the workspace now: progress, speed, time left.

    Example: iiet-orch status --json
    """
    from orchestrator.pipelines import upkeep

    _print(upkeep.show_status(existing_workspace(workspace), note=_warn), as_json)


@app.command(rich_help_panel="Workspace")
def clean(
    kinds: Annotated[
        list[RemovableKind] | None,
        typer.Argument(
            metavar="KIND",
            help="temporary, ray, teachers, first-stages, checkpoints or damaged (default: all).",
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what can go; delete nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete what is no longer needed: shows it with sizes and reasons, then asks.

    Finished weights, evaluations, and what a running process holds are never touched.

    Example: iiet-orch clean checkpoints --dry-run
    """
    from orchestrator.pipelines import upkeep

    space = existing_workspace(workspace)
    plan = upkeep.plan_clean(space, kinds or (), note=_warn)
    is_asked = plan.found and not dry_run and (yes or not as_json)
    if not (as_json and is_asked):
        _print(plan, as_json)
    if is_asked and not yes:
        if not sys.stdin.isatty():
            raise UserError(
                "nothing was deleted; --yes deletes without asking, --dry-run only lists"
            )
        is_asked = typer.confirm(f"Delete all of this ({plan.size})?")
    if is_asked:
        _print(upkeep.run_clean(plan, space), as_json)


def _warn(sentence: str) -> None:
    print_line(Console(stderr=True, highlight=False), sentence)


def _print(result: Result, as_json: bool) -> None:
    if as_json:
        print_json(result.to_json())
        return
    console = Console(highlight=False)
    for part in result.shown():
        if isinstance(part, str):
            print_line(console, part)
        else:
            console.print(part)


def existing_workspace(path: Path | None) -> Workspace:
    """Return the workspace, which is only read.

    Raises:
        UserError: If there is none.
    """
    from orchestrator.workspace.layout import locate_workspace

    workspace = locate_workspace(path)
    if not workspace.root.is_dir():
        raise UserError(
            f"there is no workspace {workspace.root}; name one with --workspace, or "
            "`iiet-orch quickstart` makes one"
        )
    return workspace
