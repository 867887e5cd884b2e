"""The report of a sweep: its front as files beside the plan, and the same in MLflow.

In: the results of a sweep, given or as they were stored. Out: `results.json` and the files of
`analysis.report` in the sweep's folder; in MLflow a parent run with the front as picture, page,
table and numbers, a note that shows picture and table on the run's first page, each result as a
nested run with its paired errors, and a saved chart view of cost against quality. Written again it
replaces all of that and makes no second run. A front on other axes gets a folder of its own, here
and there, and leaves the sweep's run as it is otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.reporting.axes import Axes
from orchestrator.reporting.confidence import confidence_metrics, with_confidence
from orchestrator.reporting.curves import (
    VALIDATION_METRIC,
    curves_of,
    history_curves,
    history_folder,
)
from orchestrator.reporting.findings import front_metrics
from orchestrator.reporting.pareto import KEPT_SHARE, Front, find_front
from orchestrator.reporting.report import SweepReport, WrittenReport, write_files
from orchestrator.reporting.results import SweepResults, about_items, load_items, load_results
from orchestrator.reporting.rows import full_rows
from orchestrator.reporting.seeds import join_seeds
from orchestrator.reporting.tables import markdown_table
from orchestrator.tracking import VIEW_TAG, ChartView, TrackedRun, Tracking, tag_filter
from orchestrator.workspace.folders import Workspace

ARTIFACT_FOLDER = "front"
MAX_NOTE_CHARACTERS = 7500
MAX_SAID_CHARACTERS = 6000
MAX_PARALLEL_LAYERS = 24


def write_report(
    workspace: Workspace,
    sweep: SweepResults | str,
    *,
    axes: Axes | None = None,
    tracking: Tracking | None = None,
) -> WrittenReport:
    """Write the report of a sweep, and track it.

    Args:
        workspace: Holds the sweep.
        sweep: Its results, or its name, for those that are stored.
        axes: Which cost against which quality; evaluations against accuracy when unset.
        tracking: Where to track it; nowhere when unset.

    Raises:
        UserError: If there is no such sweep, or it has no result yet.
    """
    axes = axes or Axes()
    if isinstance(sweep, str):
        sweep = load_results(workspace, sweep)
    sweep.store(workspace)
    items = load_items(workspace, sweep.results)
    front = front_of(sweep, items, axes)
    run = None
    if tracking is not None:
        run = tracking.run(sweep.key, name=sweep.name, kind="sweep")
        if not axes.slug:
            sweep, front = track_results(tracking, run, sweep, front)
            sweep.store(workspace)
    history = history_curves(history_folder(sweep.folder(workspace), sweep.key))
    report = SweepReport(
        name=sweep.name,
        front=front,
        influence=sweep.influence,
        curves={**curves_of(sweep, front), **({} if axes.slug else history)},
        facts=sweep.facts,
        notes=[*sweep.notes, *about_items(sweep.results, items)],
    )
    folder = sweep.folder(workspace) / axes.slug
    files = write_files(report, folder)
    view = None
    if tracking is not None and run is not None:
        if axes.slug:
            for path in files:
                run.log_artifact(path, f"{ARTIFACT_FOLDER}/{axes.slug}")
            run.finish()
        else:
            view = track_front(tracking, run, report, files)
    run_id = run.run_id if run is not None else None
    return WrittenReport(report, folder, tuple(files), run_id, view)


def front_of(
    sweep: SweepResults,
    items: Mapping[str, EvaluationResult],
    axes: Axes,
    *,
    kept_share: float = KEPT_SHARE,
) -> Front:
    """Place a sweep's results, and say how sure each place is.

    Args:
        sweep: The results.
        items: What they were measured by, as far as it is stored; see `load_items`.
        axes: Cost and quality.
        kept_share: The share of the full model's quality that confidences relate to.
    """
    joined = join_seeds(sweep.results)
    front = find_front(joined.results, axes)
    return with_confidence(front, joined.runs(items), kept_share=kept_share)


def track_results(
    tracking: Tracking, run: TrackedRun, sweep: SweepResults, front: Front
) -> tuple[SweepResults, Front]:
    """Track every result as a run nested in the sweep's, with its paired errors; those of a model
    of several seeds are all its seeds' together, and stand in the run of each.

    Returns:
        The same results and front, each result with the id of its run.
    """
    members = join_seeds(sweep.results).members
    paired = {
        key: confidence_metrics(point)
        for point in front.placed
        for key in members[point.result.key]
    }
    tracked = {}
    for result in sweep.results:
        nested = tracking.log_trial(
            result, parent=run, sweep=sweep.name, journal_folder=sweep.journal_of(result)
        )
        if paired.get(result.key):
            nested.log_metrics(paired[result.key])
        tracked[result.key] = replace(result, run_id=nested.run_id)
    sweep = sweep.with_results(tuple(tracked[result.key] for result in sweep.results))
    return sweep, front.with_results({r.key: r for r in join_seeds(sweep.results).results})


def track_front(
    tracking: Tracking, run: TrackedRun, report: SweepReport, files: Sequence[Path]
) -> str:
    """Put a report into the sweep's run: numbers, files, table, note, chart view.

    Returns:
        Key of the chart view.
    """
    run.log_metrics(front_metrics(report.front))
    for path in files:
        run.log_artifact(path, ARTIFACT_FOLDER)
    run.log_table(full_rows(report.front), f"{ARTIFACT_FOLDER}/table.json")
    run.set_note(note_of(report, run.run_id))
    view = front_view(report)
    tracking.save_view(view)
    run.set_tags({VIEW_TAG: view.key})
    run.finish()
    return view.key


def note_of(report: SweepReport, run_id: str | None) -> str:
    """Return the note of a sweep's run: findings, picture and table, as MLflow shows Markdown.

    What is too long for a tag is left to the artifacts.
    """
    # The page shows the first lines only until it is asked for more: the findings come first.
    lines = [f"- {sentence}" for sentence in report.sentences]
    lengths = itertools.accumulate(len(line) + 1 for line in lines)
    num_shown = sum(length <= MAX_SAID_CHARACTERS for length in lengths)
    if num_shown < len(lines):
        lines[num_shown:] = [f"- More: `{ARTIFACT_FOLDER}/front.md` under Artifacts."]
    parts = ["\n".join(lines)]
    if run_id is not None and report.front.placed:
        parts.append(_picture("front", run_id))
    table = markdown_table(report.front)
    if sum(map(len, parts)) + len(table) > MAX_NOTE_CHARACTERS:
        table = f"All models: `{ARTIFACT_FOLDER}/table.json` under Artifacts."
    parts.append(table)
    if run_id is not None and report.influence is not None:
        parts.append(_picture("influence", run_id))
    return "\n\n".join(parts)


def _picture(name: str, run_id: str) -> str:
    # An SVG fits the page's width; a PNG of the same picture is cut off, for it has more pixels.
    return f"![{name}](/get-artifact?path={ARTIFACT_FOLDER}/{name}.svg&run_uuid={run_id})"


def front_view(report: SweepReport) -> ChartView:
    """Return the chart view of a sweep: cost against quality, corrections, curves, columns."""
    front = report.front
    num_layers = max((len(p.result.schedule or ()) for p in front.placed), default=0)
    layers = [f"r_{layer:02d}" for layer in range(1, min(num_layers, MAX_PARALLEL_LAYERS) + 1)]
    measured = {name for point in front.placed for name in point.result.metrics()}
    wanted = [
        front.axes.cost,
        front.axes.quality,
        front.axes.error,
        "quality/bits_per_byte",
        "cost/relative_flops",
        "cost/decode_ms_per_token",
        "cost/kv_bytes_per_token",
    ]
    metrics = [name for name in dict.fromkeys(wanted) if name in measured]
    scatters = [(front.axes.cost, front.axes.quality)]
    for pair in (
        ("cost/decode_ms_per_token", front.axes.quality),
        (front.axes.cost, "quality/bits_per_byte"),
    ):
        if set(pair) <= measured and pair not in scatters:
            scatters.append(pair)
    curves = [VALIDATION_METRIC, "train/loss"] if report.curves else []
    return ChartView(
        key=view_key(report.name),
        name=f"Front of {report.name}",
        # The sweep's own run has no cost; in the charts it would be an empty row.
        run_filter=tag_filter({"iiet.sweep": report.name}) + " and tags.`iiet.kind` != 'sweep'",
        order_by=front.axes.cost,
        columns=["params.schedule", "params.threshold", *(f"metrics.{name}" for name in metrics)],
        scatters=scatters,
        parallel_params=layers,
        parallel_metrics=[front.axes.cost, front.axes.quality],
        curves=curves,
        folded_groups=sorted({name.rpartition("/")[0] for name in [*measured, *curves]}),
    )


def view_key(name: str) -> str:
    """Return the key of a sweep's chart view: its name in letters, digits and dashes."""
    return "front-" + "".join(c if c.isalnum() and c.isascii() else "-" for c in name)
