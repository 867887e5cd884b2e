"""Stands for MLflow in tests: remembers what it was asked for, and stores nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from orchestrator.pipelines.context import Context
from orchestrator.records.measurement import Measurement, TrackedModel
from orchestrator.settings import SETTINGS_NAME
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import NestedRun, Tracking
from orchestrator.workspace.layout import Workspace


class FakeRun:
    """Remembers how a tracked run ended."""

    is_store_down = False

    def __init__(self, kind: str, statuses: list[tuple[str, str]]) -> None:
        self.kind, self.statuses = kind, statuses
        self.tags: dict[str, str] = {}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.tags |= tags

    def log_dataset(
        self, name: str, digest: str, profile: Mapping[str, object], *, context: str = "training"
    ) -> None:
        assert name
        assert len(digest) == 16
        assert profile["source"]

    def log_text(self, text: str, name: str) -> None:
        assert name == SETTINGS_NAME
        assert yaml.safe_load(text)["training"]

    def log_metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        assert all(isinstance(value, int | float) for value in values.values())

    def log_points(self, points: Sequence[tuple[str, float, int]]) -> None:
        assert all(isinstance(value, int | float) for _, value, _ in points)

    def log_artifact(self, path: Path, folder: str) -> None:
        assert path.is_file()

    def log_journal(self, folder: Path) -> None:
        assert folder.is_dir()

    def log_model(self, model: TrackedModel) -> None:
        assert Path(model.params["checkpoint"]).is_dir()

    def finish(self, status: str = "FINISHED", **_: Any) -> None:
        self.statuses.append((self.kind, status))


class FakeTracking:
    """Stands for MLflow: remembers what it was asked for."""

    def __init__(self) -> None:
        self.statuses: list[tuple[str, str]] = []
        self.runs: list[FakeRun] = []
        self.finished: list[str] = []
        """Keys of runs that were logged as a whole."""

    def run(self, key: str, *, kind: str, **_: Any) -> FakeRun:
        self.runs.append(FakeRun(kind, self.statuses))
        return self.runs[-1]

    def log_measurement(self, measured: Measurement) -> None:
        assert measured.points
        assert measured.dataset is None or measured.dataset[2]["source"]
        self.statuses.append((measured.kind, "FINISHED"))

    def log_nested(self, runs: Sequence[NestedRun], *, parent: FakeRun) -> None:
        assert parent in self.runs
        self.finished += [run.key for run in runs]


def untracked(workspace: Workspace, progress: Progress | None = None) -> Context:
    """Return a context whose tracking stores nothing."""
    return Context(workspace, progress, tracking=cast("Tracking", FakeTracking()))
