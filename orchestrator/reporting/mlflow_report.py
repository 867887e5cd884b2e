"""Report of a sweep in MLflow.

The sweep's run holds the front as metrics, files, tables and note. Each result is a nested run;
intervals are rows of a table. A saved chart view shows cost against quality.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.data.mixture import describe_data
from orchestrator.records.metrics import (
    BITS_PER_BYTE,
    CONFIDENCE_KEEPS_99,
    CONFIDENCE_ON_FRONT,
    DECODE_MS,
    KV_BYTES,
    OVERHEAD_METRICS,
    RELATIVE_FLOPS,
    RELATIVE_NFE,
    STDERR_SUFFIX,
    pick_name,
    stderr_name,
)
from orchestrator.records.tracked_run import (
    NOTE_TAG,
    REPORT_TAG,
    RUN_ID,
    SWEEP_TAG,
    VIEW_TAG,
    DataSummary,
    RunStatus,
    TrackedRun,
    reason_tags,
    tag_filter,
    without_step,
)
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial
from orchestrator.reporting.charts import front_chart, save_chart
from orchestrator.reporting.claims import claim_metrics
from orchestrator.reporting.colors import run_color
from orchestrator.reporting.findings import findings
from orchestrator.reporting.front import Front
from orchestrator.reporting.results import (
    ACCURACY_CHARTS,
    STUDENT_CHARTS,
    StoredSweep,
)
from orchestrator.reporting.sections import bullets
from orchestrator.reporting.statistics import (
    DEMANDED_SHARE,
    SUMMARY_METRICS,
)
from orchestrator.reporting.sweep_report import ReportResult
from orchestrator.reporting.tables import interval_rows, models_table
from orchestrator.tracking.chart_view import ChartView
from orchestrator.training.tracked_runs import trial_model
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import (
    ACCURACY_METRIC,
    VALIDATION_METRIC,
    now_ms,
    recorded_times,
)

ARTIFACT_FOLDER = "front"
INTERVALS_FILE = f"{ARTIFACT_FOLDER}/intervals.json"
"""Differences of the models, a row for each pair and task."""
CHECKPOINT_TAG = "iiet.checkpoint"
"""Folder of the weights, as in the runs of pretrainings."""
COLOR_TAG = "mlflow.runColor"
"""Tag with the color of a run's points and curves."""
TABLES_TAG = "mlflow.loggedArtifacts"
"""Tag with the artifacts that MLflow shows as tables."""
MAX_NOTE_CHARACTERS = 7500
MAX_FINDINGS_CHARACTERS = 6000
MAX_PARALLEL_LAYERS = 24
BEATEN_NOTE = "Models that another one beats are left out until the end."


def mlflow_run_of_sweep(stored: TrackedRun | None, name: str, key: str, folder: Path) -> TrackedRun:
    """Return the run of a sweep in a folder as it was `stored` last, or a new one."""
    started_ms, _ = recorded_times(folder) or (now_ms(), None)
    return stored or TrackedRun(
        key=key,
        kind="sweep",
        name=name,
        folder=str(folder),
        tags={SWEEP_TAG: name},
        started_ms=started_ms,
    )


def front_metrics(front: Front) -> dict[str, float]:
    """Return the metrics of a sweep's run: sizes and the picks."""
    values: dict[str, float | None] = {
        "front/size": len(front.members),
        "front/num_results": len(front.models),
    }
    named_models = dict(front.picks)
    if cheapest_keeping := front.cheapest_keeping(DEMANDED_SHARE):
        named_models["keeping_99"] = cheapest_keeping
    for name, model in named_models.items():
        values[pick_name(name, "cost")] = model.cost
        values[pick_name(name, "quality")] = model.quality
        values[pick_name(name, "share_of_full")] = front.share_of_full(model)
        values[pick_name(name, "confidence_on_front")] = model.number(CONFIDENCE_ON_FRONT)
        values[pick_name(name, "confidence_keeps_99")] = model.number(CONFIDENCE_KEEPS_99)
    return {name: float(value) for name, value in values.items() if value is not None}


def mlflow_runs_of_results(sweep: StoredSweep, front: Front) -> list[TrackedRun]:
    """Return every result as a run nested in the sweep's run, with its overhead and its confidence.

    Each seed of a model gets the numbers of the mean over its seeds.
    """
    names = (*SUMMARY_METRICS, *OVERHEAD_METRICS)
    numbers_of_seed: dict[str, dict[str, float]] = {}
    for model in front.placed:
        numbers = {name: model.number(name) for name in names}
        of_model = {name: number for name, number in numbers.items() if number is not None}
        for seed in model.seeds:
            numbers_of_seed[seed.key] = of_model
    return [
        mlflow_run_of_trial(
            sweep.name,
            sweep.key,
            result,
            sweep.journal_of(result),
            numbers_of_seed.get(result.key),
        )
        for result in sweep.results
    ]


