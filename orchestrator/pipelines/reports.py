"""Write the report of one sweep, or of several on one front, from stored results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from orchestrator.pipelines.context import open_context
from orchestrator.reporting.elastic_section import ElasticSection
from orchestrator.reporting.front_axes import parse_axes
from orchestrator.reporting.front_data import front_rows, front_values
from orchestrator.reporting.overlay_report import write_overlay_report
from orchestrator.reporting.pareto import Front
from orchestrator.reporting.report_files import WrittenReport
from orchestrator.reporting.sweep_report import write_sweep_report
from orchestrator.reporting.sweep_results import load_sweep_results, newest_sweep
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import Workspace


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """The front of one sweep or several, and the files of its report."""

    title: str
    """Heading of the report."""
    front: Front
    """Every model with its place."""
    sentences: tuple[str, ...]
    """Notes on how to read the front, then its findings."""
    elastic: ElasticSection | None
    """Elastic weights against separate students; None if the sweep has not both."""
    workspace: Path
    """The workspace that it is of."""
    folder: Path
    """Folder of the report's files."""
    page: Path | None
    """The HTML page; None if no model could be placed."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row per model: cost, quality, place on the front, checkpoint."""
        return pandas.DataFrame(front_rows(self.front))

    def to_json(self) -> dict[str, Any]:
        """Return title, sentences and files, and what `front.json` holds."""
        return {
            "title": self.title,
            "sentences": list(self.sentences),
            "folder": str(self.folder),
            "page": self.page and str(self.page),
            **front_values(self.front, self.elastic),
        }

    def shown(self) -> Any:
        """Return the front's table, what it says, and where to find more."""
        from orchestrator.reporting.front_tables import FrontTable

        yield ""
        yield FrontTable(self.front, self.title)
        yield from (f"  {sentence}" for sentence in self.sentences)
        yield ""
        # Where every model is refused, the reasons stand in the files of the report.
        if self.elastic:
            yield self.elastic.to_terminal()
            yield from (f"  {note}" for note in self.elastic.notes)
            yield ""
        if self.page:
            yield f"report: {self.page}"
        yield f"MLflow: iiet-orch ui --workspace {self.workspace}"

    def raise_failures(self) -> None:
        """Nothing that can be printed has failed."""


def report(
    *,
    workspace: Workspace | Path | str,
    sweeps: Sequence[str] = (),
    cost: str | None = None,
    quality: str | None = None,
    progress: Progress | None = None,
) -> ReportResult:
    """Write the report of one sweep, or of several sweeps on one front.

    In a workspace that can only be read, no file is written.

    Args:
        sweeps: Names of sweeps; the newest one when empty.
        cost: Cost axis: `evaluations` (the default), `flops`, `ms` or `kv`.
        quality: Quality axis: `accuracy` (the default), `bits`, `perplexity` or `loss`.

    Raises:
        UserError: If there is no such sweep, or a cost or quality has another name.
    """
    axes = parse_axes(cost, quality)
    context = open_context(workspace, progress)
    names = list(dict.fromkeys(sweeps)) or [newest_sweep(context.workspace)]
    if len(names) > 1:
        return report_result(
            context.workspace, write_overlay_report(context.workspace, names, axes=axes)
        )
    # Loaded before MLflow's store is opened, which takes seconds: the name may be wrong.
    found = load_sweep_results(context.workspace, names[0])
    return report_result(
        context.workspace,
        write_sweep_report(
            context.workspace,
            found,
            axes=axes,
            tracking=context.tracking if context.workspace.is_writable else None,
        ),
    )


def report_result(workspace: Workspace, written: WrittenReport) -> ReportResult:
    return ReportResult(
        title=written.report.title,
        front=written.report.front,
        sentences=tuple(written.report.sentences),
        elastic=written.report.elastic,
        workspace=workspace.root,
        folder=written.folder,
        page=written.page,
    )
