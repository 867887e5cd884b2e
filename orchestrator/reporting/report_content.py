"""Content of a report, from which all of its files are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from iiet.influence import InfluenceTable
from orchestrator.records.trial import Trial
from orchestrator.reporting.elastic_section import ElasticSection
from orchestrator.reporting.findings import findings
from orchestrator.reporting.pareto import Front
from orchestrator.reporting.results import result_table

Curve = tuple[str, Sequence[tuple[int, float]]]
"""A name and its points: step and value."""


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """Content of a report."""

    name: str
    front: Front
    influence: InfluenceTable | None = None
    """The teacher's influence table, if the sweep has one."""
    curves: Mapping[str, Sequence[Curve]] = field(default_factory=dict)
    """Title of a chart -> its curves over steps."""
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Title of a list -> names and values, such as settings and provenance."""
    notes: Sequence[str] = ()
    """Sentences to read before the findings, such as that the tasks differ."""
    elastic: ElasticSection | None = None
    """Elastic weights against separate students, if the sweep has both."""
    mark_paper: bool = True
    """Whether the picture marks the paper's headline."""

    @property
    def sentences(self) -> list[str]:
        """The notes and the findings."""
        return [*self.notes, *findings(self.front)]

    def stored_at(self, folder: Path) -> SweepReport:
        """Return the report for files in a folder: paths in its workspace are relative."""
        front = self.front
        stored = (Trial.model_validate(trial.stored_at(folder)) for trial in front.table["trial"])
        table = result_table(stored)
        if front.sweep_of:
            table["sweep"] = front.table["sweep"]
        return replace(self, front=front.with_table(table))

    @property
    def title(self) -> str:
        """Heading of picture and page."""
        return f"Sweeps {self.name}" if self.front.sweep_of else f"Sweep {self.name}"
