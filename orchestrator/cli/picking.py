"""The command that picks a model from a front."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from orchestrator.cli.app import app
from orchestrator.cli.json_output import JsonOption
from orchestrator.cli.options import (
    CostOption,
    FolderToWriteOption,
    QualityOption,
    ReplaceModelOption,
    SweepArgument,
    VerboseOption,
    WorkspaceOption,
)
from orchestrator.cli.session import open_session
from orchestrator.terminal.render import print_line
from orchestrator.workspace.errors import UserError


@app.command(rich_help_panel="Models")
def pick(
    sweep: SweepArgument = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Cheapest that keeps this share of the quality, such as 0.99."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="With --keep: how sure that must be, such as 0.9.")
    ] = 0.0,
    budget: Annotated[
        float | None, typer.Option(help="Best that costs at most this much, in the unit of --cost.")
    ] = None,
    knee: Annotated[
        bool, typer.Option("--knee", help="Farthest above the line between the ends.")
    ] = False,
    best: Annotated[bool, typer.Option("--best", help="Highest quality.")] = False,
    cheapest: Annotated[bool, typer.Option("--cheapest", help="Lowest cost.")] = False,
    draft_for: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Fastest draft of this full model, such as teacher, by its name."
        ),
    ] = None,
    cost: CostOption = None,
    quality: QualityOption = None,
    to: FolderToWriteOption = None,
    force: ReplaceModelOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the choice; export and register nothing.")
    ] = False,
    as_json: JsonOption = False,
    workspace: WorkspaceOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Choose a model from a sweep's front; export it and register it in MLflow.

    Example: iiet-orch pick --keep 0.99 --to my-model
    """
    rule = _rule(keep, confidence, budget, draft_for, knee=knee, best=best, cheapest=cheapest)
    with open_session(
        workspace, "pick", verbose=verbose, dry_run=dry_run, as_json=as_json
    ) as session:
        from orchestrator.pipelines import picking

        choice = picking.pick(
            sweep=sweep,
            rule=rule,
            cost=cost,
            quality=quality,
            to=to,
            force=force,
            dry_run=dry_run,
            **session.common,
        )
        if as_json:
            session.print_json(choice.to_json())
            return
        lines = [f"{rule.alias}: {choice.sentence}"]
        if choice.folder is None:
            lines.append(f"checkpoint: {choice.point.result.checkpoint}")
        else:
            lines += [f"exported: {choice.folder}", f"registered: {choice.version}"]
        for line in lines:
            print_line(session.console, line)


def _rule(
    keep: float | None,
    confidence: float,
    budget: float | None,
    draft_for: str | None,
    **flags: bool,
) -> Any:
    from orchestrator.reporting.pick_rules import PickRule

    asked = [name for name, is_set in flags.items() if is_set]
    valued = {"keep": keep, "budget": budget, "draft": draft_for}
    asked += [name for name, value in valued.items() if value is not None]
    if len(asked) > 1:
        options = ("--draft-for" if name == "draft" else f"--{name}" for name in asked)
        raise UserError(f"pick takes one rule; got {' and '.join(options)}")
    name: Any = asked[0] if asked else "keep"
    if confidence and name != "keep":
        raise UserError("--confidence can be used with --keep only")
    numbers = {"share": keep, "budget": budget, "model": draft_for}
    given: dict[str, Any] = {key: value for key, value in numbers.items() if value is not None}
    return PickRule(name=name, confidence=confidence, **given)
