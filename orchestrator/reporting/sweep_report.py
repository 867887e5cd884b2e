"""The report of a sweep, or of several on one front: its content, and the files made of it.

`front.png` and `front.svg` for papers, `front.html` for browsing, `front.csv` and `front.json` for
programs, `influence.png` and `influence.svg`. The same results give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, InstanceOf, computed_field

from iiet.iiad.pruning import InfluenceTable
from orchestrator.reporting.charts import (
    curves_chart,
    front_chart,
    influence_chart,
    menu_fronts,
    save_chart,
)
from orchestrator.reporting.claims import (
    CLAIMS_TITLE,
    PAPER_OVERHEAD_SHARE,
    PAPER_SHARE_OF_FULL,
    Claim,
    claims_section,
)
from orchestrator.reporting.command_tables import influence_table
from orchestrator.reporting.findings import confidence_note, findings
from orchestrator.reporting.front import Front
from orchestrator.reporting.output import Result
from orchestrator.reporting.results import Curve, StoredSweep
from orchestrator.reporting.sections import Section, View, render_json, render_page, render_terminal
from orchestrator.reporting.statistics import DEMANDED_SHARE
from orchestrator.reporting.tables import (
    TASK_TABLES_NOTE,
    front_values,
    model_rows,
    models_csv,
    models_table,
    task_tables,
)
from orchestrator.workspace.files import json_text, write_text

if TYPE_CHECKING:
    from rich.console import RenderableType

LEGEND = (
    "Star: teacher. Filled: on the front. Hollow and faint: dominated. Diamond: baseline. "
    "Bars: one standard error. Line: the best quality at each cost budget, without baselines."
)
PAPER_LEGEND = (
    f"Cross: the paper's headline for this teacher, {1 - PAPER_OVERHEAD_SHARE:.0%} less overhead "
    f"at {PAPER_SHARE_OF_FULL:.1%} of the accuracy. Overhead is cost beyond vanilla of the same "
    "shape."
)
INFLUENCE_LEGEND = (
    "How much each correction matters, on a logarithmic scale. A threshold drops corrections from "
    "a layer's last one backwards."
)


class ReportResult(Result):
    """The front of one sweep or several, and the files of its report."""

    title: str
    """Heading of picture and page: what was trained, or the sweeps' names."""
    sentences: tuple[str, ...]
    """What the front says in one sentence, notes on how to read it, then the other findings."""
    notes: tuple[str, ...] = Field(default=(), exclude=True)
    """The notes among the sentences, which hold on all axes."""
    folder: Path
    """Folder of the report's files."""
    files: tuple[Path, ...] = Field(default=(), exclude=True)
    """What was written to the folder; nothing in a workspace that can only be read."""
    workspace: Path = Field(exclude=True)
    """Folder of the workspace."""
    sweeps: tuple[StoredSweep, ...] = Field(exclude=True)
    """The stored results of each sweep; one sweep also has influence to show."""
    front: InstanceOf[Front] = Field(exclude=True)
    """Every model with its place."""
    curves: Mapping[str, Sequence[Curve]] = Field(default={}, exclude=True)
    """Title of a chart -> its curves over steps."""
    claims: tuple[InstanceOf[Claim], ...] = Field(default=(), exclude=True)
    """Those of the paper's claims that the models answer."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def page(self) -> Path | None:
        """The HTML page; None if no model could be placed."""
        return next((path for path in self.files if path.suffix == ".html"), None)

    @property
    def influence(self) -> InfluenceTable | None:
        """The teacher's influence table, if there is one sweep, and it has one."""
        return self.sweeps[0].influence if len(self.sweeps) == 1 else None

    @property
    def facts(self) -> dict[str, Mapping[str, Any]]:
        """Title of a list -> names and values, such as settings and provenance."""
        if len(self.sweeps) == 1:
            return dict(self.sweeps[0].facts)
        return {
            f"{title}: {sweep.name}": facts
            for sweep in self.sweeps
            for title, facts in sweep.facts.items()
        }

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
            results: one entry per model: `name`, `role` (`trial`, `teacher`, `baseline`, `source`,
                `source_continued`), `method`, `schedule` (as text), `threshold`, `on_front`,
                `verdict`, `share_of_full`, `retention` (as in the table, if losses are bounded),
                every metric by its name, `key`, `checkpoint`, `run_id`, `details`
            front: keys of the models on the front, from the cheapest
            picks: `best`, `knee` and `cheapest`, each the key of a model
            confidence_basis: what the confidences were computed from, or `null`
            retention: key of a model to what it has lost of each task against the teacher's source:
                `task`, `unit`, `lost` with `low` and `high`, `bound`, `kept`; empty without bounds
            claims: (optional) those of the paper's claims that the models answer: `number`, `key`,
                `text`, `paper` (its number, points of accuracy or percent of overhead; or `null`),
                `verdict` (`holds`, `does not hold`, `not decided`), `here` (in the paper's unit),
                `low` and `high` (its 95% interval; `null` for claim 3, whose `here` is the overhead
                that is saved), `kept`, `kept_low` and `kept_high` (of claim 3, the share of the
                teacher's accuracy that is kept, in percent), `about` (the models that are compared)
        """
        return {**super().to_json(), **render_json(self.brief())}

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the front as a picture, and what a terminal does."""
        picture = self.folder / "front.svg"
        drawn = picture.read_text("utf-8") if picture.is_file() else ""
        return f"<div>{drawn}</div>{super()._repr_html_()}"

    def shown(self) -> Iterable[RenderableType]:
        yield ""
        yield from render_terminal(self.brief())
        if self.page:
            yield f"report: {self.page}"
        if picture := next((path for path in self.files if path.name == "front.png"), None):
            yield f"picture: {picture}"
        yield f"MLflow: iiet-orch ui --workspace {self.workspace}"

    def brief(self) -> list[Section]:
        """Return the sections that a terminal shows: the front and its findings, claims."""
        table = models_table(self.front, self.title, has_overhead=bool(self.claims))
        notes = [*self.sentences, *table_legend(self.front)]
        front = Section(tables=[table], notes=notes, data=front_values(self.front))
        return [front, claims_section(self.claims, CLAIMS_TITLE)] if self.claims else [front]

    def sections(self) -> list[Section]:
        """Return the sections of the page and of `front.json`; paths in the workspace are
        relative."""
        front = self.front
        headline, *other_sentences = self.sentences
        counts = f"{len(front.placed)} models, {len(front.members)} on the front."
        sections = [Section(sentences=[headline, f"{names_explained(front)} {counts}"])]
        if front.placed:
            fronts = menu_fronts(front)
            mark_paper = any(claim.paper and claim.number == 3 for claim in self.claims)
            views = [
                View(
                    cost=of_axes.axes.cost_metric.title,
                    quality=of_axes.axes.quality_metric.title,
                    chart=front_chart(of_axes, mark_paper=mark_paper),
                    sentences=(
                        self.sentences if of_axes is front else sentences_of(of_axes, self.notes)
                    ),
                )
                for of_axes in fronts
            ]
            sections.append(
                Section(
                    chart=front_chart(front, title=self.title, mark_paper=mark_paper),
                    views=views,
                    first_view=fronts.index(front),
                    picture="front",
                    notes=other_sentences,
                    explanations=[
                        LEGEND,
                        *([PAPER_LEGEND] if mark_paper else []),
                        *confidence_note(front),
                    ],
                )
            )
        else:
            sections.append(Section(notes=other_sentences))
        if self.claims:
            sections.append(claims_section(self.claims))
        sections.append(
            Section(
                title="All models, cheapest first",
                tables=[models_table(front, has_overhead=bool(self.claims))],
                explanations=[f"{line[0].upper()}{line[1:]}." for line in table_legend(front)],
                data=front_values(front, self.folder),
            )
        )

        folded = []
        if tables := task_tables(front):
            note = [TASK_TABLES_NOTE]
            folded.append(Section(title="Task by task", tables=tables, explanations=note))
        if self.influence is not None and any(self.influence.value_rows):
            folded.append(self._influence_section(self.influence))
        for title, curves in self.curves.items():
            folded.append(Section(title=title, chart=curves_chart(title, curves)))
        folded += [Section(title=title, facts=facts) for title, facts in self.facts.items()]
        return sections + [replace(section, is_folded=True) for section in folded]

    def _influence_section(self, influence: InfluenceTable) -> Section:
        knee = self.front.named_picks.get("knee")
        if knee and self.sweeps[0].influence_of(knee.trial) is None:
            knee = None  # Its schedule was chosen by the influence of another teacher.
        of_first = " of the first teacher" if self.sweeps[0].influence_teacher else ""
        chart = influence_chart(
            influence.value_rows,
            metric=influence.metric,
            title=f"Influence of each correction{of_first}",
            marked_schedule=knee.trial.schedule if knee else None,
            marked_name=f"{knee.label} (knee)" if knee else "",
        )
        return Section(
            title=f"Influence of each correction{of_first} ({influence.metric})",
            sentences=[INFLUENCE_LEGEND],
            chart=chart,
            picture="influence",
            tables=[influence_table(influence)],
        )

    def written(self) -> Self:
        """Write all files to the folder, and return the report with them.

        There is no picture and no page if the front has no model.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        sections = self.sections()
        files: list[Path] = []
        for section in sections:
            if section.picture and section.chart:
                files += save_chart(dict(section.chart), self.folder / section.picture)
        texts: dict[str, str] = {}
        if self.front.placed:
            texts["front.html"] = render_page(self.title, sections)
        texts["front.csv"] = models_csv(self.front, self.folder)
        texts["front.json"] = json_text(render_json(sections), allow_nan=False) + "\n"
        for name, text in texts.items():
            write_text(self.folder / name, text)
            files.append(self.folder / name)
        return self.model_copy(update={"files": tuple(files)})


def sentences_of(front: Front, notes: Sequence[str]) -> tuple[str, ...]:
    """Return what a front says in one sentence, the notes, then the other findings."""
    headline, *further_findings = findings(front)
    return (headline, *notes, *further_findings)


def names_explained(front: Front) -> str:
    """Return what the names of models and NFE are, in one line."""
    members_first = sorted(front.placed, key=lambda model: (not model.on_front, -model.cost))
    schedules = [model.label for model in members_first if model.label == model.trial.schedule_text]
    nfe = "NFE counts the runs of layers per token"
    if not schedules:
        return f"{nfe}."
    name = schedules[0]
    layers = " (0*12: 12 layers without)" if "*" in name else ""
    left_out = ", x is a layer that is left out" if "x" in name else ""
    return f"A name such as {name} counts the corrections of each layer{layers}{left_out}; {nfe}."


def table_legend(front: Front) -> list[str]:
    """Return what the columns of the table of models are; nothing without a front."""
    if front.full is None or not front.members:
        return []
    full = front.full.label
    legend = [f"of {full}: how much of its quality is kept"]
    if front.basis is not None:
        legend.append(f"vs {full}: difference of the quality, with its interval")
        legend.append(
            f"P({DEMANDED_SHARE:.0%}), P(front): confidence that a model keeps "
            f"{DEMANDED_SHARE:.0%}, that it is on the front"
        )
    legend.append("●: on the front")
    if "knee" in front.named_picks:
        legend.append("knee: farthest above the line from cheapest to best")
    return ["; ".join(legend)]


def sweeps_text(sweeps: Sequence[StoredSweep]) -> str:
    """Return the sweeps' names, such as `Sweep a` or `Sweeps a + b`."""
    names = " + ".join(sweep.name for sweep in sweeps)
    return f"Sweeps {names}" if len(sweeps) > 1 else f"Sweep {names}"
