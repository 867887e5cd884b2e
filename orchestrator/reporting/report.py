"""The report of a sweep, or of several on one front: its sections, its files, and its MLflow run.

`front.png` and `front.svg` for papers, `front.html` for browsing, `front.md` for an appendix,
`front.csv` and `front.json` for programs, `influence.png` and `influence.svg`. The same results
give the same bytes. Writing a report again replaces the old one and makes no second MLflow run. A
front on other axes gets its own folder, in the workspace and in MLflow, and changes nothing else of
the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iiet.pruning import InfluenceTable
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.reporting.charts import curves_chart, front_chart, influence_chart, save_chart
from orchestrator.reporting.claims import (
    CLAIMS_TITLE,
    PAPER_KEPT_SHARE,
    PAPER_OVERHEAD_SHARE,
    Claim,
    claims_section,
    find_claims,
)
from orchestrator.reporting.command_tables import influence_table
from orchestrator.reporting.findings import confidence_note, findings
from orchestrator.reporting.front import COSTS, Front, FrontAxes, known, sweep_front
from orchestrator.reporting.mlflow_report import report_changes, sweep_run, trial_runs
from orchestrator.reporting.results import (
    SETTINGS_TITLE,
    Curve,
    StoredSweep,
    history_folder,
    load_sweep_results,
    read_history_curves,
    read_training_curves,
    suite_notes,
)
from orchestrator.reporting.sections import Section, render_json, render_markdown, render_page
from orchestrator.reporting.several_schedules import elastic_section, teacher_depths
from orchestrator.reporting.tables import (
    TASK_TABLES_NOTE,
    front_values,
    model_table,
    models_table,
    task_tables,
)
from orchestrator.terminal.render import format_parameters
from orchestrator.workspace.files import json_text, write_text
from orchestrator.workspace.journal import recorded_times
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from orchestrator.tracking.tracker import Tracking  # It imports MLflow.

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
MS_NOTE = (
    "Milliseconds were measured separately for each sweep: differences between sweeps include "
    "those of the machine and of its other load."
)
MAX_FOLDER_NAME_LENGTH = 80


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
    depths: Sequence[Section] = ()
    """The depth curves of teachers that were measured."""
    about: str = ""
    """What was trained: data, model, tokens and date."""
    elastic: Section | None = None
    """Elastic weights against separate students, if the sweep has both."""
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
        """Return what a terminal shows: the front and its findings, elastic weights, claims."""
        table = models_table(self.front, self.title)
        front = Section(tables=[table], notes=self.sentences, data=front_values(self.front))
        claims = claims_section(self.claims, CLAIMS_TITLE) if self.claims else None
        return [section for section in (front, self.elastic, claims) if section]

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
        if self.claims:
            found.append(claims_section(self.claims))
        models, data = models_table(front), front_values(front, folder)
        found.append(Section(title="All models, cheapest first", tables=[models], data=data))
        if self.elastic:
            found.append(self.elastic)
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
        folded += self.depths
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
            "front.md": render_markdown(self.title, sections),
            "front.csv": models.to_csv(index=False, lineterminator="\n"),
            "front.json": json_text(render_json(sections), allow_nan=False) + "\n",
        }
        for name, text in texts.items():
            write_text(folder / name, text)
        return replace(self, files=(*paths, *(folder / name for name in texts)))


def write_sweep_report(
    workspace: Workspace,
    *sweeps: StoredSweep | str,
    axes: FrontAxes | None = None,
    tracking: Callable[[], Tracking] | None = None,
) -> SweepReport:
    """Write the report of a sweep, or of several on one front.

    Of several sweeps, a result that they share counts once, for the first of them. If they were
    measured on different tasks or texts, a note says that their qualities do not compare. Their
    report has a folder of its own, and no run in MLflow.

    Args:
        workspace: Holds the sweeps.
        sweeps: Their results, or their names to use the stored ones.
        axes: Cost and quality; NFE and accuracy by default.
        tracking: Opens MLflow, which shows the report of one sweep; it is opened only if there is
            something that was not shown before. None to show nothing.

    Raises:
        UserError: If there is no such sweep, or one has no result yet.
    """
    axes = axes or FrontAxes()
    loaded = (load_sweep_results(workspace, s) if isinstance(s, str) else s for s in sweeps)
    found = list({sweep.name: sweep for sweep in loaded}.values())
    front, notes = sweep_front(workspace, found, axes)
    if len(found) > 1:
        report = _several_sweeps(workspace, found, front, notes)
        return report.written(report.folder) if workspace.is_writable else report

    [sweep] = found
    place = sweep.folder(workspace)
    if workspace.is_writable:
        sweep.store(workspace)
    run = sweep_run(TrackedRun.stored(workspace, "sweep", sweep.key), sweep.name, sweep.key, place)
    if tracking and not axes.slug:
        runs = trial_runs(sweep, front)
        is_known = all(each.is_stored(workspace) for each in (run, *runs))
        if not is_known or any(result.run_id is None for result in sweep.results):
            mlflow = tracking()
            mlflow.publish(run, *runs)
            tracked = [
                result.model_copy(update={"run_id": mlflow.run_id(own)})
                for result, own in zip(sweep.results, runs, strict=True)
            ]
            sweep = sweep.model_copy(update={"results": tuple(tracked)})
            front = front.with_runs(tracked)
            sweep.store(workspace)

    curves = dict(read_training_curves(sweep, front.rows))
    if not axes.slug and sweep.is_search:
        curves |= read_history_curves(history_folder(place, sweep.key))
    times = recorded_times(place)
    report = SweepReport(
        name=sweep.name,
        about=_about(sweep, front, times),
        front=front,
        influence=sweep.influence,
        curves=curves,
        facts=sweep.facts,
        depths=teacher_depths(sweep.results, notes),
        notes=[*sweep.notes, *notes],
        elastic=elastic_section(front),
        claims=_measured_claims(front),
        folder=place / axes.slug,
    )
    before = {path: path.read_bytes() for path in report.folder.glob("*.*") if path.is_file()}
    if workspace.is_writable:
        report = report.written(report.folder)
    if tracking:
        ended_ms = times[1] if times else None
        run = run.changed(
            **report_changes(report, run.started_ms),
            status="FINISHED",
            ended_ms=run.ended_ms or ended_ms,
        )
        are_same = all(before.get(path) == path.read_bytes() for path in report.files)
        if not (are_same and run.is_stored(workspace)):
            tracking().publish(run)
            tracking().wait()
    return report


def _several_sweeps(
    workspace: Workspace, sweeps: Sequence[StoredSweep], front: Front, notes: Sequence[str]
) -> SweepReport:
    common = list(dict.fromkeys(note for each in sweeps for note in each.notes))
    common += suite_notes(sweeps)
    if front.axes.cost == COSTS["ms"]:
        common.append(MS_NOTE)
    names = [sweep.name for sweep in sweeps]
    folder = "+".join(names)
    if len(folder) > MAX_FOLDER_NAME_LENGTH:
        folder = f"{names[0]}+{len(names) - 1}-{content_key(folder)[:8]}"
    slug = front.axes.slug
    return SweepReport(
        name=" + ".join(names),
        front=front,
        curves={
            f"{title}: {sweep.name}": curves
            for sweep in sweeps
            for title, curves in read_training_curves(sweep, front.rows).items()
        },
        facts={f"{title}: {s.name}": facts for s in sweeps for title, facts in s.facts.items()},
        notes=[*common, *notes],
        claims=_measured_claims(front),
        folder=workspace.overlays / (f"{folder}-{slug}" if slug else folder),
    )


def _about(sweep: StoredSweep, front: Front, times: tuple[int, int | None] | None) -> str:
    """Return data, model, tokens and date of a sweep, as far as they are known."""
    settings, full = sweep.facts.get(SETTINGS_TITLE, {}), front.full
    names = ("data.depth.tasks", "data.hub_name", "data.files", "data.source")
    data = next((text for name in names if (text := str(settings.get(name) or "()")) != "()"), "")
    parts = [re.sub(r"[()']|,\)$", "", data).rstrip(",")]
    if full is not None:
        trial = full["trial"]
        parts.append(f"{trial.method} {trial.schedule_text}".strip())
        for number, noun in (("cost/num_parameters", "parameters"), ("train/tokens", "tokens")):
            if value := known(trial.numbers, number):
                parts.append(f"{format_parameters(value)} {noun}")
    if times:
        ended = datetime.fromtimestamp((times[1] or times[0]) / 1000, UTC)
        parts.append(f"{ended.day} {ended:%B %Y}")
    return ", ".join(filter(None, parts)) if data else ""


def _measured_claims(front: Front) -> list[Claim]:
    claims = find_claims(front)
    return claims if any(claim.is_measured for claim in claims) else []
