"""All files of a report, written from one value: pictures, page, tables, data.

`front.png` and `front.svg` for papers, `front.html` for browsing (one file, no network), `front.md`
for a paper's appendix, `front.csv` and `front.json` for machines, `influence.png` and
`influence.svg`. Each is replaced as a whole; the same results give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from iiet.influence import InfluenceTable
from orchestrator.reporting.figure_style import save_figure
from orchestrator.reporting.findings import findings
from orchestrator.reporting.front_data import front_csv, front_json
from orchestrator.reporting.front_figure import draw_front
from orchestrator.reporting.front_tables import (
    TASK_TABLES_NOTE,
    markdown_table,
    task_table_markdown,
    task_tables,
)
from orchestrator.reporting.front_text import hypervolume_text, model_name
from orchestrator.reporting.html_page import Curve, render_page
from orchestrator.reporting.influence_figure import draw_influence
from orchestrator.reporting.influence_tables import influence_markdown
from orchestrator.reporting.pareto import Front
from orchestrator.workspace.files import write_text


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """What a report tells."""

    name: str
    """The sweep's name."""
    front: Front
    """Its results, placed."""
    influence: InfluenceTable | None = None
    """The teacher's influence table, if the sweep had one."""
    curves: Mapping[str, Sequence[Curve]] = field(default_factory=dict)
    """Title of a chart -> its curves over steps."""
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Title of a list -> names and values: settings, provenance, what was reused."""
    notes: Sequence[str] = ()
    """What has to be known before the front is read, such as different tasks."""
    mark_paper: bool = True
    """Whether the picture marks the paper's headline."""

    @property
    def sentences(self) -> list[str]:
        """What the front says, after what has to be known."""
        return [*self.notes, *findings(self.front)]

    @property
    def title(self) -> str:
        """Heading of picture and page."""
        return f"Sweeps {self.name}" if self.front.sweep_of else f"Sweep {self.name}"


@dataclass(frozen=True)
class WrittenReport:
    """Where a report lies."""

    report: SweepReport
    """What it tells; its front is what the terminal's table shows."""
    folder: Path
    """Where its files are."""
    files: tuple[Path, ...]
    """Every file written."""
    run_id: str | None = None
    """The sweep's run in MLflow; None without tracking, or while the store does not answer."""
    view: str | None = None
    """Key of the saved chart view."""

    @property
    def page(self) -> Path | None:
        """The HTML file; None if nothing could be placed."""
        return next((path for path in self.files if path.suffix == ".html"), None)


def write_report_files(report: SweepReport, folder: Path) -> list[Path]:
    """Write all files of a report.

    Returns:
        The files, pictures first. Without any placed result there is no front to draw, and the
        pictures and the page are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    if report.influence is not None and any(report.influence.rows()):
        paths += save_figure(influence_picture(report), folder / "influence")
    if report.front.points:
        picture = draw_front(report.front, title=report.title, mark_paper=report.mark_paper)
        paths += save_figure(picture, folder / "front")
        svg = (folder / "front.svg").read_text(encoding="utf-8")
        paths.append(_write(folder / "front.html", report_page(report, svg)))
    paths.append(_write(folder / "front.md", report_markdown(report)))
    paths.append(_write(folder / "front.csv", front_csv(report.front)))
    paths.append(_write(folder / "front.json", front_json(report.front) + "\n"))
    return paths


def influence_picture(report: SweepReport) -> Figure:
    """Draw the teacher's influence table, with a line where the front's knee cuts it."""
    assert report.influence is not None, "only a sweep with an influence table has this picture"
    knee = report.front.knee
    fits = knee is not None and knee.result.schedule is not None
    return draw_influence(
        report.influence.rows(),
        metric=report.influence.metric,
        title="Influence of each correction",
        kept=knee.result.schedule if knee is not None and fits else None,
        kept_name=f"{model_name(knee)} (knee)" if knee is not None else "",
    )


def report_page(report: SweepReport, picture: str | None = None) -> str:
    """Return the report as one HTML file.

    Args:
        report: What to tell.
        picture: The front as SVG text, for readers without scripts.
    """
    table = report.influence
    return render_page(
        report.front,
        title=report.title,
        sentences=report.sentences,
        mark_paper=report.mark_paper,
        influence=None if table is None else (table.metric, table.rows()),
        curves=report.curves,
        facts=report.facts,
        picture=picture,
    )


def report_markdown(report: SweepReport) -> str:
    """Return the report as Markdown: findings, table, tasks, influence, facts."""
    parts = [f"# {report.title}", _bullets(report.sentences)]
    if report.front.points:
        volume = hypervolume_text(report.front)
        parts += ["![front](front.png)", volume and f"Of the front: {volume}."]
        parts.append(markdown_table(report.front))
    tables = task_tables(report.front)
    if tables:
        parts.append(f"## Task by task\n\n{TASK_TABLES_NOTE}")
    for table in tables:
        parts += [f"### {table.title}", task_table_markdown(table)]
    if report.influence is not None:
        parts += [
            f"## Influence of each correction ({report.influence.metric})",
            influence_markdown(report.influence),
        ]
    for title, values in report.facts.items():
        parts += [f"## {title}", _bullets([f"{name}: {value}" for name, value in values.items()])]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _write(path: Path, text: str) -> Path:
    write_text(path, text)
    return path
