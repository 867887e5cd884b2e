"""What MLflow shows of a run, stored as a file: MLflow is only a view of the workspace.

Trainings, sweeps, trials, evaluations, benchmarks and influence tables are such runs. Their curves
stay in journals. From these files `Tracking.publish` makes the runs in MLflow, and `ui --sync`
makes all of them again.
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
"""Replaced by MLflow's id of the run in the texts of its tags."""
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
"""A withdrawn run is hidden, because another run shows the same."""
PRETRAIN_OF_SWEEP = "sweep_pretrain"
"""Kind of a sweep's own pretraining; its run is withdrawn when the sweep shows the model."""
DataSummary = tuple[str, str, dict[str, Any]]
"""Name, digest, and a profile with origin and sizes."""


class TrackedModel(Record):
    """A logged model of MLflow, with the runs that trained and measured it."""

    key: str
    """Hash of weights and schedule."""
    name: str
    params: Texts
    datasets: dict[str, tuple[str, str] | None]
    """Metric of the model -> name and digest of the data of its measurement; None for costs, which
    need no data."""
    is_of_sweep: bool = False
    """Whether a sweep logs the model, together with its training's run. Other runs wait for that,
    because MLflow shows the first run as the model's source."""


class TrackedRun(Record):
    """One run as MLflow shows it.

    A run is found by its kind, its key and its parent, so there is never a second one. A trial of
    two sweeps has one key and two runs, one under each parent.
    """

    key: str
    """Key of the work that the run shows."""
    kind: str
    """The tag `iiet.kind`: pretrain, distill, sweep, the role of a trial, evaluation, benchmark or
    influence."""
    name: str
    """Name for people; two runs may share it."""
    parent: str | None = None
    """Key of the sweep whose trial the run shows; None for any other run."""
    folder: WorkspacePath | None = None
    """The folder that the run describes, if any; it may have been deleted."""
    journal: WorkspacePath | None = None
    """Folder of the journal with the run's curves."""
    params: Texts = Field(default_factory=dict)
    tags: Texts = Field(default_factory=dict)
    """An empty text deletes the tag."""
    points: list[tuple[str, float, int]] = Field(default_factory=list)
    """Name, value and step of metrics without a journal."""
    dataset: DataSummary | None = None
    """The data that a training or a measurement read."""
    files: dict[str, list[WorkspacePath]] = Field(default_factory=dict)
    """Folder of artifacts -> pictures, tables and pages, as far as they exist."""
    texts: dict[str, str] = Field(default_factory=dict)
    """Path of an artifact -> its content."""
    views: dict[str, str] = Field(default_factory=dict)
    """Tags of the experiment, which hold saved chart views."""
    model: TrackedModel | None = None
    """The logged model to which the run's metrics belong, if any."""
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
        """Make a run from parameters of any type, and metrics without a step."""
        texts = {name: str(value) for name, value in params.items()}
        return cls(params=texts, points=[*without_step(metrics or {}), *points], **fields)

    @classmethod
    def stored(
        cls, workspace: Workspace, kind: str, key: str, parent: str | None = None
    ) -> Self | None:
        """Return a run as stored in a workspace; None if it is missing or damaged."""
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
        """Return whether the workspace stores this run unchanged, so that it was already sent."""
        path = self.path(workspace)
        with suppress(UserError):
            stored = type(self).read(path)
            return stored is not None and stored.stored_at(path) == self.stored_at(path)
        return False

    def changed(self, **changes: Any) -> Self:
        """Return the run with other values; mappings and points are merged with the present
        ones."""
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
    """Alias of this version."""
    run: tuple[str, str, str | None]
    """Identity of the `TrackedRun` that made or measured the model."""
    model: TrackedModel
    """The same model of the same run is the same version."""
    folder: WorkspacePath
    """The exported model."""
    note: str = ""
    tags: dict[str, str] = Field(default_factory=dict)

    def path(self, workspace: Workspace) -> Path:
        """Return the version's file in a workspace, which the next version of the alias
        replaces."""
        return workspace.tracked / "registered" / f"{self.name}@{self.alias}.json"


def tracked_path(workspace: Workspace, kind: str, key: str, parent: str | None) -> Path:
    """Return the file of a run, by its identity."""
    return workspace.tracked / (parent or "") / f"{kind}-{key}.json"


def without_step(values: Mapping[str, float]) -> list[tuple[str, float, int]]:
    """Return metrics without steps as points."""
    return [(name, float(value), 0) for name, value in values.items()]


def status_after(error: BaseException | None) -> RunStatus:
    """Return a run's final status: KILLED after an interruption, FAILED, or FINISHED."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED"


def reason_tags(status: str, reason: str) -> dict[str, str]:
    """Return the tags that show why a run has no result, also at the top of its page.

    Without a reason, they delete an earlier one.
    """
    note = f"{reason[:1].upper()}{reason[1:]}"
    if status == "FAILED" and reason:
        note = f"**Failed:** {note}"
    return {REASON_TAG: reason, NOTE_TAG: note}


def tag_filter(tags: Mapping[str, str]) -> str:
    """Return a search expression for runs with all of the tags, whose values are names or keys."""
    return " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