def mlflow_run_of_trial(
    sweep: str,
    sweep_key: str,
    result: Trial,
    journal: Path | None,
    further_metrics: Mapping[str, float] | None = None,
    *,
    status: RunStatus = "FINISHED",
    reason: str = "",
) -> TrackedRun:
    """Return what MLflow shows of a trial.

    Its run starts and ends when the training did; that of a model that was only measured, when its
    result was written. Where neither is known it starts now.

    Args:
        sweep: Name of the sweep.
        sweep_key: Key of the sweep.
        result: The trial, with what is measured of it.
        journal: Folder with the journal of its own training; None if it has none.
        further_metrics: Metrics that follow from other trials, such as an overhead.
        status: If it is FINISHED, the model is shown, too.
        reason: Why it ended without a result.
    """
    times = recorded_times(journal) if journal else None
    if not times:
        with suppress(OSError):
            written_ms = int(result.result_path.stat().st_mtime * 1000)
            times = (written_ms, written_ms)
    started_ms, ended_ms = times or (now_ms(), None)
    dataset: DataSummary | None = None
    with suppress(UserError):  # The tokens of an old sweep may be gone.
        dataset = describe_data(result.suite.tokens_folder)
    # Teachers and baselines have the recipe of their own runs; a pruned student has the weights of
    # its teacher, and no recipe.
    is_pruned = result.role == "trial" and result.parent and not result.is_elastic
    job = None
    if result.checkpoint and not (result.job or is_pruned):
        with suppress(UserError):  # Without it, the run shows what the trial knows.
            job = TrainingJob.of_folder(Path(result.checkpoint).parent)
    # MLflow's page that compares runs would begin with an axis of checkpoints. The standard errors
    # of single tasks are in tables.
    params = {name: text for name, text in result.params(job).items() if name != "checkpoint"}
    metrics = {
        name: value
        for name, value in result.metrics().items()
        if not (name.endswith(STDERR_SUFFIX) and name.count("/") > 1)
    }
    return TrackedRun(
        key=result.key,
        kind=result.role,
        name=result.run_name,
        parent=sweep_key,
        folder=result.folder,
        journal=str(journal) if journal else None,
        params=params,
        tags={
            SWEEP_TAG: sweep,
            "iiet.method": result.method,
            CHECKPOINT_TAG: result.checkpoint or "",
            COLOR_TAG: run_color(
                result.role,
                result.group or result.label,
                result.numbers.get(RELATIVE_NFE, 1.0),
            ),
            **reason_tags(status, reason),
        },
        points=without_step({**metrics, **(further_metrics or {})}),
        dataset=dataset,
        model=trial_model(result) if status == "FINISHED" else None,
        status=status,
        started_ms=started_ms,
        ended_ms=ended_ms,
    )


def report_changes(report: ReportResult, time_ms: int) -> dict[str, Any]:
    """Return what a report changes of its sweep's run, for `TrackedRun.changed`.

    A front on other axes only adds a folder of files. `time_ms` is when the sweep began.
    """
    front = report.front
    paths = [str(path) for path in report.files]
    if slug := front.axes.slug:
        return {"files": {f"{ARTIFACT_FOLDER}/{slug}": paths}}
    pictures = [path.stem for path in report.files if path.suffix == ".svg"]
    [sweep] = report.sweeps
    changes = _on_page(front, sweep.name, report.curves, report.sentences, pictures, time_ms)
    texts = {}
    tables_tag = ""
    if rows := interval_rows(front):
        # MLflow's own `log_table` appends to an existing table; a new report must replace it.
        table = {"columns": [*rows[0]], "data": [[*row.values()] for row in rows]}
        texts[INTERVALS_FILE] = json.dumps(table)
        tables_tag = json.dumps([{"path": INTERVALS_FILE, "type": "table"}])
    changes["tags"][TABLES_TAG] = tables_tag
    changes["tags"][REPORT_TAG] = f"{ARTIFACT_FOLDER}/front.html"
    return {
        **changes,
        "points": without_step({**front_metrics(front), **claim_metrics(report.claims)}),
        "files": {ARTIFACT_FOLDER: paths},
        "texts": texts,
    }


