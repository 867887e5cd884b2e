"""What a workspace holds, what runs in it, and what can be deleted; for terminals and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from orchestrator.pipelines.result import Result
from orchestrator.terminal.render import (
    ResponsiveLayout,
    format_bytes,
    format_count,
    format_duration,
    plain_table,
    shortest_schedule,
)
from orchestrator.workspace.layout import KINDS, Kind, RemovableKind
from orchestrator.workspace.status import Activity, Entry, Status, list_entries, read_status

if TYPE_CHECKING:
    from orchestrator.pipelines.cleaning import Removable
    from orchestrator.workspace.layout import Workspace

Note = Callable[[str], None]


class Listing(Result):
    """Runs, trials, sweeps, exported models and checkpoints, the newest first."""

    workspace: Any
    entries: dict[str, list[Entry]]

    def to_json(self) -> dict[str, Any]:
        """Return the workspace and its entries by kind."""
        lists = {kind: [entry.to_json() for entry in found] for kind, found in self.entries.items()}
        return {"workspace": str(self.workspace.root), **lists}

    def shown(self) -> Iterable[RenderableType]:
        """Return a title and a table for each kind."""
        for kind, entries in self.entries.items():
            size = format_bytes(sum(entry.num_bytes for entry in entries))
            title = "exported models" if kind == "models" else kind
            yield f"{title}: {len(entries)}" + (f", {size}" if entries else "")
            if entries:
                yield _entry_table(entries)
            yield ""


def list_workspace(
    workspace: Workspace, kind: Kind | None, *, with_checkpoints: bool, note: Note
) -> Listing:
    """List the entries of one kind, or of all; damaged files are noted."""
    kinds = [kind] if kind else [k for k in KINDS if with_checkpoints or k != "checkpoints"]
    damage: dict[str, None] = {}  # A plan is read for its sweep and for its trials.
    entries = {k: list_entries(workspace, k, damage.setdefault) for k in kinds}
    for sentence in damage:
        note(sentence)
    return Listing(workspace=workspace, entries=entries)


def _entry_table(entries: Sequence[Entry]) -> ResponsiveLayout:
    def state(entry: Entry) -> str:
        trials = entry.details.get("trials")
        finished = f", {entry.details['finished']}/{trials} trials" if trials else ""
        return f"{entry.state}{finished}"

    def model(entry: Entry) -> str:
        method, schedule = entry.details.get("method", ""), entry.details.get("schedule")
        return f"{method} {shortest_schedule(schedule)}" if schedule and any(schedule) else method

    def loss(entry: Entry) -> str:
        value = entry.details.get("validation_loss")
        return "" if value is None else f"{value:.4g}"

    columns = {
        "name": [entry.name for entry in entries],
        "label": [entry.details.get("label", "") for entry in entries],
        "state": [state(entry) for entry in entries],
        "model": [model(entry) for entry in entries],
        "loss>": [loss(entry) for entry in entries],
        "size>": [format_bytes(entry.num_bytes) for entry in entries],
        "changed": [f"{datetime.fromtimestamp(e.changed):%Y-%m-%d %H:%M}" for e in entries],
    }
    filled = {title: texts for title, texts in columns.items() if any(texts)}
    fewer = {title: filled[title] for title in filled if title not in ("loss>", "model")}
    return ResponsiveLayout(
        *(plain_table([*some], zip(*some.values(), strict=True)) for some in (filled, fewer))
    )


class StatusResult(Result):
    """What runs in a workspace now."""

    workspace: Any
    status: Status

    def to_json(self) -> dict[str, Any]:
        """Return the workspace, activities, sweeps and waiting records."""
        return {"workspace": str(self.workspace.root), **self.status.to_json()}

    def shown(self) -> Iterable[RenderableType]:
        """Return a sentence for each sweep and activity."""
        if not self.status.activities:
            yield f"nothing runs in {self.workspace.root}"
        for sweep in self.status.sweeps:
            left = sweep.seconds_left
            left_text = f", about {format_duration(left)} left" if left else ""
            done = f"{sweep.finished} of {format_count(sweep.trials, 'trial')}"
            yield f"sweep {sweep.name}: {done} finished{left_text}"
        yield from map(_activity_sentence, self.status.activities)
        if pending := self.status.pending_records:
            waiting = format_count(pending, "record")
            yield f"{waiting} not delivered to MLflow; `iiet-orch sync` delivers"


def show_status(workspace: Workspace, *, note: Note) -> StatusResult:
    """Return what runs; damaged files are noted."""
    damage: dict[str, None] = {}
    status = read_status(workspace, damage.setdefault)
    for sentence in damage:
        note(sentence)
    return StatusResult(workspace=workspace, status=status)


def _activity_sentence(activity: Activity) -> str:
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


class CleanResult(Result):
    """What can be deleted, and what was."""

    workspace: Any
    found: list[Any]
    deleted: list[Any] | None = None
    """None if nothing was to be deleted."""

    @property
    def size(self) -> str:
        """Space that it frees."""
        return _size(self.found)

    def to_json(self) -> dict[str, Any]:
        """Return the items that were found and those that were deleted."""
        from orchestrator.pipelines.cleaning import to_json

        values = {"found": self.found, "deleted": self.deleted or ()}
        return {name: [to_json(item) for item in items] for name, items in values.items()}

    def shown(self) -> Iterable[RenderableType]:
        """Return the items with sizes and reasons, or how many were deleted."""
        if self.deleted is not None:
            yield f"deleted {len(self.deleted)} of {len(self.found)}: {_size(self.deleted)}"
            return
        for kind, items in groupby(self.found, key=lambda item: item.kind):
            group = list(items)
            yield f"{kind}: {format_count(len(group), 'item')}, {_size(group)}"
            for item in group:
                inside = item.path.is_relative_to(self.workspace.root)
                name = item.path.relative_to(self.workspace.root) if inside else item.path
                yield f"  {name}, {format_bytes(item.num_bytes)}: {item.reason}"
        if not self.found:
            yield f"nothing to delete in {self.workspace.root}"


def plan_clean(workspace: Workspace, kinds: Sequence[RemovableKind], *, note: Note) -> CleanResult:
    """Return what can go, of these kinds or of all; damaged files are noted."""
    from orchestrator.pipelines import cleaning

    damage: dict[str, None] = {}
    found = cleaning.find_removable(workspace, kinds or cleaning.KINDS, damage.setdefault)
    for sentence in damage:
        note(sentence)
    return CleanResult(workspace=workspace, found=found)


def run_clean(plan: CleanResult) -> CleanResult:
    """Delete what can still go."""
    from orchestrator.pipelines import cleaning

    deleted = cleaning.delete_removable(plan.workspace, plan.found)
    return plan.model_copy(update={"deleted": deleted})


def _size(items: Iterable[Removable]) -> str:
    return format_bytes(sum(item.num_bytes for item in items))
