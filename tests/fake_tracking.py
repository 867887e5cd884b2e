"""Stands for MLflow in tests: remembers the runs that it gets, and stores nothing."""

from __future__ import annotations

from pathlib import Path

import yaml

from orchestrator.pipelines.context import Context
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.settings import SETTINGS_NAME
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import Workspace


class FakeTracking:
    """Remembers the runs that it gets, in place of MLflow's tracking."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str, str | None], TrackedRun] = {}
        """The last state of each run."""
        self.published: list[TrackedRun] = []
        self.statuses: list[tuple[str, str]] = []
        """Kinds and final statuses of runs, as they ended."""

    def publish(self, *runs: TrackedRun) -> None:
        for run in runs:
            self.runs[run.identity] = run
            self.published.append(run)
            assert run.dataset is None or run.dataset[2]["source"]
            assert all(isinstance(value, int | float) for _, value, _ in run.points)
            if SETTINGS_NAME in run.texts:
                assert yaml.safe_load(run.texts[SETTINGS_NAME])["training"]
            if run.model:
                assert Path(run.model.params["checkpoint"]).is_dir()
            if run.status != "RUNNING":
                self.statuses.append((run.kind, run.status))

    def stored(self, kind: str, key: str, parent: str | None = None) -> TrackedRun | None:
        return self.runs.get((kind, key, parent))

    def withdraw(self, kind: str, key: str) -> None:
        self.runs.pop((kind, key, None), None)

    def run_id(self, run: TrackedRun) -> str:
        return f"run of {run.key}"

    def wait(self, *, briefly: bool = False) -> None:
        pass


def untracked(workspace: Workspace, progress: Progress | None = None) -> Context:
    """Return a context whose tracking stores nothing."""
    return Context(workspace, progress, tracking=FakeTracking())
