"""What MLflow shows of one measurement, kept as a file, so that `sync` can send it again.

An evaluation, a benchmark and an influence table are such measurements. Trainings and sweeps need
no file of this kind: their journals and results hold all that their runs show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, SerializationInfo

from orchestrator.records.record import Record, WorkspacePath
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import portable_path


def _portable(texts: dict[str, str], info: SerializationInfo) -> dict[str, str]:
    return {name: portable_path(text, info.context) for name, text in texts.items()}


Texts = Annotated[dict[str, str], PlainSerializer(_portable)]
"""Texts by name; those that are paths in a workspace are stored relative to its root."""


class TrackedModel(Record):
    """A model that is logged with the runs that made and measured it."""

    key: str
    """Of its weights and its schedule."""
    name: str
    params: Texts
    datasets: dict[str, tuple[str, str] | None]
    """The metrics that describe the model -> name and digest of the data that they were measured
    on; None for costs, which need no data."""


class Measurement(Record):
    """One measurement as MLflow shows it."""

    key: str
    """Of what was measured, and how."""
    kind: Literal["evaluation", "benchmark", "influence"]
    name: str
    """Name of the run."""
    params: Texts
    points: list[tuple[str, float, int]]
    """Name, value and step of each metric."""
    dataset: tuple[str, str, dict[str, Any]] | None = None
    """Name, digest and profile of the data that it read."""
    files: list[WorkspacePath] = Field(default_factory=list)
    """Pictures and tables, as far as they exist."""
    model: TrackedModel | None = None
    """What was measured, if its metrics belong to a logged model."""
    ended_ms: int = Field(default_factory=now_ms)
    """When it ended, in ms."""

    @classmethod
    def of(
        cls,
        *,
        params: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        points: Sequence[tuple[str, float, int]] = (),
        **fields: Any,
    ) -> Self:
        """Make a measurement whose parameters are any values, and whose `metrics` have no step."""
        texts = {name: str(value) for name, value in params.items()}
        without_step = [(name, float(value), 0) for name, value in (metrics or {}).items()]
        return cls(params=texts, points=[*without_step, *points], **fields)

    def path(self, folder: Path) -> Path:
        """Return its file in a folder of measurements; a new one with its key replaces it."""
        return folder / f"{self.kind}-{self.key}.json"
