"""What other packages add to this program: methods, influence metrics, tasks, sources, loggers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from iiet.extensions import ExtensionError, ExtensionTable, package_of
from iiet.influence_metrics import INFLUENCE_METRICS
from iiet.methods import METHODS
from orchestrator.data.text_source import DATA_SOURCES
from orchestrator.evaluation.python_tasks import TASKS
from orchestrator.tracking.log_mirror import LOGGERS

EXTENSION_POINTS: tuple[ExtensionTable[Any], ...] = (
    METHODS,
    INFLUENCE_METRICS,
    TASKS,
    DATA_SOURCES,
    LOGGERS,
)
"""All tables to which packages add."""


@dataclass(frozen=True, kw_only=True)
class InstalledExtension:
    """One entry point of another package."""

    kind: str
    """What it is, such as `method`."""
    name: str
    package: str
    """Name and version of the package."""
    problem: str | None
    """Why it cannot be used, as a sentence; None if it can."""


def installed_extensions() -> Iterator[InstalledExtension]:
    """Yield what other packages add, by kind and name; all of it is imported."""
    for table in EXTENSION_POINTS:
        for entry in sorted(table.names.entry_points(), key=lambda entry: entry.name):
            problem = None
            try:
                table[entry.name]
            except ExtensionError as error:
                problem = str(error)
            yield InstalledExtension(
                kind=table.names.kind, name=entry.name, package=package_of(entry), problem=problem
            )
