"""What stored results show: reports of one or several sweeps, and the paper's claims.

Everything is read from the folders of finished sweeps, and only times are measured again if that
is asked for. The results are what `sweep`
returns, too: a front, its sentences, and the files of its page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.result import Result
from orchestrator.records.trial import SweepTrials
from orchestrator.reporting.claims import claims_section
from orchestrator.reporting.front import FrontAxes, parse_axes, reason_against_accuracy
from orchestrator.reporting.results import StoredSweep, load_sweep_results, newest_sweep
from orchestrator.reporting.sections import Section, render_json, render_terminal
from orchestrator.reporting.tables import model_rows
from orchestrator.settings import SETTINGS_NAME, read_settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import PLAN_FILE, Workspace, find_workspace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.reporting.sweep_report import SweepReport


class ReportResult(Result):
    """The front of one sweep or several, and the files of its report."""

    title: str
    """Heading of the report."""
    front: Any = Field(exclude=True)
    """A `Front`: every model with its place."""
    sentences: tuple[str, ...]
    """Notes on how to read the front, then its findings."""
    sections: tuple[Section, ...] = Field(exclude=True)
    """What a terminal shows, and JSON holds."""
    folder: Path
    """Folder of the report's files."""
    page: Path | None
    """The HTML page; None if no model could be placed."""
    workspace: Path = Field(exclude=True)

    @classmethod
    def of(cls, report: SweepReport, workspace: Workspace, **more: Any) -> Self:
        """Return a report that was written."""
        names = ("title", "front", "sentences", "folder", "page")
        own = {name: getattr(report, name) for name in names}
        return cls(**own, sections=tuple(report.brief()), workspace=workspace.root, **more)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per model: cost, quality, place on the front, checkpoint."""
        return model_rows(self.front)

    def to_json(self) -> dict[str, Any]:
        """Return title, sentences and files, and what `front.json` holds.

        Keys:
            title: data, model, tokens and date of the sweep, or its name
            sentences: what the front says, the most important first
            folder: the report's files
            page: its HTML page, or `null` if no model could be placed
            axes: tracked names of the `cost` and the `quality`
            results: one entry per model: `name`, `role` (`trial`, `teacher`, `baseline`), `method`,
                `schedule` (as text), `threshold`, `on_front`, `verdict`, `share_of_full`, every
                metric by its name, `key`, `checkpoint`, `run_id`, `details`
            front: keys of the models on the front, from the cheapest
            picks: `best`, `knee` and `cheapest`, each the key of a model
            hypervolume: of the front, or `null`
            hypervolume_box: the box that it is relative to
            confidence_basis: what the confidences were computed from, or `null`
            claims: (optional) the paper's claims, if one was measured; as of `report --claims`
        """
        return {**super().to_json(), **render_json(self.sections)}

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the front as a picture, and what a terminal does."""
        picture = self.folder / "front.svg"
        drawn = picture.read_text("utf-8") if picture.is_file() else ""
        return f"<div>{drawn}</div>{super()._repr_html_()}"

    def shown(self) -> Iterable[RenderableType]:
        yield ""
        yield from render_terminal(self.sections)
        if self.page:
            yield f"report: {self.page}"
        yield f"MLflow: iiet-orch ui --workspace {self.workspace}"


