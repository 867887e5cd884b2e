"""What MLflow shows of a run, kept as a file: the workspace is the truth, and MLflow a view of it.

A training, a sweep, each of its trials, an evaluation, a benchmark and an influence table are such
runs. Curves stay in the journals that the runs name. From these files `Tracking.publish` makes the
runs in MLflow, and `ui --sync` makes all of them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, SerializationInfo

from orchestrator.records.record import Record, WorkspacePath
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import Workspace, portable_path

RUN_ID = "{run_id}"
"""Stands for MLflow's id of the run in the texts of its tags."""
REASON_TAG = "iiet.reason"
"""Tag that says why a run ended without a result."""
NOTE_TAG = "mlflow.note.content"
"""Tag with the description at the top of a page, in Markdown."""
SWEEP_TAG = "iiet.sweep"
"""Tag with the name of a run's sweep; the chart view filters by it."""
VIEW_TAG = "iiet.chart_view"
"""Tag of a sweep: the key of its chart view."""
REPORT_TAG = "iiet.report"
"""Tag of a sweep: the artifact that is its report."""


def _portable(texts: dict[str, str], info: SerializationInfo) -> dict[str, str]:
    return {name: portable_path(text, info.context) for name, text in texts.items()}


Texts = Annotated[dict[str, str], PlainSerializer(_portable)]
"""Texts by name; those that are paths in a workspace are stored relative to its root."""
RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED", "WITHDRAWN"]
"""A withdrawn run is shown no more, because another one shows the same."""
PRETRAIN_OF_SWEEP = "sweep_pretrain"
"""Kind of a training that a sweep makes for itself; its run goes when the sweep shows the model."""
DataSummary = tuple[str, str, dict[str, Any]]
"""Name, digest, and a profile with origin and sizes."""


class TrackedModel(Record):
    """A model that is logged with the runs that made and measured it."""

    key: str
    """Hash of weights and schedule."""
    name: str
    params: Texts
    datasets: dict[str, tuple[str, str] | None]
    """The metrics that describe the model -> name and digest of the data that they were measured
    on; None for costs, which need no data."""
    is_of_sweep: bool = False
    """Whether a sweep logs the model, with the run of its training; until then no other run does,
    because MLflow takes the first run for the model's source."""


class TrackedRun(Record):
    """One run as MLflow shows it.

    A run is found by its kind, its key and its parent, so there is never a second one. A trial of
    two sweeps has one key and two runs, one under each parent.
    """

    key: str
    """Content key of what was done."""
    kind: str
    """The tag `iiet.kind`: pretrain, distill, sweep, the role of a trial, evaluation, benchmark or
    influence."""
    name: str
    """Name for people; two runs may share it."""
    parent: str | None = None
    """Key of the sweep whose trial the run shows; None for any other run."""
    folder: WorkspacePath | None = None
    """The folder that the run describes, if it is one of a folder; it may be deleted."""
    journal: WorkspacePath | None = None
    """Folder of the journal with the run's curves."""
    params: Texts = Field(default_factory=dict)
    tags: Texts = Field(default_factory=dict)
    """An empty text deletes the tag."""
    points: list[tuple[str, float, int]] = Field(default_factory=list)
    """Name, value and step of metrics that are in no journal."""
    dataset: DataSummary | None = None
    """The data that a training or a measurement read."""
    files: dict[str, list[WorkspacePath]] = Field(default_factory=dict)
    """Folder of artifacts -> pictures, tables and pages, as far as they exist."""
    texts: dict[str, str] = Field(default_factory=dict)
    """Path of an artifact -> its content."""
    views: dict[str, str] = Field(default_factory=dict)
    """Tags of the experiment, which hold saved chart views."""
    model: TrackedModel | None = None
    """The model that was made or measured, if the run's metrics belong to a logged model."""
    status: RunStatus = "FINISHED"
    started_ms: int = Field(default_factory=now_ms)
    ended_ms: int | None = None
    """Start, and end or last record so far, in ms."""

    @classmethod
    def of(
        cls,
        *,
        params: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        points: Sequence[tuple[str, float, int]] = (),
        **fields: Any,
    ) -> Self:
        """Make a run whose parameters are any values, and whose `metrics` have no step."""
        texts = {name: str(value) for name, value in params.items()}
        return cls(params=texts, points=[*without_step(metrics or {}), *points], **fields)

    @classmethod
    def stored(
        cls, workspace: Workspace, kind: str, key: str, parent: str | None = None
    ) -> Self | None:
        """Return a run as a workspace holds it; None if it holds none, or a damaged one."""
        with suppress(UserError):
            return cls.read(tracked_path(workspace, kind, key, parent))
        return None

    @property
    def identity(self) -> tuple[str, str, str | None]:
        """Kind, key and parent, by which the run is found."""
        return self.kind, self.key, self.parent

    def path(self, workspace: Workspace) -> Path:
        """Return the run's file in a workspace."""
        return tracked_path(workspace, *self.identity)

    def is_stored(self, workspace: Workspace) -> bool:
        """Return whether a workspace holds this run as it is, which MLflow shows or was sent."""
        path = self.path(workspace)
        with suppress(UserError):
            stored = type(self).read(path)
            return stored is not None and stored.stored_at(path) == self.stored_at(path)
        return False

    def changed(self, **changes: Any) -> Self:
        """Return the run with other values; mappings and points are added to those that it has."""
        for name in {"tags", "files", "texts", "views"} & changes.keys():
            changes[name] = {**getattr(self, name), **changes[name]}
        if "points" in changes:
            replaced = {(name, step) for name, _, step in changes["points"]}
            unchanged = [point for point in self.points if (point[0], point[2]) not in replaced]
            changes["points"] = [*unchanged, *changes["points"]]
        return self.model_copy(update=changes)


class RegisteredModel(Record):
    """A version of a registered model: an exported folder, stored with a logged model."""

    name: str
    """Name of the registered model."""
    alias: str
    """Name that points to this version of the model."""
    run: tuple[str, str, str | None]
    """Identity of the `TrackedRun` that made or measured the model."""
    model: TrackedModel
    """The same model of the same run is the same version."""
    folder: WorkspacePath
    """The exported model."""
    note: str = ""
    tags: dict[str, str] = Field(default_factory=dict)

    def path(self, workspace: Workspace) -> Path:
        """Return the version's file in a workspace; the alias's next version replaces it."""
        return workspace.tracked / "registered" / f"{self.name}@{self.alias}.json"


def tracked_path(workspace: Workspace, kind: str, key: str, parent: str | None) -> Path:
    """Return the file of a run, by its identity."""
    return workspace.tracked / (parent or "") / f"{kind}-{key}.json"


def without_step(values: Mapping[str, float]) -> list[tuple[str, float, int]]:
    """Return metrics that belong to no step as points."""
    return [(name, float(value), 0) for name, value in values.items()]


def status_after(error: BaseException | None) -> RunStatus:
    """Return a run's final status: KILLED after an interruption, FAILED, or FINISHED."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED"


def reason_tags(status: str, reason: str) -> dict[str, str]:
    """Return the tags that show why a run has no result, also at the top of its page.

    Without a reason, they delete that of an earlier end.
    """
    note = f"{reason[:1].upper()}{reason[1:]}"
    if status == "FAILED" and reason:
        note = f"**Failed:** {note}"
    return {REASON_TAG: reason, NOTE_TAG: note}


def tag_filter(tags: Mapping[str, str]) -> str:
    """Return a search expression for runs with all of the tags, whose values are names or keys."""
    return " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
