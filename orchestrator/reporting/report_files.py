"""The files of a report, all written from one `SweepReport`.

`front.png` and `front.svg` for papers, `front.html` for browsing, `front.md` for an appendix,
`front.csv` and `front.json` for programs, `influence.png` and `influence.svg`. The same results
give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.reporting.charts import front_chart, influence_chart, save_chart
from orchestrator.reporting.command_tables import influence_markdown
from orchestrator.reporting.elastic_section import ELASTIC_TITLE
from orchestrator.reporting.front_data import front_values, model_table
from orchestrator.reporting.front_tables import TASK_TABLES_NOTE, front_markdown, task_tables
from orchestrator.reporting.front_text import hypervolume_text, model_name
from orchestrator.reporting.html_page import render_page
from orchestrator.reporting.markdown import bullets
from orchestrator.reporting.report_content import SweepReport
from orchestrator.workspace.files import json_text, write_text


@dataclass(frozen=True)
class WrittenReport:
    """A report and where it was written."""

    report: SweepReport
    folder: Path
    files: tuple[Path, ...]
    run_id: str | None = None
    """The sweep's run in MLflow; None without tracking, or while the store does not answer."""

    @property
    def page(self) -> Path | None:
        """The HTML file; None if no result is on the front's axes."""
        return next((path for path in self.files if path.suffix == ".html"), None)


def write_report_files(report: SweepReport, folder: Path) -> list[Path]:
    """Write all files of a report and return them; no picture or page if the front has no point."""
    report = report.stored_at(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    texts = {}
    if report.influence is not None and any(report.influence.rows()):
        knee = report.front.knee
        chart = influence_chart(
            report.influence.rows(),
            metric=report.influence.metric,
            title="Influence of each correction",
            kept=knee.result.schedule if knee is not None else None,
            kept_name=f"{model_name(knee)} (knee)" if knee is not None else "",
        )
        paths += save_chart(chart, folder / "influence")
    if report.front.points:
        chart = front_chart(report.front, title=report.title, mark_paper=report.mark_paper)
        paths += save_chart(chart, folder / "front")
        texts["front.html"] = render_page(report, picture=(folder / "front.svg").read_text("utf-8"))
    texts["front.md"] = report_markdown(report)
    texts["front.csv"] = model_table(report.front).to_csv(index=False, lineterminator="\n")
    values = front_values(report.front, report.elastic)
    texts["front.json"] = json_text(values, allow_nan=False) + "\n"
    for name, text in texts.items():
        write_text(folder / name, text)
        paths.append(folder / name)
    return paths


def report_markdown(report: SweepReport) -> str:
    """Return the whole report as Markdown."""
    parts = [f"# {report.title}", bullets(report.sentences)]
    if report.front.points:
        volume = hypervolume_text(report.front)
        parts += ["![front](front.png)", volume and f"Of the front: {volume}."]
        parts.append(front_markdown(report.front))
    tables = task_tables(report.front)
    if tables:
        parts.append(f"## Task by task\n\n{TASK_TABLES_NOTE}")
    for table in tables:
        parts += [f"### {table.title}", table.to_markdown()]
    if report.elastic is not None:
        parts += [f"## {ELASTIC_TITLE}", report.elastic.to_markdown()]
    if report.influence is not None:
        parts += [
            f"## Influence of each correction ({report.influence.metric})",
            influence_markdown(report.influence),
        ]
    for title, values in report.facts.items():
        parts += [f"## {title}", bullets(f"{name}: {value}" for name, value in values.items())]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"