def front_so_far(front: Front, *, name: str, notes: Sequence[str], folder: Path) -> dict[str, Any]:
    """Draw the front of a running sweep, and return what it changes of the sweep's run.

    Args:
        name: Name of the sweep.
        notes: Sentences that come first.
        folder: Folder of the picture, `front.svg`.
    """
    chart = front_chart(front, title=f"Sweep {name}")
    pictures = save_chart(chart, folder / "front", formats=("svg",))
    sentences = [*notes, BEATEN_NOTE, *findings(front)]
    # The curves are in the trials' runs.
    changes = _on_page(front, name, STUDENT_CHARTS, sentences, ["front"], now_ms())
    return {**changes, "files": {ARTIFACT_FOLDER: [str(path) for path in pictures]}}


def _on_page(
    front: Front,
    name: str,
    charts: Collection[str],
    sentences: Sequence[str],
    pictures: Sequence[str],
    time_ms: int,
) -> dict[str, Any]:
    """Return the chart view of a sweep, and the tags of its run that name it and hold the note."""
    view = front_chart_view(front, name, charts, time_ms)
    tags = {NOTE_TAG: run_note(front, sentences, pictures), VIEW_TAG: view.key}
    return {"views": dict([view.tag]), "tags": tags}


def run_note(front: Front, sentences: Sequence[str], pictures: Sequence[str]) -> str:
    """Return the note of a sweep's run in Markdown: findings, pictures and the table of models.

    A part that does not fit into a tag is replaced by the name of its artifact.
    """
    # MLflow first shows only the top of a note, so the findings come first.
    lengths = itertools.accumulate(len(sentence) + 3 for sentence in sentences)
    num_shown = sum(length <= MAX_FINDINGS_CHARACTERS for length in lengths)
    shown = list(sentences[:num_shown])
    if num_shown < len(sentences):
        shown.append(f"More: `{ARTIFACT_FOLDER}/front.html` under Artifacts.")
    # An SVG fits the page's width; a PNG has more pixels and would be cut off. The address is
    # relative, because MLflow may be served below a path.
    images = {
        name: f"![{name}](get-artifact?path={ARTIFACT_FOLDER}/{name}.svg&run_uuid={RUN_ID})"
        for name in pictures
    }
    parts = [bullets(shown), images.pop("front", "")]
    table = models_table(front).to_markdown()
    if sum(map(len, parts)) + len(table) > MAX_NOTE_CHARACTERS:
        table = f"All models: `{ARTIFACT_FOLDER}/front.csv` under Artifacts."
    return "\n\n".join(part for part in (*parts, table, *images.values()) if part)


def front_chart_view(front: Front, name: str, charts: Collection[str], time_ms: int) -> ChartView:
    """Return the chart view of a sweep: cost against quality, corrections, curves, columns."""
    num_layers = max((len(model.trial.schedule or ()) for model in front.placed), default=0)
    layers = [f"r_{layer:02d}" for layer in range(1, min(num_layers, MAX_PARALLEL_LAYERS) + 1)]
    measured = {metric for model in front.placed for metric in model.trial.metrics()}
    cost = front.axes.cost
    quality = front.axes.quality
    columns = [
        quality,
        cost,
        BITS_PER_BYTE,
        stderr_name(quality),
        RELATIVE_FLOPS,
        DECODE_MS,
        KV_BYTES,
    ]
    metrics = [metric for metric in dict.fromkeys(columns) if metric in measured]
    scatters = [(cost, quality)]
    for pair in ((DECODE_MS, quality), (cost, BITS_PER_BYTE)):
        if set(pair) <= measured and pair not in scatters:
            scatters.append(pair)
    curves = [VALIDATION_METRIC, "train/loss"] if charts else []
    if not set(ACCURACY_CHARTS).isdisjoint(charts):
        curves.insert(0, ACCURACY_METRIC)
    return ChartView(
        # Letters, digits and dashes.
        key="front-" + "".join(c if c.isalnum() and c.isascii() else "-" for c in name),
        name=f"Front of {name}",
        # The sweep's own run has no cost and would be an empty row in the charts.
        run_filter=tag_filter({SWEEP_TAG: name}) + " and tags.`iiet.kind` != 'sweep'",
        order_by=f"metrics.{cost}",
        columns=[*(f"metrics.{m}" for m in metrics), "params.schedule", "params.threshold"],
        scatters=scatters,
        parallel_params=layers,
        parallel_metrics=[cost, quality],
        curves=curves,
        folded_groups=sorted({metric.rpartition("/")[0] for metric in [*measured, *curves]}),
        time_ms=time_ms,
    )
