"""The report of a sweep, or of several on one front: its sections and its files.

`front.png` and `front.svg` for papers, `front.html` for browsing, `front.md` for an appendix,
`front.csv` and `front.json` for programs, `influence.png` and `influence.svg`. The same results
give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iiet.influence import InfluenceTable
from orchestrator.reporting.charts import (
    PAPER_COST_SHARE,
    PAPER_QUALITY_SHARE,
    Spec,
    curves_chart,
    front_chart,
    influence_chart,
    save_chart,
)
from orchestrator.reporting.command_tables import influence_table
from orchestrator.reporting.findings import findings
from orchestrator.reporting.front import (
    Front,
)
from orchestrator.reporting.sections import (
    Section,
    render_json,
    render_markdown,
    render_page,
)
from orchestrator.reporting.tables import (
    TASK_TABLES_NOTE,
    front_values,
    hypervolume_text,
    model_table,
    models_table,
    task_tables,
)
from orchestrator.reporting.training_curves import (
    Curve,
)
from orchestrator.workspace.files import json_text, write_text

LEGEND = (
    "Star: full model. Filled: on the front. Hollow and faint: dominated. Diamond: baseline. "
    "Bars: one standard error. Line: the best quality at each cost budget."
    f" Cross: the paper's headline, {1 - PAPER_COST_SHARE:.0%} less cost at "
    f"{PAPER_QUALITY_SHARE:.1%} of the accuracy, on this full model."
)
INFLUENCE_LEGEND = (
    "How much each correction matters, on a logarithmic scale. A threshold drops corrections from "
    "a layer's last one backwards."
)


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
    elastic: Section | None = None
    """Elastic weights against separate students, if the sweep has both."""

    @property
    def sentences(self) -> list[str]:
        """The notes and the findings."""
        return [*self.notes, *findings(self.front)]

    @property
    def title(self) -> str:
        """Heading of picture and page."""
        return f"Sweeps {self.name}" if self.front.sweeps else f"Sweep {self.name}"

    def front_chart(self) -> Spec:
        """Return the chart of the front."""
        return front_chart(self.front, title=self.title, mark_paper=True)

    def brief(self) -> list[Section]:
        """Return what a terminal shows: the front and its findings, and elastic weights."""
        table = models_table(self.front, self.title)
        front = Section(tables=[table], notes=self.sentences, data=front_values(self.front))
        return [front, *([self.elastic] if self.elastic else [])]

    def sections(self, folder: Path | None = None) -> list[Section]:
        """Return all sections; for files in a `folder`, paths in its workspace are relative."""
        front = self.front
        found = [Section(notes=self.sentences)]
        if front.rows:
            volume = hypervolume_text(front)
            counts = f"{len(front.rows)} models, {len(front.members)} on the front"
            sentences = [f"{counts}; {volume}." if volume else f"{counts}.", LEGEND]
            chart = self.front_chart()
            found.append(
                Section(title="The front", sentences=sentences, chart=chart, picture="front")
            )
        models, data = models_table(front), front_values(front, folder)
        found.append(Section(title="All models, cheapest first", tables=[models], data=data))
        if tasks := task_tables(front):
            found.append(Section(title="Task by task", sentences=[TASK_TABLES_NOTE], tables=tasks))
        if self.elastic is not None:
            found.append(self.elastic)
        if self.influence is not None and any(self.influence.rows()):
            found.append(_influence_section(self.influence, front))
        for title, curves in self.curves.items():
            found.append(Section(title=title, chart=curves_chart(title, curves)))
        return found + [Section(title=title, facts=facts) for title, facts in self.facts.items()]

    def write_files(self, folder: Path) -> list[Path]:
        """Write all files and return them; no picture and no page if the front has no model."""
        folder.mkdir(parents=True, exist_ok=True)
        sections = self.sections(folder)
        paths = [
            path
            for section in sections
            if section.picture and section.chart
            for path in save_chart(dict(section.chart), folder / section.picture)
        ]
        models = model_table(self.front, folder)
        texts = {
            **({"front.html": render_page(self.title, sections)} if self.front.rows else {}),
            "front.md": render_markdown(self.title, sections),
            "front.csv": models.to_csv(index=False, lineterminator="\n"),
            "front.json": json_text(render_json(sections), allow_nan=False) + "\n",
        }
        for name, text in texts.items():
            write_text(folder / name, text)
            paths.append(folder / name)
        return paths


def _influence_section(table: InfluenceTable, front: Front) -> Section:
    knee = front.knee
    chart = influence_chart(
        table.rows(),
        metric=table.metric,
        title="Influence of each correction",
        kept=None if knee is None else knee["trial"].schedule,
        kept_name="" if knee is None else f"{knee['label']} (knee)",
    )
    return Section(
        title=f"Influence of each correction ({table.metric})",
        sentences=[INFLUENCE_LEGEND],
        chart=chart,
        picture="influence",
        tables=[influence_table(table)],
    )


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
