"""The content of a report: its sections, and the files that are made of them.

`front.png` and `front.svg` for papers, `front.html` for browsing, `front.csv` and `front.json` for
programs, `influence.png` and `influence.svg`. The same results give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from iiet.pruning import InfluenceTable
from orchestrator.reporting.charts import curves_chart, front_chart, influence_chart, save_chart
from orchestrator.reporting.claims import (
    CLAIMS_TITLE,
    PAPER_KEPT_SHARE,
    PAPER_OVERHEAD_SHARE,
    Claim,
    claims_section,
)
from orchestrator.reporting.command_tables import influence_table
from orchestrator.reporting.findings import confidence_note, findings
from orchestrator.reporting.front import Front
from orchestrator.reporting.results import Curve
from orchestrator.reporting.sections import Section, render_json, render_page
from orchestrator.reporting.tables import (
    TASK_TABLES_NOTE,
    front_values,
    model_table,
    models_table,
    task_tables,
)
from orchestrator.workspace.files import json_text, write_text

LEGEND = (
    "Star: full model. Filled: on the front. Hollow and faint: dominated. Diamond: baseline. "
    "Bars: one standard error. Line: the best quality at each cost budget."
    f" Cross: the paper's headline, {1 - PAPER_OVERHEAD_SHARE:.0%} less overhead (cost beyond "
    f"vanilla of the same shape) at {PAPER_KEPT_SHARE:.1%} of the accuracy, on this full model."
)
INFLUENCE_LEGEND = (
    "How much each correction matters, on a logarithmic scale. A threshold drops corrections from "
    "a layer's last one backwards."
)


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """Content of a report, and its files."""

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
    depths: Section | None = None
    """The depth curves of a sweep of kind `depth`."""
    about: str = ""
    """What was trained: data, model, tokens and date."""
    claims: Sequence[Claim] = ()
    """The paper's claims, if the models say anything of one."""
    folder: Path = Path()
    files: Sequence[Path] = ()
    """What was written to the folder; nothing in a workspace that can only be read."""

    @property
    def page(self) -> Path | None:
        """The HTML file; None if no result is on the front's axes."""
        return next((path for path in self.files if path.suffix == ".html"), None)

    @property
    def sentences(self) -> list[str]:
        """What the front says in one sentence, the notes, then the other findings."""
        first, *more = findings(self.front)
        return [first, *self.notes, *more]

    @property
    def title(self) -> str:
        """Heading of picture and page."""
        return self.about or self._name

    @property
    def _name(self) -> str:
        return f"Sweeps {self.name}" if self.front.sweeps else f"Sweep {self.name}"

    def brief(self) -> list[Section]:
        """Return what a terminal shows: the front and its findings, claims."""
        table = models_table(self.front, self.title)
        front = Section(tables=[table], notes=self.sentences, data=front_values(self.front))
        return [front, claims_section(self.claims, CLAIMS_TITLE)] if self.claims else [front]

    def sections(self, folder: Path | None = None) -> list[Section]:
        """Return all sections; for files in a `folder`, paths in its workspace are relative."""
        front, influence, knee = self.front, self.influence, self.front.picks.get("knee")
        first, *more = self.sentences
        counts = f"{len(front.rows)} models, {len(front.members)} on the front"
        found = [Section(sentences=[first, f"{self._name}: {counts}."])]
        if front.rows:
            chart = front_chart(front, title=self.title, mark_paper=True)
            explanations = [LEGEND, *confidence_note(front)]
            found.append(
                Section(chart=chart, picture="front", notes=more, explanations=explanations)
            )
        else:
            found.append(Section(notes=more))
        if self.depths:
            found.append(self.depths)
        if self.claims:
            found.append(claims_section(self.claims))
        models, data = models_table(front), front_values(front, folder)
        found.append(Section(title="All models, cheapest first", tables=[models], data=data))
        folded = []
        if tasks := task_tables(front):
            note = [TASK_TABLES_NOTE]
            folded.append(Section(title="Task by task", tables=tasks, explanations=note))
        if influence is not None and any(influence.rows()):
            chart = influence_chart(
                influence.rows(),
                metric=influence.metric,
                title="Influence of each correction",
                kept=knee["trial"].schedule if knee else None,
                kept_name=f"{knee['label']} (knee)" if knee else "",
            )
            folded.append(
                Section(
                    title=f"Influence of each correction ({influence.metric})",
                    sentences=[INFLUENCE_LEGEND],
                    chart=chart,
                    picture="influence",
                    tables=[influence_table(influence)],
                )
            )
        folded += [
            Section(title=title, chart=curves_chart(title, curves))
            for title, curves in self.curves.items()
        ]
        folded += [Section(title=title, facts=facts) for title, facts in self.facts.items()]
        return found + [replace(section, is_folded=True) for section in folded]

    def written(self, folder: Path) -> SweepReport:
        """Write all files and return the report with them.

        There is no picture and no page if the front has no model.
        """
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
            "front.csv": models.to_csv(index=False, lineterminator="\n"),
            "front.json": json_text(render_json(sections), allow_nan=False) + "\n",
        }
        for name, text in texts.items():
            write_text(folder / name, text)
        return replace(self, files=(*paths, *(folder / name for name in texts)))
