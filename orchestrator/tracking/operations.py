"""Operations on one run, which the outbox may deliver later, or twice after a crash."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from orchestrator.tracking.client import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    MlflowClient,
    Param,
    RunTag,
    get_artifact_repository,
)
from orchestrator.tracking.logged_models import log_model, register
from orchestrator.tracking.store import StoredRun, valid_name
from orchestrator.workspace.journal import Record, read_journal

OFFSET_TAG = "iiet.mirrored_bytes"
TABLES_TAG = "mlflow.loggedArtifacts"

NOTHING: Mapping[str, str] = MappingProxyType({})

# Limits of MLflow 3: longer texts are refused. A request takes 1,000 values, 100 of them parameters
# and 100 of them tags; the client puts more of those into further requests.
METRICS_PER_REQUEST = 800
MAX_TAG_CHARACTERS = 8000
MAX_PARAM_CHARACTERS = 6000


def _update(
    client: MlflowClient,
    run: StoredRun,
    *,
    params: Mapping[str, str] = NOTHING,
    tags: Mapping[str, str] = NOTHING,
    points: Sequence[tuple[str, float, int]] = (),
    time_ms: int = 0,
    journal: Path | None = None,
    status: str | None = None,
) -> None:
    """Send what the run does not hold yet, in one request where it fits.

    Args:
        tags: An empty text deletes the tag.
        points: Name, value and step of metrics, all with the same time.
        time_ms: Time of the points, and of the end of the run.
        journal: Folder whose journal's new metrics are copied.
        status: `RUNNING` starts a killed or failed run again; a finished one stays finished.
    """
    if status == "RUNNING" and run.status in ("KILLED", "FAILED"):
        client.update_run(run.id, status=status)
        run.status = status
    new_params = {valid_name(name): value[:MAX_PARAM_CHARACTERS] for name, value in params.items()}
    new_params = {name: new_params[name] for name in new_params if name not in run.params}
    new_tags = {name: value[:MAX_TAG_CHARACTERS] for name, value in tags.items() if value}
    for name in run.tags.keys() & {name for name, value in tags.items() if not value}:
        client.delete_tag(run.id, name)
        del run.tags[name]
    metrics = [
        Metric(valid_name(name), value, time_ms, step)
        for name, value, step in points
        if not _is_stored(run.metrics.get(valid_name(name)), value, step)
    ]
    if journal:
        records, end = read_journal(journal, int(run.tags.get(OFFSET_TAG, 0)))
        metrics += _journal_metrics(run, records)
        new_tags[OFFSET_TAG] = str(end)
    new_tags = {name: value for name, value in new_tags.items() if run.tags.get(name) != value}
    # The last request has the tags: what was copied from a journal counts as copied from then on.
    while len(metrics) > METRICS_PER_REQUEST:
        client.log_batch(run.id, metrics=metrics[:METRICS_PER_REQUEST])
        _note_points(run, metrics[:METRICS_PER_REQUEST])
        metrics = metrics[METRICS_PER_REQUEST:]
    if metrics or new_params or new_tags:
        client.log_batch(
            run.id,
            metrics=metrics,
            params=[Param(name, value) for name, value in new_params.items()],
            tags=[RunTag(name, value) for name, value in new_tags.items()],
        )
    _note_points(run, metrics)
    run.params |= new_params
    run.tags |= new_tags
    if status not in (None, "RUNNING", run.status):
        # The run of a short piece of work is created after that has ended.
        client.set_terminated(run.id, status, end_time=max(time_ms, run.started_ms))
        run.status = str(status)


def _journal_metrics(run: StoredRun, records: Iterable[Record]) -> list[Metric]:
    # A resumed training records the steps after its checkpoint a second time.
    last, metrics = dict(run.metrics), []
    for record in records:
        values = record["values"] if record["kind"] == "metrics" else {}
        for name, value in values.items():
            point = Metric(valid_name(name), value, record["time"], record["step"])
            if not _is_stored(last.get(point.key), value, point.step):
                metrics.append(point)
                last[point.key] = point
    return metrics


def _is_stored(last: Metric | None, value: float, step: int) -> bool:
    # MLflow would add a point even if step and value equal those of the last one.
    if last is None or last.step < step:
        return False
    return last.step > step or _is_same(last.value, value)


def _note_points(run: StoredRun, metrics: Iterable[Metric]) -> None:
    for point in metrics:
        last = run.metrics.get(point.key)
        if last is None or (point.step, point.timestamp) >= (last.step, last.timestamp):
            run.metrics[point.key] = point


def _is_same(stored: float, value: float) -> bool:
    if math.isnan(value):
        return math.isnan(stored)
    largest = sys.float_info.max  # MLflow stores infinity as this.
    return stored in (value, min(max(value, -largest), largest))


def _artifacts(client: MlflowClient, run: StoredRun) -> Any:
    # The client keeps one for each run id, and runs of a copied workspace have those of the
    # original.
    return get_artifact_repository(run.artifact_uri, tracking_uri=client.tracking_uri)


def _log_artifact(client: MlflowClient, run: StoredRun, path: Path, folder: str | None) -> None:
    if path.is_dir():
        _artifacts(client, run).log_artifacts(str(path), folder)
    else:
        _artifacts(client, run).log_artifact(str(path), folder)


def _log_table(
    client: MlflowClient,
    run: StoredRun,
    columns: Sequence[str],
    data: Sequence[Sequence[Any]],
    name: str,
) -> None:
    # MLflow's own `log_table` appends to an existing table; a new report must replace it.
    folder, _, file = name.rpartition("/")
    with TemporaryDirectory() as temporary:
        path = Path(temporary, file)
        path.write_text(json.dumps({"columns": columns, "data": data}), encoding="utf-8")
        _log_artifact(client, run, path, folder)
    tables = json.loads(run.tags.get(TABLES_TAG, "[]"))
    entry = {"path": name, "type": "table"}
    if entry not in tables:
        _update(client, run, tags={TABLES_TAG: json.dumps([*tables, entry])})


def _log_text(client: MlflowClient, run: StoredRun, text: str, name: str) -> None:
    with TemporaryDirectory() as temporary:
        path = Path(temporary, name)
        path.write_text(text, encoding="utf-8")
        _log_artifact(client, run, path, None)


def _log_dataset(
    client: MlflowClient,
    run: StoredRun,
    name: str,
    digest: str,
    profile: str,
    context: str = "training",
) -> None:
    if digest in run.datasets:
        return
    dataset = Dataset(name=name, digest=digest, source_type="local", source=digest, profile=profile)
    tags = [InputTag("mlflow.data.context", context)]
    client.log_inputs(run.id, datasets=[DatasetInput(dataset=dataset, tags=tags)])
    run.datasets.add(digest)


# Outboxes on disk contain these names.
OPERATIONS: dict[str, Callable[..., object]] = {
    "update": _update,
    "artifact": _log_artifact,
    "text": _log_text,
    "table": _log_table,
    "dataset": _log_dataset,
    "model": log_model,
    "register": register,
}
