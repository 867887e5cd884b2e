"""Commands that show what a workspace holds and what runs in it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from orchestrator.cli.app import app
from orchestrator.cli.json_output import JsonOption, print_json
from orchestrator.cli.options import WorkspaceOption
from orchestrator.terminal.render import (
    ResponsiveLayout,
    format_bytes,
    format_count,
    format_duration,
    plain_table,
    print_line,
    shortest_schedule,
)
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import KINDS, Kind, RemovableKind

if TYPE_CHECKING:
    from orchestrator.pipelines.cleaning import Removable
    from orchestrator.workspace.layout import Workspace
    from orchestrator.workspace.status import Activity, Entry, Status


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
    from orchestrator.workspace.status import list_entries

    space = existing_workspace(workspace)
    kinds = [kind] if kind else [k for k in KINDS if as_json or k != "checkpoints"]
    damage: dict[str, None] = {}  # A plan is read for its sweep and for its trials.
    found = {k: list_entries(space, k, damage.setdefault) for k in kinds}
    _warn(damage)
    if as_json:
        lists = {k: [entry.to_json() for entry in entries] for k, entries in found.items()}
        print_json({"workspace": str(space.root), **lists})
        return
    console = Console(highlight=False)
    for name, entries in found.items():
        size = format_bytes(sum(entry.num_bytes for entry in entries))
        title = "exported models" if name == "models" else name
        print_line(console, f"{title}: {len(entries)}" + (f", {size}" if entries else ""))
        if entries:
            console.print(_entry_table(entries))
        console.print()


@app.command(rich_help_panel="Workspace")
def status(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """Show what runs in the workspace now: progress, speed, time left.

    Example: iiet-orch status --json
    """
    from orchestrator.workspace.status import read_status

    space = existing_workspace(workspace)
    damage: dict[str, None] = {}
    found = read_status(space, damage.setdefault)
    _warn(damage)
    if as_json:
        print_json({"workspace": str(space.root), **found.to_json()})
    else:
        _print_status(Console(highlight=False), space, found)


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
    from orchestrator.pipelines import cleaning

    space = existing_workspace(workspace)
    console = Console(highlight=False)
    damage: dict[str, None] = {}
    found = cleaning.find_removable(space, kinds or cleaning.KINDS, damage.setdefault)
    _warn(damage)
    if not as_json:
        _print_removable(console, space, found)
    deleted: list[Removable] = []
    is_asked = found and not dry_run and (yes or not as_json)
    if is_asked and (yes or _agrees(sum(item.num_bytes for item in found))):
        deleted = cleaning.delete_removable(space, found)
        freed = format_bytes(sum(item.num_bytes for item in deleted))
        if not as_json:
            print_line(console, f"deleted {len(deleted)} of {len(found)}: {freed}")
    if as_json:
        values = {"found": found, "deleted": deleted}
        print_json({name: [cleaning.to_json(i) for i in items] for name, items in values.items()})


def _warn(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        print_line(Console(stderr=True, highlight=False), sentence)


def _agrees(num_bytes: int) -> bool:
    if not sys.stdin.isatty():
        raise UserError("nothing was deleted; --yes deletes without asking, --dry-run only lists")
    return typer.confirm(f"Delete all of this ({format_bytes(num_bytes)})?")


def _print_removable(console: Console, workspace: Workspace, found: Sequence[Removable]) -> None:
    for kind, items in groupby(found, key=lambda item: item.kind):
        group = list(items)
        size = format_bytes(sum(item.num_bytes for item in group))
        print_line(console, f"{kind}: {format_count(len(group), 'item')}, {size}")
        for item in group:
            inside = item.path.is_relative_to(workspace.root)
            name = item.path.relative_to(workspace.root) if inside else item.path
            print_line(console, f"  {name}, {format_bytes(item.num_bytes)}: {item.reason}")
    if not found:
        print_line(console, f"nothing to delete in {workspace.root}")


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


def _entry_table(entries: Sequence[Entry]) -> ResponsiveLayout:
    columns = {
        "name": [entry.name for entry in entries],
        "label": [entry.details.get("label", "") for entry in entries],
        "state": [_state(entry) for entry in entries],
        "model": [_model(entry) for entry in entries],
        "loss>": [_loss(entry) for entry in entries],
        "size>": [format_bytes(entry.num_bytes) for entry in entries],
        "changed": [f"{datetime.fromtimestamp(e.changed):%Y-%m-%d %H:%M}" for e in entries],
    }
    filled = {title: texts for title, texts in columns.items() if any(texts)}
    fewer = {title: filled[title] for title in filled if title not in ("loss>", "model")}
    return ResponsiveLayout(
        *(plain_table([*some], zip(*some.values(), strict=True)) for some in (filled, fewer))
    )


def _state(entry: Entry) -> str:
    trials = entry.details.get("trials")
    return f"{entry.state}, {entry.details['finished']}/{trials} trials" if trials else entry.state


def _model(entry: Entry) -> str:
    method, schedule = entry.details.get("method", ""), entry.details.get("schedule")
    return f"{method} {shortest_schedule(schedule)}" if schedule and any(schedule) else method


def _loss(entry: Entry) -> str:
    loss = entry.details.get("validation_loss")
    return "" if loss is None else f"{loss:.4g}"


def _print_status(console: Console, workspace: Workspace, found: Status) -> None:
    if not found.activities:
        print_line(console, f"nothing runs in {workspace.root}")
    for sweep in found.sweeps:
        left = f", about {format_duration(sweep.seconds_left)} left" if sweep.seconds_left else ""
        done = f"{sweep.finished} of {format_count(sweep.trials, 'trial')}"
        print_line(console, f"sweep {sweep.name}: {done} finished{left}")
    for activity in found.activities:
        print_line(console, _sentence(activity))
    if found.pending_records:
        waiting = format_count(found.pending_records, "record")
        print_line(console, f"{waiting} not delivered to MLflow; `iiet-orch sync` delivers")


def _sentence(activity: Activity) -> str:
    facts = [f"{activity.label} in {', '.join(activity.sweeps)}" if activity.sweeps else ""]
    if activity.kind in ("queued", "training") and activity.steps:
        facts.append(f"step {activity.step or 0:,} of {activity.steps:,}")
        facts.append(f"loss {activity.loss:.4g}" if activity.loss is not None else "")
        speed, left = activity.tokens_per_second, activity.seconds_left
        facts.append(f"{speed:,.0f} tokens/s" if speed else "")
        facts.append(f"{format_duration(left)} left" if left is not None else "")
    age = activity.seconds_since_record
    if age is not None and age >= 60:
        facts.append(f"last record {format_duration(age)} ago")
    facts.append(f"process {activity.process}" if activity.process else "")
    return f"{activity.kind} {activity.name}: " + ", ".join(filter(None, facts))