def report(
    *,
    workspace: Workspace | Path | str | None = None,
    sweeps: Sequence[str] = (),
    cost: str | None = None,
    quality: str | None = None,
    time_again: bool = False,
    progress: Progress | None = None,
) -> ReportResult:
    """Write the report of one sweep, or of several sweeps on one front, from stored results.

    In a workspace that can only be read, no file is written.

    Args:
        sweeps: Names of sweeps; the newest one when empty.
        cost: Cost axis: `evaluations` (the default), `flops`, `ms`, `kv` or `served_ms`.
        quality: Quality axis: `accuracy`, `bits`, `perplexity` or `loss`. The default is
            `accuracy`, or `bits` where the full model has fewer than 30 right answers.
        time_again: Measure the time per token of the sweep's models once more, and store it.

    Raises:
        UserError: If there is no such sweep, or a cost or quality has another name; or if the times
            of these sweeps cannot be measured here.
    """
    from orchestrator.reporting.report import write_sweep_report  # Imports vl-convert.

    parse_axes(cost, quality)  # A wrong name comes before anything is read.
    context = open_context(workspace, progress)
    space = context.workspace
    names = dict.fromkeys(sweeps or [newest_sweep(space)])
    found = [load_sweep_results(space, name) for name in names]
    if time_again:
        found = [_timed_again(found, context)]
    trials = [trial for sweep in found for trial in sweep.results]
    axes = parse_axes(cost, quality, against_accuracy=reason_against_accuracy(space, trials))
    tracking = (lambda: context.tracking) if space.is_writable and len(found) == 1 else None
    return ReportResult.of(write_sweep_report(space, *found, axes=axes, tracking=tracking), space)


def _timed_again(sweeps: Sequence[StoredSweep], context: Context) -> StoredSweep:
    """Return a sweep with times per token that are measured now, where its trials ran."""
    from orchestrator.sweeping.costs import TIMES_NAME, with_costs  # Imports PyTorch.

    space = context.workspace
    if len(sweeps) > 1:
        raise UserError(f"--time-again measures one sweep; got {len(sweeps)}")
    [sweep] = sweeps
    if not space.is_writable:
        raise UserError(f"--time-again: {space.root} cannot be written, so no time could be stored")
    folder = sweep.folder(space)
    plan = SweepTrials.read(folder / PLAN_FILE)
    if plan is None:  # Sweeps of kind `depth` have none.
        raise UserError(
            f"--time-again: {sweep.name} has no {PLAN_FILE}; delete {folder / TIMES_NAME}, and "
            "type the sweep's command again, which then measures the times alone"
        )
    settings = read_settings(folder / SETTINGS_NAME)
    results = with_costs(sweep.results, plan, folder, settings, context.progress, again=True)
    return sweep.model_copy(update={"results": tuple(results)})


class ClaimsResult(Result):
    """What sweeps show of the paper's claims."""

    row_key = "claims"

    title: str
    """The sweeps."""
    notes: tuple[str, ...]
    """Notes on how to read the results."""
    claims: list[dict[str, Any]]
    """A row for each claim: `number`, `key`, `text`, `paper` (its number, points of accuracy or
    percent of overhead), `verdict` (`holds`, `does not hold`, `not decided`, `not measured`),
    `here` (in the paper's unit), `low` and `high` (the 95% interval; of claim 3, that of the share
    of the teacher's accuracy that is kept, in percent), `about` (the models that are compared, or
    what is missing)."""
    section: Section = Field(exclude=True)
    """What a terminal shows."""

    def shown(self) -> Iterable[RenderableType]:
        yield ""
        yield from render_terminal([self.section])
        yield from (f"  {note}" for note in self.notes)


def claims(
    *,
    workspace: Workspace | Path | str | None = None,
    sweeps: Sequence[str] = (),
    progress: Progress | None = None,  # noqa: ARG001 - as all pipelines
) -> ClaimsResult:
    """Return what sweeps show of the paper's five claims; nothing is written.

    Args:
        sweeps: Names of sweeps, several on one front; the newest one when empty.

    Raises:
        UserError: If there is no such sweep.
    """
    from orchestrator.reporting.claims import find_claims
    from orchestrator.reporting.front import sweep_front
    from orchestrator.reporting.results import suite_notes

    space = find_workspace(workspace)
    names = dict.fromkeys(sweeps or [newest_sweep(space)])
    found = [load_sweep_results(space, name) for name in names]
    front, notes = sweep_front(space, found, FrontAxes())
    title = f"Claims of the paper in {' + '.join(names)}"
    section = claims_section(find_claims(front), title)
    return ClaimsResult(
        title=title,
        notes=(*(suite_notes(found) if len(found) > 1 else ()), *notes),
        claims=section.data["claims"],
        section=section,
    )
